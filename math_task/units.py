"""What an amount is measured in: 5 km is 5000 m, mW is not MW, and an apple is no pear.

A unit is a factor and powers of base units, so that two of them convert when the powers agree.
Nothing is a unit that units.txt doesn't name: 5 millions, 5 squared and 5 below are not 5.
"""

from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from .tokens import Unreadable, argument, closing

POWER_WORDS = {"square": 2, "sq": 2, "cubic": 3, "cu": 3}
POWERS_BEHIND = {"squared": 2, "cubed": 3}
CURRENCIES = ("$", "€", "£", "¥", "₹", "USD", "EUR", "GBP", "Rs")
SCALES = {"K", "B", "T"}  # kelvin, bytes and tesla, or thousands, billions and trillions
JOINED = ("degree", "degrees", "per", "mu", "a", "A", "p", "P")  # with what follows: per cent, p.m


@dataclass(frozen=True)
class Unit:
    factor: Fraction
    powers: tuple  # of (base unit, exponent), sorted

    def times(self, other, exponent=1):
        powers = dict(self.powers)
        for base, power in other.powers:
            powers[base] = powers.get(base, 0) + power * exponent
        kept = tuple(sorted((base, power) for base, power in powers.items() if power))
        return Unit(self.factor * other.factor**exponent, kept)


ONE = Unit(Fraction(1), ())


def base_unit(name):
    return Unit(Fraction(1), ((name, 1),))


def read_definition(text):
    """'1/1000 m^3' or 'kg*m/s^2' as a Unit."""
    unit = ONE
    words = text.split()
    if words[0][0].isdigit():
        above, _, below = words.pop(0).partition("/")
        unit = Unit(Fraction(above) / Fraction(below or 1), ())
    for term in "".join(words).replace("*", " *").replace("/", " /").split():
        base, _, exponent = term.strip("*/").partition("^")
        if base != "1":
            power = int(exponent or 1)
            unit = unit.times(base_unit(base), -power if term[0] == "/" else power)
    return unit


def read_file():
    """The five tables of units.txt, each as a list of lines."""
    text = Path(__file__).with_name("units.txt").read_text("utf-8")
    blocks = [block.splitlines() for block in text.split("\n\n")]
    return [block for block in blocks if not block[0].startswith("#")]


MEASURES, THINGS, PREFIXES, ADJECTIVES, AMBIGUOUS = read_file()
THINGS = set(" ".join(THINGS).split())
ADJECTIVES = set(" ".join(ADJECTIVES).split())
AMBIGUOUS = set(" ".join(AMBIGUOUS).split())


def prefixes(kind):
    """Each prefix with its factor; without a prefix it is 1."""
    result = {"": Fraction(1)}
    for line in PREFIXES:
        symbol, word, exponent = line.split()
        if kind in ("SI", "WORDS"):
            result[symbol if kind == "SI" else word] = Fraction(10) ** int(exponent)
    return result


def read_units():
    """Every spelling of units.txt with its Unit."""
    units = {thing: base_unit(thing) for thing in THINGS}
    for line in MEASURES:
        definition, _, spellings = line.partition(" : ")
        unit, kind = read_definition(definition), ";"
        for word in spellings.replace(";", " ;").split():
            if word in ("SI", "WORDS", ";"):
                kind = word
                continue
            for prefix, factor in prefixes(kind).items():
                units.setdefault(prefix + word, Unit(unit.factor * factor, unit.powers))
    return units


UNITS = read_units()


def find_unit(word):
    """The Unit of a word, its plural understood, or None."""
    for spelling in (word, word.lower() if len(word) > 3 else word):
        for form in (spelling, *singulars(spelling)):
            if form in UNITS:
                return UNITS[form]
    return None


def singulars(word):
    """apples: apple, boxes: box, babies: baby; but tenths is no tent."""
    if len(word) < 4 or not word.endswith("s"):
        return []
    if word.endswith("ies"):
        return [word[:-1], word[:-3] + "y"]
    if word.endswith(("ses", "xes", "zes", "ches", "shes", "oes")):
        return [word[:-1], word[:-2]]
    return [word[:-1]]


