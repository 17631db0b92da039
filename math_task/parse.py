"""Tokens of an answer become a node. What can't be read is kept as words.

An answer is a choice, or a list; an item of it is an equation, an inequality or a value; a value is
a set, a number, a formula or words, and may have a unit. Each function tries one of these.
"""

from dataclasses import replace
from functools import lru_cache

from .expression import GREEK, TYPED, plain_text, read_tokens, split
from .names import FUNCTION_NAMES, SHORT_WORDS, fold, has_letters, read_name
from .nodes import (
    ALL_REALS,
    EMPTY,
    Approximated,
    Between,
    Chain,
    Choice,
    Formula,
    Items,
    Named,
    Number,
    Quantity,
    Relation,
    SetOperation,
    Special,
    Words,
)
from .numerals import read_in_base, read_number
from .tokens import Token, Unreadable, closing, is_group, nesting, tokenize
from .units import CURRENCIES, ONE, find_unit, read_unit

# Words that say nothing about the value behind them.
FILLERS = set("exactly precisely about approximately approx roughly around answer final".split())
ARTICLES = {"a", "an", "An", "the", "The"}
CHOICES = set("ABCDEFGHIJ")
BETWEEN_ITEMS = (",", ";", "and", "or", "\\or", "\\and")
RELATIONS = ("=", "<", ">", "\\le", "\\ge", "\\ne", "\\approx", "\\in")
MIRRORED = {">": "<", "\\ge": "\\le", "\\ne": "\\ne"}
WITH_EQUALS = {"<": "\\le", ">": "\\ge", "=": "="}  # x <= 5, as it is typed
NOT_BEHIND_A_CHOICE = (*"+-*/^_'!", "\\cup", "\\cap", *BETWEEN_ITEMS, *RELATIONS)
SPECIAL = ("\\sum", "\\prod", "\\int", "\\lim", "\\iint", "\\oint", "\\bigcup", "\\bmod", "\\pmod")
REALS = ("all real numbers", "all reals", "real numbers", "all real x", "all real values")
DEGREE = find_unit("degree")


def read(text):
    """The node of an answer; None when it says nothing."""
    try:
        tokens = tokenize(text)
    except Unreadable:
        return Words(text.strip())
    if not any(token.text.strip("{}$\\,.;") for token in tokens):
        return EMPTY if [token.text for token in tokens] == ["\\{", "\\}"] else None
    return read_or_keep(tokens)


def read_or_keep(tokens):
    try:
        return read_answer(tokens)
    except Unreadable:
        return Words(" ".join(fold(token.text) for token in tokens if token.text not in "{}"))


def read_answer(tokens):
    node = read_once(tuple(tokens))
    if isinstance(node, Unreadable):
        raise node
    return node


@lru_cache(10_000)  # else brackets within brackets are read twice, and twice, and twice
def read_once(tokens):
    """The node of an answer, or why it is unreadable."""
    try:
        tokens = without_decoration(list(tokens))
        parts = [part for part in split(tokens, *BETWEEN_ITEMS) if part]
        choice = read_choice(tokens)
        if choice is not None:
            return choice
        return read_statement(parts[0]) if len(parts) == 1 else read_list(tokens, parts)
    except Unreadable as error:
        return error


def without_decoration(tokens):
    """Without outer braces, a final stop, and words like exactly or about in front."""
    while tokens:
        first, last = tokens[0].text, tokens[-1].text
        second = tokens[1].text if len(tokens) > 1 else ""
        if last in (".", ",", ";") or (last == ":" and second):
            tokens = tokens[:-1]
        elif first in ("=", ":", ".", "\\approx"):
            tokens = tokens[1:]
        elif first == last == "*":
            tokens = tokens[1:-1]
        elif first == "{" and closing(tokens, 0) == len(tokens) - 1:
            tokens = tokens[1:-1]
        elif first.lower() == "answer" and second == "is":
            tokens = tokens[2:]
        elif (first.lower() in FILLERS and second) or is_article(tokens):
            tokens = tokens[1:]
        else:
            return tokens
    raise Unreadable("nothing is left")


def is_article(tokens):
    """the answer, an ellipse; but not the a of a + b, and not the A of A and B."""
    if tokens[0].text not in ARTICLES or len(tokens) == 1 or tokens[1].text in BETWEEN_ITEMS:
        return False
    return tokens[1].kind == "letters" and len(tokens[1].text) > 2


# ---- Choices ----


