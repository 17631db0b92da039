"""Names that a value may lose, as in f(x) = 2x; and what tells words from variables."""

from pathlib import Path

from .expression import GREEK, TYPED, is_differential, plain_text, split
from .tokens import argument, closing, is_group

SHORT_WORDS = set(Path(__file__).with_name("words.txt").read_text("utf-8").split())
FUNCTION_NAMES = {"\\" + name for name in "sin cos tan cot sec csc log ln max min det".split()}
ACCENTS = ("overline", "vec", "hat", "tilde", "dot", "widehat")
EXPONENTS_OF_NAMES = ("-1", "*", "+", "-")  # f^{-1}, x^*; but x^2 is no name


def fold(word):
    """Words have no case, but variables do: Yes is yes, Bob is bob; Mg isn't mg, nor ABCD abcd."""
    lower = word.lower()
    if lower in SHORT_WORDS or (len(word) == 3 and word.istitle()):
        return lower
    in_one_case = word.islower() or word.isupper() or word.istitle()
    may_be_points = len(word) == 4 and word.isupper()
    return lower if len(word) > 3 and in_one_case and not may_be_points else word


def has_letters(tokens):
    """Whether variables or words occur; \\pi, e, i and functions are none."""
    for token in tokens:
        if token.kind == "letters" and token.text not in TYPED and token.text not in ("e", "i"):
            return True
        if token.kind == "command" and token.text.strip("\\") in GREEK:
            return True
    return False


def read_name(tokens):
    """What these tokens name; "" if they are no name."""
    is_name = is_enclosed_name(tokens) or is_derivative(tokens) or is_function_of_letters(tokens)
    if is_name or is_decorated_letter(tokens):
        return plain_text(tokens)
    if all(token.kind == "letters" and is_word(token) for token in tokens):
        return " ".join(fold(token.text) for token in tokens)
    return ""


def is_word(token):
    """A word, or points like AB; xy is a product."""
    return token.upright or len(token.text) > 3 or token.text.isupper()


def is_enclosed_name(tokens):
    """|AB|, the area [ABC], the pair (x, y), the composition (f \\circ g)(x)."""
    first, last = tokens[0].text, tokens[-1].text
    inside = tokens[1:-1]
    if first == "|" == last or (first == "[" and last == "]"):
        return len(inside) > 0 and all(token.kind == "letters" for token in inside)
    if first != "(":
        return False
    if not is_group(tokens):
        return last == ")" and any(token.text == "\\circ" for token in tokens)
    parts = split(inside, ",")
    return len(parts) > 1 and all(part and read_name(part) for part in parts)


def is_derivative(tokens):
    r"""\frac{dy}{dx}, \frac{\partial f}{\partial x}."""
    if tokens[0].text != "\\frac":
        return False
    above, end = argument(tokens, 1)
    below, end = argument(tokens, end)
    return end == len(tokens) and is_differential(above) and is_differential(below)


def is_function_of_letters(tokens):
    r"""\sin A, \max f, \angle ABC; but \log_2 8 is a number."""
    first = tokens[0].text
    if first.strip("\\") in ("angle", "triangle", "measuredangle"):
        return True
    return first in FUNCTION_NAMES and has_letters(tokens[1:])


def is_decorated_letter(tokens):
    r"""A letter with subscripts, primes, an inverse and arguments: f^{-1}(x), v_{\min}, y'."""
    i = end_of_letter(tokens)
    while 0 < i < len(tokens):
        text = tokens[i].text
        if text == "'":
            i += 1
        elif text == "_":
            i = argument(tokens, i + 1)[1]
        elif text in ("(", "["):
            i = closing(tokens, i) + 1
        elif text == "^":
            exponent, i = argument(tokens, i + 1)
            if plain_text(exponent) not in EXPONENTS_OF_NAMES:
                return False
        else:
            return False
    return i > 0


def end_of_letter(tokens):
    """How many tokens the letter takes that a name begins with; 0 without one."""
    first = tokens[0]
    command = first.text.strip("\\")
    if command in ACCENTS:
        return argument(tokens, 1)[1]
    if first.kind == "letters":
        return 1 if len(first.text) == 1 or first.upright else 0
    return 1 if command in GREEK or command in ("mathbbE", "mathbbP") else 0
