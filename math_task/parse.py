"""An answer becomes a tree of a few kinds of nodes. What can't be read is kept as words."""

from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path

from .expression import GREEK, TYPED, number_value, plain_text, read_tokens, split
from .tokens import OPENING, Token, Unreadable, argument, closing, tokenize
from .units import CURRENCIES, ONE, Unit, find_unit, read_unit


@dataclass(frozen=True)
class Number:
    value: Fraction


@dataclass(frozen=True)
class InBase:  # 52_8
    digits: str
    base: int


@dataclass(frozen=True)
class Formula:
    latex: str  # written for math-verify
    letters: str = field(default="", compare=False)  # of a product without a sign: mg
    quantity: object = field(default=None, compare=False)  # 5N, if its letters are a unit


@dataclass(frozen=True)
class Words:
    text: str
    product: str = field(default="", compare=False)  # LaTeX, if AB may as well be a product


@dataclass(frozen=True)
class Quantity:
    value: object
    unit: Unit


@dataclass(frozen=True)
class Choice:  # (B) 12
    letter: str
    value: object = None


@dataclass(frozen=True)
class Named:  # f(x) = 2x
    name: str
    value: object
    latex: str = field(default="", compare=False)  # of the name, where it is a formula


@dataclass(frozen=True)
class Relation:  # x + y = 4, x < 2; of > and \ge the sides are exchanged
    operator: str
    left: object
    right: object
    name: str = ""  # when the left or right side is nothing but a name


@dataclass(frozen=True)
class Between:  # 1 < x <= 2 is x between ( 1, 2 ]
    name: str
    interval: object


@dataclass(frozen=True)
class Items:
    items: tuple
    brackets: str  # (), [], {}, (], [), "" of a bare list, : of a ratio or a time


@dataclass(frozen=True)
class SetOperation:  # a union, or a difference
    operator: str
    parts: tuple


@dataclass(frozen=True)
class Chain:  # 10/2 = 5
    sides: tuple


@dataclass(frozen=True)
class Approximated:  # \sqrt2 \approx 1.41
    exact: object
    decimal: object


@dataclass(frozen=True)
class Special:  # sums, integrals, matrices: math-verify reads them as they stand
    latex: str