def read_choice(tokens):
    """(B), B) 12, B: 12, Option B; None for anything else. A letter alone is a formula."""
    texts = [token.text for token in tokens]
    labelled = texts[0].lower() in ("option", "choice")
    start = int(labelled)
    in_parentheses = texts[start : start + 1] == ["("]
    start += in_parentheses
    letter, mark = (*texts[start : start + 2], "", "")[:2]
    if letter not in CHOICES or (in_parentheses and mark != ")"):
        return None
    rest = tokens[start + 2 :]
    if mark in (")", ":", "."):
        return read_marked_choice(letter, rest) if rest else Choice(letter)
    return Choice(letter) if labelled and not mark else None


def read_marked_choice(letter, rest):
    """(B) 12; but (A)(B), (A) or (B), A: B and (A) + 1 aren't one choice, and B: wrong is none."""
    if rest[0].text in NOT_BEHIND_A_CHOICE or rest[-1].text in ("wrong", "incorrect"):
        return None
    value = read_or_keep(rest)
    for part in value.items if isinstance(value, Items) else (value,):
        if isinstance(part, Choice) or (isinstance(part, Formula) and part.letters):
            return None
    is_factor = rest[0].text == "(" and not isinstance(value, Items)
    return None if is_factor else Choice(letter, value)


# ---- Lists ----


def read_list(tokens, parts):
    """1, 2 and 3. x=3, y=4 is (3, 4); x<1 or x>2 is a union; words stay in their order."""
    nodes = flat([read_or_keep(part) for part in parts])
    names = {node.name: node.value for node in nodes if isinstance(node, Named)}
    either = any(token.text in ("or", "\\or") for token in tokens)
    if len(names) == len(nodes):
        if either:
            raise Unreadable("x = 3 or y = 4 is no pair")
        in_order = sorted(names)
        values = tuple(names[name] for name in in_order)
        return Named("(" + ",".join(in_order) + ")", Items(values, "="))
    if either and all(isinstance(node, Relation | Between) for node in nodes):
        return SetOperation("union", tuple(nodes))
    return Items(tuple(nodes), "()" if any(map(is_label, nodes)) else "")


def is_label(node):
    """Words, choices, and points like A, B, C."""
    if isinstance(node, Formula):
        return node.letters.isupper()
    return isinstance(node, Words | Choice)


def flat(nodes):
    r"""The nodes, and in place of a \pm b two of them."""
    result = []
    for node in nodes:
        result += node.items if is_bare_list(node) else [node]
    return result


def is_bare_list(node):
    return isinstance(node, Items) and node.brackets == ""


def read_group(tokens):
    r"""(1, 2), [1, 2), \{1, 2\}, \{x | x > 1\}; of a single item the item."""
    inside = tokens[1:-1]
    brackets = (tokens[0].text + tokens[-1].text).replace("\\", "")
    if brackets != "{}":
        parts = split(inside, ",", ";")
        if len(parts) == 1:
            return read_answer(inside)
        return Items(tuple(read_or_keep(part) for part in parts), brackets)
    if not inside:
        return EMPTY
    conditions = split(inside, "|", ":")
    if len(conditions) == 2 and all(conditions) and len(split(inside, ",")) == 1:
        return read_answer(conditions[1])
    nodes = flat([read_or_keep(part) for part in split(inside, ",", ";")])
    is_value = isinstance(nodes[0], Number | Formula | Quantity | Words)
    return nodes[0] if len(nodes) == 1 and is_value else Items(tuple(nodes), brackets)


# ---- Equations and inequalities ----


def read_statement(tokens):
    sides, operators = split_relations(tokens)
    if not operators:
        return read_labelled(tokens) or read_value(tokens)
    if not all(sides):
        raise Unreadable("a side is missing")
    if operators == ["\\in"]:
        return Named(read_name(sides[0]) or plain_text(sides[0]), read_value(sides[1]))
    if set(operators) == {"="}:
        return read_equation(sides)
    if operators[-1] == "\\approx" and set(operators[:-1]) <= {"="}:
        return read_approximation(sides)
    return read_inequality(sides, operators)


def read_labelled(tokens):
    """Total cost: 12 has a name; None without one."""
    label = split(tokens, ":")[0]
    is_label = all(token.kind == "letters" and len(token.text) > 1 for token in label)
    if not is_label or not label or len(label) == len(tokens):
        return None
    return (
        Named(read_name(label), read_value(tokens[len(label) + 1 :])) if read_name(label) else None
    )


