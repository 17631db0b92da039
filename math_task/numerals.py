"""Numbers with an exact value, in all the ways in which people write them."""

from fractions import Fraction

from .expression import number_value, plain_text, split
from .nodes import InBase
from .tokens import Token, argument, is_group, without_braces

SCALES = {"hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9, "trillion": 10**12}
SCALES |= {"dozen": 12}
NUMERALS = "two three four five six seven eight nine ten eleven twelve".split()
BASES = {word: base for base, word in enumerate(NUMERALS, 2)} | {"sixteen": 16}
MAX_EXPONENT = 999  # of ten


def read_number(tokens):
    r"""The exact value of 12, -3/4, 2\frac{1}{2}, 1.2 \times 10^5, 3 million; None for the rest."""
    sign = 1
    while tokens and tokens[0].text in ("+", "-"):
        sign = -sign if tokens[0].text == "-" else sign
        tokens = tokens[1:]
    if len(tokens) > 4 and tokens[0].text == "Fraction" and is_group(tokens[1:]):
        tokens = [Token("mark", "/") if x.text == "," else x for x in tokens[2:-1]]
    while len(tokens) > 1 and tokens[-1].text.lower() in SCALES:
        sign *= SCALES[tokens[-1].text.lower()]
        tokens = tokens[:-1]
    for read in (read_numeral, read_fraction, read_mixed_number, read_scientific):
        value = read(tokens) if tokens else None
        if value is not None:
            return sign * value
    return None


def read_numeral(tokens):
    """12, .5, -3."""
    sign = 1
    if tokens[0].text == "-":
        sign, tokens = -1, tokens[1:]
    if len(tokens) != 1 or tokens[0].kind != "number":
        return None
    return sign * number_value(tokens[0].text)


def read_fraction(tokens):
    r"""\frac{1}{2}, 1/2, also with signs and decimals in it."""
    if tokens[0].text == "\\frac":
        above, end = argument(tokens, 1)
        below, end = argument(tokens, end)
        parts = [above, below] if end == len(tokens) else []
    else:
        parts = split(tokens, "/")
    if len(parts) != 2 or not all(parts):
        return None
    numerator, denominator = map(read_numeral, parts)
    if numerator is None or not denominator:
        return None
    return numerator / denominator


def read_mixed_number(tokens):
    r"""2\frac{1}{2}, 2 1/2."""
    if not tokens[0].text.isdigit() or len(tokens) < 2:
        return None
    fraction = read_fraction(tokens[1:])
    if fraction is None or not 0 <= fraction < 1:
        return None
    return int(tokens[0].text) + fraction


def read_scientific(tokens):
    """1.2 * 10^5, 10^{-3}."""
    texts = [token.text for token in tokens]
    if texts[1:4] == ["*", "10", "^"]:
        start, exponent = read_numeral(tokens[:1]), without_braces(tokens[4:])
    elif texts[:2] == ["10", "^"]:
        start, exponent = Fraction(1), without_braces(tokens[2:])
    else:
        return None
    power = read_numeral(exponent) if exponent else None
    if start is None or power is None or power.denominator != 1 or abs(power) > MAX_EXPONENT:
        return None
    return start * Fraction(10) ** int(power)


def read_in_base(tokens):
    r"""52_8, (52)_8, 2B_{16}, 52_{\text{eight}}, 52 base 8; None for the rest, as a_2."""
    if any(token.text == "base" for token in tokens):
        tokens = [token for token in tokens if token.text not in ("(", ")", "in")]
        parts = split(tokens, "base")
    elif any(token.text == "_" for token in tokens):
        parts = split(tokens, "_")
    else:
        return None
    if len(parts) != 2:
        return None
    digits, base = parts
    if digits and is_group(digits):
        digits = digits[1:-1]
    text, number = plain_text(digits), plain_text(base).strip("()")
    number = BASES.get(number, number)
    if not (str(number).isascii() and str(number).isdigit()):
        return None
    number = int(number)
    has_digits = text[:1].isdigit() or (number == 16 and text.isupper())
    if not has_digits or not text.isalnum() or not 2 <= number <= 36:
        return None
    return InBase(text.lstrip("0") or "0", number)