class UnitReader:
    """Reads kg * m / s ^ 2, square feet, miles per hour; Unreadable for anything else."""

    def __init__(self, tokens):
        self.tokens = tokens
        self.position = 0
        self.spellings = 0  # how many were read
        self.certain = 0  # how many of these can be nothing but a unit

    def peek(self):
        return self.tokens[self.position].text if self.position < len(self.tokens) else ""

    def skip(self, *texts):
        """Whether one of these comes next; if so it is read."""
        found = self.position < len(self.tokens) and self.peek() in texts
        self.position += found
        return found

    def read(self):
        while self.position + 1 < len(self.tokens) and self.skip(*ADJECTIVES):
            pass
        unit, last, divide = self.powered(), self.position - 1, False
        while self.position < len(self.tokens):
            divide = self.skip("/", "per")
            side_by_side = not divide and not self.skip("*", "-")
            if side_by_side and (self.is_thing(last) or self.is_thing(self.position)):
                raise Unreadable("two things side by side")
            unit = unit.times(self.powered(), -1 if divide else 1)
            last = self.position - 1
        return unit

    def is_thing(self, index):
        """Things are counted alone, while kg m is a product: 4 units digit is no amount."""
        unit = find_unit(self.tokens[index].text)
        return unit == ONE or (unit is not None and unit.powers[0][0] in THINGS)

    def powered(self):
        """A unit with an exponent, or a word for one: cm^2, square feet, cm cubed."""
        power = 1
        if self.peek() in POWER_WORDS and self.position + 1 < len(self.tokens):
            power = POWER_WORDS[self.peek()]
            self.position += 1
            self.skip(".")
        unit = self.single()
        self.skip(".")
        self.skip("old")  # years old
        if self.peek() in POWERS_BEHIND:
            power *= POWERS_BEHIND[self.peek()]
            self.position += 1
        elif self.skip("^"):
            exponent, self.position = argument(self.tokens, self.position)
            digits = "".join(token.text for token in exponent)
            if digits.lstrip("-") not in ("1", "2", "3", "4"):
                raise Unreadable(f"{digits} is no power of a unit")
            power *= int(digits)
        return ONE.times(unit, power)

    def single(self):
        """A unit alone, or one in brackets, or a fraction."""
        if self.position == len(self.tokens):
            raise Unreadable("a unit is missing")
        if self.peek() in ("(", "{"):
            end = closing(self.tokens, self.position)
            return self.inside(self.tokens[self.position + 1 : end], end + 1)
        if self.peek() == "\\frac":
            above, end = argument(self.tokens, self.position + 1)
            below, after = argument(self.tokens, end)
            return self.inside(above, end).times(self.inside(below, after), -1)
        token = self.tokens[self.position]
        spelling = self.spelling()
        unit = find_unit(spelling)
        if unit is None:
            raise Unreadable(f"{spelling} is no unit")
        self.spellings += 1
        self.certain += is_certain(token, spelling)
        return unit

    def inside(self, tokens, end):
        reader = UnitReader(tokens)
        unit = reader.read()
        self.spellings += reader.spellings
        self.certain += reader.certain
        self.position = end
        return unit

    def spelling(self):
        """What units.txt may have, of one to three tokens: km, degrees Celsius, p.m, kΩ."""
        texts = [token.text.strip("\\") for token in self.tokens[self.position :][:3]]
        joins = texts[0] in JOINED or texts[1:2] == ["Omega"]
        for length in (3, 2):
            together = "".join(texts[:length])
            if joins and length <= len(texts) and together in UNITS:
                self.position += length
                return together
        self.position += 1
        return texts[0]


def is_certain(token, spelling):
    """Upright letters are a unit, but 9K may be thousands; others may be variables."""
    if token.upright:
        return token.spaced or spelling not in SCALES
    may_be_variables = spelling in AMBIGUOUS or (len(spelling) == 1 and spelling.isascii())
    return not may_be_variables or not spelling.isalpha()


def read_unit(tokens):
    """(unit, whether its letters may be variables)."""
    reader = UnitReader(tokens)
    unit = reader.read()
    return unit, reader.certain == 0 and reader.spellings == 1