def split_relations(tokens):
    r"""(sides, operators), by what stands outside of brackets: x <= 5 has the operator \le."""
    sides, operators, depth = [[]], [], 0
    for token in tokens:
        text = token.text
        depth += nesting(token)
        if depth or text not in RELATIONS:
            sides[-1].append(token)
        elif text == "=" and operators and not sides[-1] and operators[-1] in WITH_EQUALS:
            operators[-1] = WITH_EQUALS[operators[-1]]
        elif text == "=" and sides[-1] and sides[-1][-1].text == "!" and not token.spaced:
            raise Unreadable("n! = 5, or n != 5")
        else:
            if sides[-1] and sides[-1][-1].text == ":":  # x := 5
                sides[-1].pop()
            operators.append(text)
            sides.append([])
    return sides, operators


def read_equation(sides):
    """x = 5 and 5 = x are named values, 10/2 = 5 is a chain, x + y = 4 a relation."""
    if len(sides) == 2 and not has_letters(sides[0]) and not read_name(sides[0]):
        if has_letters(sides[1]) or read_name(sides[1]):
            sides = sides[::-1]
    name = read_name(sides[0])
    values = [read_value(side) for side in sides[1:]]
    value = values[0] if len(values) == 1 else Chain(tuple(values))
    if name:
        return Named(name, value, formula_or_nothing(sides[0]))
    left = read_value(sides[0])
    if not has_letters(sides[0]):
        return Chain((left, *values))
    return Relation("=", left, value)


def read_approximation(sides):
    r"""x \approx 3.14 gives x a value; \sqrt2 \approx 1.41 stays \sqrt2."""
    if len(sides) == 2 and read_name(sides[1]) and not read_name(sides[0]):
        sides = sides[::-1]
    decimal = read_value(sides[-1])
    if len(sides) == 2:
        name = read_name(sides[0])
        return Named(name, decimal) if name else approximated(read_value(sides[0]), decimal)
    node = read_equation(sides[:-1])
    if not isinstance(node, Named):
        raise Unreadable("an approximation of an equation")
    return replace(node, value=approximated(node.value, decimal))


def approximated(exact, decimal):
    """Both, with one unit for the two."""
    if not isinstance(decimal, Quantity):
        return Approximated(exact, decimal)
    if isinstance(exact, Quantity):
        if exact.unit != decimal.unit:
            raise Unreadable("two units")
        exact = exact.value
    return Quantity(Approximated(exact, decimal.value), decimal.unit)


def read_inequality(sides, operators):
    """x > 2 is 2 < x; 2 > x > 1 is 1 < x < 2."""
    if operators[0] in MIRRORED:
        sides = sides[::-1]
        operators = [MIRRORED.get(operator, "") for operator in operators[::-1]]
    if not set(operators) <= {"<", "\\le", "\\ne"}:
        raise Unreadable("a chain of different relations")
    values = [read_value(side) for side in sides]
    if len(operators) == 1:
        name = read_name(sides[0]) or read_name(sides[1])
        return Relation(operators[0], *values, name)
    name = read_name(sides[1])
    if len(operators) > 2 or not name or "\\ne" in operators:
        raise Unreadable("a long chain of relations")
    opening = "(" if operators[0] == "<" else "["
    ending = ")" if operators[1] == "<" else "]"
    return Between(name, Items((values[0], values[2]), opening + ending))


# ---- Values ----


def read_value(tokens):
    """What has no comma and no relation outside of brackets."""
    tokens = without_decoration(tokens)
    if is_group(tokens):
        return read_group(tokens)
    if any(token.text in ("\\pm", "\\mp") for token in tokens):
        return Items((read_value(signed(tokens, "+-")), read_value(signed(tokens, "-+"))), "")
    return read_set_operation(tokens) or read_quantity(tokens) or read_plain(tokens)


def signed(tokens, signs):
    r"""The tokens with these signs in place of \pm and \mp."""
    chosen = {"\\pm": Token("mark", signs[0]), "\\mp": Token("mark", signs[1])}
    return [chosen.get(token.text, token) for token in tokens]


def read_set_operation(tokens):
    r"""[1,2] \cup [3,4], \mathbb{R} \setminus \{0\}, \mathbb{R} - \{0\}; None for the rest."""
    if tokens[0].text == "\\mathbbR" and len(tokens) > 2 and tokens[1].text == "-":
        return SetOperation("minus", (ALL_REALS, read_value(tokens[2:])))
    for sign, operator in (("\\cup", "union"), ("\\setminus", "minus")):
        parts = split(tokens, sign)
        if len(parts) > 1 and all(parts):
            return SetOperation(operator, tuple(read_value(part) for part in parts))
    return None