ALL_REALS = SetOperation("reals", ())
EMPTY = Items((), "{}")
SHORT_WORDS = set(Path(__file__).with_name("words.txt").read_text("utf-8").split())
FILLERS = set("exactly precisely about approximately approx roughly around answer final".split())
ARTICLES = {"a", "an", "An", "the", "The"}
LABELS = {"option", "choice"}
LETTERS_OF_CHOICES = set("ABCDEFGHIJ")
BETWEEN_ITEMS = (",", ";", "and", "or", "\\or", "\\and")
RELATIONS = ("=", "<", ">", "\\le", "\\ge", "\\ne", "\\approx")
MIRRORED = {">": "<", "\\ge": "\\le"}
SCALES = {"hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9, "trillion": 10**12}
SCALES |= {"dozen": 12}
NUMERALS = "two three four five six seven eight nine ten eleven twelve".split()
BASES = {word: base for base, word in enumerate(NUMERALS, 2)} | {"sixteen": 16, "binary": 2}
SPECIAL = ("\\sum", "\\prod", "\\int", "\\lim", "\\iint", "\\oint", "\\bigcup", "\\bmod", "\\pmod")
REALS = ("all real numbers", "all reals", "real numbers", "all real x", "all real values")
DEGREE = find_unit("degree")
FUNCTION_NAMES = {"\\" + name for name in "sin cos tan cot sec csc log ln max min det".split()}


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


def fold(word):
    """Words have no case, but variables do: Yes is yes, Bob is bob, and Mg isn't mg."""
    lower = word.lower()
    if lower in SHORT_WORDS or (len(word) == 3 and word.istitle()):
        return lower
    mixed = not (word.islower() or word.isupper() or word.istitle())
    may_be_points = len(word) == 4 and word.isupper()
    return word if len(word) < 4 or mixed or may_be_points else lower


def read_answer(tokens):
    tokens = without_decoration(tokens)
    choice = read_choice(tokens)
    if choice is not None:
        return choice
    parts = [part for part in split(tokens, *BETWEEN_ITEMS) if part]
    if len(parts) == 1:
        return read_statement(parts[0])
    return read_list(tokens, parts)


def without_decoration(tokens):
    """Without outer braces, a final stop, and words like exactly or about in front."""
    while tokens:
        first, last = tokens[0], tokens[-1]
        if last.text in (".", ",", ";") or (last.text == ":" and len(tokens) > 1):
            tokens = tokens[:-1]
        elif first.text in ("=", ":", "\\approx", "."):
            tokens = tokens[1:]
        elif first.text == "*" == last.text:
            tokens = tokens[1:-1]
        elif first.text == "{" and closing(tokens, 0) == len(tokens) - 1:
            tokens = tokens[1:-1]
        elif [token.text.lower() for token in tokens[:2]] == ["answer", "is"]:
            tokens = tokens[2:]
        elif first.text.lower() in FILLERS and len(tokens) > 1:
            tokens = tokens[1:]
        elif is_article(tokens):
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
    rest = tokens
    labelled = rest[0].text.lower() in LABELS
    if labelled:
        rest = rest[1:]
    in_parentheses = bool(rest) and rest[0].text == "("
    if in_parentheses:
        rest = rest[1:]
    if not rest or rest[0].text not in LETTERS_OF_CHOICES:
        return None
    letter, rest = rest[0].text, rest[1:]
    marked = bool(rest) and rest[0].text in (")", ":", ".")
    if marked:
        if in_parentheses != (rest[0].text == ")") and rest[0].text != ")":
            return None
        rest = rest[1:]
    elif in_parentheses:
        return None
    if not rest:
        return Choice(letter) if labelled or marked else None
    return read_choice_with_value(letter, rest) if marked else None


def read_choice_with_value(letter, rest):
    """(B) 12; but (A)(B), (A) or (B) and (A) + 1 aren't one choice."""
    if rest[0].text in (
        "+",
        "-",
        "*",
        "/",
        "^",
        "_",
        "'",
        "!",
        "(",
        "\\cup",
        "\\cap",
        *BETWEEN_ITEMS,
    ):
        return None
    if rest[0].text in RELATIONS:
        return None
    value = read_or_keep(rest)
    parts = value.items if isinstance(value, Items) else (value,)
    for part in parts:
        if isinstance(part, Choice) or (isinstance(part, Formula) and part.letters):
            return None
        if isinstance(part, Words) and not part.text.isalpha() and " " not in part.text:
            return None
    return Choice(letter, value)


# ---- Lists ----


def read_list(tokens, parts):
    """1, 2 and 3. x=3, y=4 is (3, 4); x<1 or x>2 is a union; words stay in their order."""
    nodes = flat([read_or_keep(part) for part in parts])
    names = [node.name for node in nodes if isinstance(node, Named)]
    if len(names) == len(nodes) and len(set(names)) == len(names):
        pairs = sorted(zip(names, nodes, strict=True), key=lambda pair: pair[0])
        together = "(" + ",".join(sorted(names)) + ")"
        return Named(together, Items(tuple(node.value for _, node in pairs), "="))
    either = any(token.text in ("or", "\\or") for token in tokens)
    if either and all(isinstance(node, Relation | Between) for node in nodes):
        return SetOperation("union", tuple(nodes))
    in_order = any(is_word(node) for node in nodes)
    return Items(tuple(nodes), "()" if in_order else "")


def is_word(node):
    """Words, choices, and points like A, B, C."""
    return isinstance(node, Words | Choice) or (
        isinstance(node, Formula) and node.letters.isupper()
    )


def read_group(tokens):
    """(1, 2), [1, 2), \\{1, 2\\}, \\{x | x > 1\\}; of a single item the item."""
    opening, inside = tokens[0].text, tokens[1:-1]
    brackets = opening.strip("\\") + tokens[-1].text.strip("\\")
    if not inside and brackets == "{}":
        return EMPTY
    if brackets == "{}":
        conditions = split(inside, "|", ":")
        if len(conditions) == 2 and len(inside) > 3 and conditions[0]:
            return read_answer(conditions[1])
    parts = split(inside, ",", ";")
    if len(parts) == 1:
        node = read_answer(inside)
        is_value = isinstance(node, Number | Formula | Quantity | Words)
        return node if is_value or brackets != "{}" or is_several(node) else Items((node,), "{}")
    nodes = [read_or_keep(part) for part in parts]
    return Items(tuple(flat(nodes) if brackets == "{}" else nodes), brackets)


def flat(nodes):
    """The nodes, and in place of a \\pm b two of them."""
    result = []
    for node in nodes:
        result += node.items if is_several(node) else [node]
    return result


def is_several(node):
    return isinstance(node, Items) and node.brackets == ""


def is_group(tokens):
    return tokens[0].text in ("(", "[", "\\{") and closing(tokens, 0) == len(tokens) - 1


# ---- Equations and inequalities ----


def split_relations(tokens):
    """(sides, operators): x <= 5 has the operator \\le."""
    sides, operators, depth = [[]], [], 0
    for token in tokens:
        depth += (token.text in OPENING) - (token.text in OPENING.values())
        if depth or token.text not in (*RELATIONS, "\\in"):
            sides[-1].append(token)
        elif token.text == "=" and operators and not sides[-1] and operators[-1] in "<>=":
            operators[-1] = {"<": "\\le", ">": "\\ge", "=": "="}[operators[-1]]
        elif token.text == "=" and sides[-1] and sides[-1][-1].text == "!" and not token.spaced:
            raise Unreadable("n! = 5, or n != 5")
        else:
            operators.append(token.text)
            sides.append([])
    return sides, operators


def read_statement(tokens):
    sides, operators = split_relations(tokens)
    if not operators:
        return read_value(tokens)
    if not all(sides):
        raise Unreadable("a side is missing")
    if operators == ["\\in"]:
        return Named(read_name(sides[0]) or plain_text(sides[0]), read_value(sides[1]))
    if set(operators) == {"="}:
        return read_equation(sides)
    if operators[-1] == "\\approx" and set(operators[:-1]) <= {"="}:
        return read_approximation(sides)
    return read_inequality(sides, operators)


def read_equation(sides):
    if len(sides) == 2 and read_name(sides[1]) and not read_name(sides[0]):
        if isinstance(read_or_keep(sides[0]), Number | Quantity):
            sides = sides[::-1]
    values = [read_value(side) for side in sides[1:]]
    value = values[0] if len(values) == 1 else Chain(tuple(values))
    if len(sides) == 2 and has_letters(sides[1]) and not has_letters(sides[0]):
        return Relation("=", read_value(sides[1]), read_value(sides[0]))
    name = read_name(sides[0])
    if name:
        return Named(name, value, formula_or_nothing(sides[0]))
    left = read_value(sides[0])
    if not has_letters(sides[0]):
        return Chain((left, *values))
    return Relation("=", left, value)


def read_approximation(sides):
    """x \\approx 3.14 gives x a value; \\sqrt2 \\approx 1.41 stays \\sqrt2."""
    if len(sides) == 2 and read_name(sides[1]) and not read_name(sides[0]):
        sides = sides[::-1]
    decimal = read_value(sides[-1])
    if len(sides) == 2 and not read_name(sides[0]):
        return approximated(read_value(sides[0]), decimal)
    if len(sides) == 2:
        return Named(read_name(sides[0]), decimal)
    node = read_equation(sides[:-1])
    if isinstance(node, Named):
        return replace(node, value=Approximated(node.value, decimal))
    raise Unreadable("an approximation of an equation")


def approximated(exact, decimal):
    """The unit, where there is one, belongs to both."""
    if not isinstance(decimal, Quantity):
        return Approximated(exact, decimal)
    if isinstance(exact, Quantity) and exact.unit != decimal.unit:
        raise Unreadable("two units")
    value = exact.value if isinstance(exact, Quantity) else exact
    return Quantity(Approximated(value, decimal.value), decimal.unit)


def read_inequality(sides, operators):
    """x > 2 is 2 < x; 2 > x > 1 is 1 < x < 2."""
    if operators[0] in MIRRORED:
        sides = sides[::-1]
        operators = [MIRRORED.get(operator, "?") for operator in operators[::-1]]
    values = [read_value(side) for side in sides]
    if len(operators) == 1:
        name = read_name(sides[0]) or read_name(sides[1]) or ""
        return Relation(operators[0], *values, name)
    name = read_name(sides[1])
    if len(operators) == 2 and name and set(operators) <= {"<", "\\le"}:
        opening = "(" if operators[0] == "<" else "["
        closing_bracket = ")" if operators[1] == "<" else "]"
        return Between(name, Items((values[0], values[2]), opening + closing_bracket))
    raise Unreadable("a chain of relations")


def read_name(tokens):
    """The name that a value may lose: x, f^{-1}(x), \\frac{dy}{dx}, a_{n+1}, |AB|, (x, y), Area.
    "" for everything else."""
    texts = [token.text for token in tokens]
    if texts[0] == "|" == texts[-1] and all(token.kind == "letters" for token in tokens[1:-1]):
        return plain_text(tokens) if len(tokens) > 2 else ""
    if texts[0] == "(" and closing(tokens, 0) == len(tokens) - 1:
        parts = split(tokens[1:-1], ",")
        named = len(parts) > 1 and all(part and read_name(part) for part in parts)
        return "(" + ",".join(map(plain_text, parts)) + ")" if named else ""
    if texts[0] == "\\frac" and is_derivative(tokens):
        return plain_text(tokens)
    if texts[0].strip("\\") in ("angle", "triangle", "measuredangle"):
        return plain_text(tokens)
    if texts[0] in FUNCTION_NAMES and len(tokens) > 1:
        return plain_text(tokens) if has_letters(tokens) else ""
    if texts[0] == "(" and "\\circ" in texts and texts[-1] == ")":
        return plain_text(tokens)
    if texts[0] == "[" and texts[-1] == "]":
        return plain_text(tokens) if tokens[1].kind == "letters" and len(tokens) == 3 else ""
    if all(token.kind == "letters" and is_name_word(token) for token in tokens):
        return " ".join(fold(text) for text in texts)
    return plain_text(tokens) if is_decorated_letter(tokens) else ""


def is_name_word(token):
    """A word, or points like AB; xy is a product."""
    return token.upright or len(token.text) > 3 or token.text.isupper()


def is_derivative(tokens):
    above, end = argument(tokens, 1)
    below, end = argument(tokens, end)
    starts = [part[0].text[:1] for part in (above, below) if part]
    return end == len(tokens) and starts in (["d", "d"], ["\\", "\\"]) and len(below) > 0


def is_decorated_letter(tokens):
    """A letter with subscripts, primes, an inverse and arguments: f^{-1}(x), v_{\\min}, y'."""
    first, i = tokens[0], 1
    if first.text.strip("\\") in ("overline", "vec", "hat", "bar", "tilde", "dot", "widehat"):
        _, i = argument(tokens, 1)
    elif first.kind == "letters":
        if len(first.text) > 1 and not first.upright:
            return False
    elif first.text.strip("\\") not in (*GREEK, "mathbbE", "mathbbP"):
        return False
    while i < len(tokens):
        text = tokens[i].text
        if text == "'":
            i += 1
        elif text == "_":
            _, i = argument(tokens, i + 1)
        elif text == "^":
            exponent, i = argument(tokens, i + 1)
            if plain_text(exponent) not in ("-1", "'", "''", "*", "+", "-", "prime", "circ"):
                return False
        elif text in ("(", "["):
            i = closing(tokens, i) + 1
        else:
            return False
    return True


def formula_or_nothing(tokens):
    try:
        return read_tokens(tokens)
    except Unreadable:
        return ""


def has_letters(tokens):
    """Whether variables or words occur; \\pi and functions are none."""
    for token in tokens:
        if token.kind == "letters" and token.text not in TYPED and token.text not in ("e", "i"):
            return True
        if token.kind == "command" and token.text.strip("\\") in GREEK:
            return True
    return False


# ---- Values ----


def read_value(tokens):
    """What has no comma and no relation outside of brackets."""
    tokens = without_decoration(tokens)
    if is_group(tokens):
        return read_group(tokens)
    for sign in ("\\cup", "\\setminus"):
        parts = split(tokens, sign)
        if len(parts) > 1 and all(parts):
            operator = "union" if sign == "\\cup" else "minus"
            return SetOperation(operator, tuple(read_value(part) for part in parts))
    if tokens[0].text == "\\mathbbR" and len(tokens) > 2 and tokens[1].text == "-":
        return SetOperation("minus", (ALL_REALS, read_value(tokens[2:])))
    if any(token.text in ("\\pm", "\\mp") for token in tokens):
        return Items((read_value(signed(tokens, "+-")), read_value(signed(tokens, "-+"))), "")
    return read_quantity(tokens) or read_plain(tokens)


def signed(tokens, signs):
    """The tokens with these signs in place of \\pm and \\mp."""
    chosen = {"\\pm": Token("mark", signs[0]), "\\mp": Token("mark", signs[1])}
    return [chosen.get(token.text, token) for token in tokens]


def read_quantity(tokens):
    """A value with a unit behind it, or a currency in front; None without a unit."""
    negative = tokens[:1] if tokens[0].text == "-" else []
    front = tokens[len(negative) :]
    if len(front) > 1 and front[0].text in CURRENCIES:
        rest = negative + front[1:]
        unit = find_unit(front[0].text)
        if len(front) > 3 and front[2].text in ("per", "/") and not front[3].text.isdigit():
            return read_quantity([*negative, front[1], front[0], *front[2:]])
        behind = read_quantity(rest)
        if behind is None:
            return Quantity(read_plain(rest), unit)
        return behind if isinstance(behind, Quantity) and behind.unit == unit else None
    for cut in range(1, len(tokens)):
        node = read_cut(tokens, cut)
        if node is not None:
            return node
    return None


def read_cut(tokens, cut):
    """The quantity whose unit begins at this token, or None."""
    first, before = tokens[cut], tokens[cut - 1]
    behind_value = before.kind == "number" or before.text in (")", "}", "]", "*", "|", "!", "\\pi")
    behind_value = behind_value or before.kind == "letters"
    may_begin = first.kind == "letters" or find_unit(first.text.strip("\\")) is not None
    may_begin = may_begin or first.text in ("(", "\\frac", "\\mu", "\\Omega")
    if not behind_value or not may_begin:
        return None
    value = tokens[:cut] if before.text != "*" else tokens[: cut - 1]
    try:
        unit, ambiguous = read_unit(tokens[cut:])
        node = read_plain(value)
    except Unreadable:
        return None
    if isinstance(node, Words) or (unit == DEGREE and FUNCTION_NAMES & {x.text for x in value}):
        return None  # \sin 30^\circ is no angle
    written_as_variables = not first.upright and first.kind == "letters"
    if written_as_variables and has_letters(value):
        return None
    if unit == ONE:
        return node
    quantity = Quantity(node, unit)
    latex = formula_or_nothing(tokens) if ambiguous else ""
    return Formula(latex, quantity=quantity) if latex else quantity


def read_plain(tokens):
    """A value without a unit."""
    if not tokens:
        raise Unreadable("nothing")
    tokens = without_decoration(tokens)
    node = read_in_base(tokens)
    if node is not None:
        return node
    value = read_number(tokens)
    if value is not None:
        return Number(value)
    if is_group(tokens):
        return read_group(tokens)
    if len(tokens) == 1 and tokens[0].text == "\\emptyset":
        return EMPTY
    if len(tokens) == 1 and tokens[0].text == "\\mathbbR":
        return ALL_REALS
    parts = split(tokens, ":")
    if len(parts) > 1 and all(parts):
        return Items(tuple(read_plain(part) for part in parts), ":")
    if any(token.text in SPECIAL or token.text.startswith("\\begin") for token in tokens):
        return Special(written(tokens))
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
    """Words: upright, of four letters or more, or in words.txt. Else a product, whose case counts:
    gm is mg and isn't GM. AB stays AB: it may be two points."""
    texts = [token.text for token in tokens]
    text = " ".join(map(fold, texts))
    if text in REALS:
        return ALL_REALS
    if text == "empty set":
        return EMPTY
    latex = formula_or_nothing([replace(token, upright=False) for token in tokens])
    is_letter = len(texts) == 1 and len(texts[0]) == 1
    if any(text.lower() in SHORT_WORDS or len(text) > 3 for text in texts):
        known = len(texts) == 1 and (texts[0] in TYPED or texts[0] in GREEK)
        return Formula(latex) if known else Words(text, "" if tokens[0].upright else latex)
    if any(token.upright for token in tokens) and not is_letter:
        return Words(text)
    if text.isupper() and len(text) > 1:
        return Words(text, latex)
    return Formula(latex, letters="".join(texts))


def written(tokens):
    """Tokens as LaTeX again."""
    texts = []
    for token in tokens:
        word = token.upright and token.kind == "letters"
        texts.append(f"\\text{{{token.text}}}" if word else token.text)
    return " ".join(texts).replace("bmatrix}", "pmatrix}")


# ---- Numbers ----


def read_number(tokens):
    """The exact value of 12, -3/4, 2\\frac{1}{2}, 1.2 \\times 10^5, 3 million; None for the rest."""
    sign = 1
    while tokens and tokens[0].text in ("+", "-"):
        sign = -sign if tokens[0].text == "-" else sign
        tokens = tokens[1:]
    if len(tokens) > 4 and tokens[0].text == "Fraction" and is_group(tokens[1:]):
        tokens = [Token("mark", "/") if x.text == "," else x for x in tokens[2:-1]]
    scale = 1
    while len(tokens) > 1 and tokens[-1].text.lower() in SCALES:
        scale *= SCALES[tokens[-1].text.lower()]
        tokens = tokens[:-1]
    value = read_unsigned(tokens)
    return None if value is None else sign * scale * value


def read_unsigned(tokens):
    if not tokens:
        return None
    if len(tokens) == 1:
        return number_value(tokens[0].text) if tokens[0].kind == "number" else None
    value = read_fraction(tokens)
    if value is None and tokens[0].text.isdigit():
        fraction = read_fraction(tokens[1:])
        if fraction is not None and 0 <= fraction < 1:
            value = int(tokens[0].text) + fraction
    return read_scientific(tokens) if value is None else value


def read_fraction(tokens):
    """\\frac{1}{2}, 1/2, also with signs and decimals in it."""
    if not tokens:
        return None
    if tokens[0].text == "\\frac":
        above, end = argument(tokens, 1)
        below, end = argument(tokens, end)
        if end != len(tokens):
            return None
    else:
        parts = split(tokens, "/")
        if len(parts) != 2:
            return None
        above, below = parts
    numerator, denominator = read_simple(above), read_simple(below)
    if numerator is None or not denominator:
        return None
    return numerator / denominator


def read_simple(tokens):
    """A numeral with a sign."""
    sign = 1
    if tokens and tokens[0].text == "-":
        sign, tokens = -1, tokens[1:]
    if len(tokens) != 1 or tokens[0].kind != "number":
        return None
    return sign * number_value(tokens[0].text)


def read_scientific(tokens):
    """1.2 * 10^5, 10^{-3}."""
    texts = [token.text for token in tokens]
    if texts[1:4] == ["*", "10", "^"]:
        start, exponent = read_simple(tokens[:1]), tokens[4:]
    elif texts[:2] == ["10", "^"]:
        start, exponent = Fraction(1), tokens[2:]
    else:
        return None
    if exponent and exponent[0].text == "{" and closing(exponent, 0) == len(exponent) - 1:
        exponent = exponent[1:-1]
    power = read_simple(exponent)
    if start is None or power is None or power.denominator != 1 or abs(power) > 999:
        return None
    return start * Fraction(10) ** int(power)


def read_in_base(tokens):
    """52_8, (52)_8, 2B_{16}, 52_{\\text{eight}}, 52 base 8; None for the rest, as a_2."""
    texts = [token.text for token in tokens]
    if "_" in texts:
        i = texts.index("_")
        base, end = argument(tokens, i + 1)
    elif "base" in texts:
        tokens = [token for token in tokens if token.text not in ("(", ")", "in")]
        texts = [token.text for token in tokens]
        i = texts.index("base")
        base, end = tokens[i + 1 :], len(tokens)
    else:
        return None
    digits = tokens[:i]
    if digits and is_group(digits):
        digits = digits[1:-1]
    text, number = plain_text(digits), plain_text(base).strip("()")
    number = BASES.get(number) or (int(number) if number.isascii() and number.isdigit() else 0)
    has_digit = text[:1].isdigit() or (number == 16 and text.isupper())
    if end != len(tokens) or not has_digit or not text.isalnum() or not 2 <= number <= 36:
        return None
    return InBase(text.lstrip("0") or "0", number)