def read_quantity(tokens):
    """A value with a unit behind it, or a currency in front; None without a unit."""
    sign = tokens[:1] if tokens[0].text == "-" else []
    front = tokens[len(sign) :]
    if len(front) > 1 and front[0].text in CURRENCIES:
        return read_price(sign, front)
    for start in range(1, len(tokens)):
        quantity = read_unit_from(tokens, start)
        if quantity is not None:
            return quantity
    return None


def read_price(sign, tokens):
    """$18, -$18, $18 dollars, $18 per hour."""
    currency, value = tokens[0], tokens[1:]
    if len(value) > 2 and value[1].text in ("per", "/") and value[2].kind == "letters":
        return read_quantity([*sign, value[0], currency, *value[1:]])
    unit = find_unit(currency.text)
    named_again = read_quantity(sign + value)
    if named_again is None:
        return Quantity(read_plain(sign + value), unit)
    agrees = isinstance(named_again, Quantity) and named_again.unit == unit
    return named_again if agrees else None


def read_unit_from(tokens, start):
    """The quantity whose unit begins at this token; None if there is none."""
    value, first = tokens[:start], tokens[start]
    if value[-1].text == "*":
        value = value[:-1]
    written_as_variables = first.kind == "letters" and not first.upright
    if not value or not ends_value(value[-1]) or (written_as_variables and has_letters(value)):
        return None
    try:
        unit, ambiguous = read_unit(tokens[start:])
        node = read_plain(value)
    except Unreadable:
        return None
    of_an_angle = unit == DEGREE and any(token.text in FUNCTION_NAMES for token in value)
    if isinstance(node, Words) or of_an_angle:  # \sin 30^\circ is no angle
        return None
    if unit == ONE:
        return node
    quantity = Quantity(node, unit)
    latex = formula_or_nothing(tokens) if ambiguous else ""
    return Formula(latex, quantity=quantity) if latex else quantity


def ends_value(token):
    return token.kind in ("number", "letters") or token.text in (")", "]", "}", "|", "!", "\\pi")


def read_plain(tokens):
    """A value without a unit."""
    tokens = without_decoration(tokens)
    number = read_number(tokens)
    if number is not None:
        return Number(number)
    in_base = read_in_base(tokens)
    if in_base is not None:
        return in_base
    if is_group(tokens):
        return read_group(tokens)
    if [token.text for token in tokens] == ["\\emptyset"]:
        return EMPTY
    if [token.text for token in tokens] == ["\\mathbbR"]:
        return ALL_REALS
    ratio = split(tokens, ":")
    if len(ratio) > 1 and all(ratio):
        return Items(tuple(read_plain(part) for part in ratio), ":")
    if any(token.text in SPECIAL or token.text.startswith("\\begin") for token in tokens):
        return Special(written_again(tokens))
    if all(token.kind == "letters" for token in tokens):
        return read_letters(tokens)
    if any(is_plain_word(token) for token in tokens):
        raise Unreadable("a word within a formula")
    return Formula(read_tokens(tokens))


def is_plain_word(token):
    """A word that stands for itself: four letters or more behind a space."""
    known = token.text in TYPED or token.text in GREEK
    return token.kind == "letters" and token.spaced and len(token.text) > 3 and not known


def read_letters(tokens):
    r"""Words, if they are in \text{...}, have four letters or more, or are in words.txt. Else a
    product, whose case counts: gm is mg and isn't GM. AB stays AB: it may be two points."""
    texts = [token.text for token in tokens]
    text = " ".join(map(fold, texts))
    if text in REALS:
        return ALL_REALS
    if text == "empty set":
        return EMPTY
    upright = any(token.upright for token in tokens)
    product = formula_or_nothing([replace(token, upright=False) for token in tokens])
    if len(text) == 1:
        return Formula(product, letters=text)
    if len(texts) == 1 and (text in TYPED or text in GREEK):
        return Formula(product)
    if upright:
        return Words(text)
    is_words = any(word.lower() in SHORT_WORDS or len(word) > 3 for word in texts)
    if is_words or text.isupper():
        return Words(text, product)
    return Formula(product, letters="".join(texts))


def formula_or_nothing(tokens):
    """The LaTeX of a formula; "" of anything else."""
    try:
        return read_tokens(tokens)
    except Unreadable:
        return ""


def written_again(tokens):
    """Tokens as LaTeX."""
    texts = []
    for token in tokens:
        is_word = token.upright and token.kind == "letters"
        texts.append(f"\\text{{{token.text}}}" if is_word else token.text)
    return " ".join(texts).replace("bmatrix}", "pmatrix}")
