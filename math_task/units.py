"""What an amount is measured in: 5 km is 5000 m, mW is not MW, and an apple is no pear.

A unit is a factor and powers of base units, so that two of them convert when the powers agree.
Nothing is a unit that units.txt doesn't name: 5 millions, 5 squared and 5 below are not 5.
"""

from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from .tokens import Unreadable, argument, closing

PREFIXES = {"k": 3, "c": -2, "m": -3, "d": -1, "h": 2, "u": -6, "mu": -6, "n": -9}
PREFIXES |= {"M": 6, "G": 9, "T": 12}
PREFIX_WORDS = {"kilo": 3, "centi": -2, "milli": -3, "deci": -1, "micro": -6, "nano": -9}
PREFIX_WORDS |= {"mega": 6, "giga": 9, "tera": 12, "hecto": 2}
POWER_WORDS = {"square": 2, "sq": 2, "cubic": 3, "cu": 3}
# What may stand before a thing: 3 different ways, 5 red balls.
ADJECTIVES = set("different distinct possible unique real positive whole red blue green".split())
ADJECTIVES |= set("white black yellow full such correct".split())
POWERS_BEHIND = {"squared": 2, "cubed": 3}
CURRENCIES = ("$", "€", "£", "¥", "₹", "USD", "EUR", "GBP", "Rs")
# Letters that are as likely variables: without \text{} they are units only if the other answer has
# that unit, too.
AMBIGUOUS = {"mg", "ms", "gm", "pm", "am", "mo", "cal", "as", "ha", "in", "pt", "mi", "set", "bit"}


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


def spellings(unit, text):
    """(spelling, unit) for each spelling of a line, with the prefixes it takes."""
    prefixes = {"": 0}
    for word in text.replace(";", " NONE").split():
        if word in ("SI", "WORDS", "NONE"):
            prefixes = {"SI": PREFIXES, "WORDS": PREFIX_WORDS, "NONE": {}}[word] | {"": 0}
            continue
        for prefix, exponent in prefixes.items():
            yield prefix + word, Unit(unit.factor * Fraction(10) ** exponent, unit.powers)


def read_units():
    """Every spelling of units.txt with its Unit."""
    file = Path(__file__).with_name("units.txt").read_text("utf-8")
    _, measures, _, things = file.split("\n\n")
    units = {thing: base_unit(thing) for thing in things.split()}
    for line in measures.splitlines():
        definition, _, text = line.partition(" : ")
        for spelling, unit in spellings(read_definition(definition), text):
            units.setdefault(spelling, unit)
    return units


UNITS = read_units()
THINGS = {unit.powers[0][0] for name, unit in UNITS.items() if unit.powers == ((name, 1),)}
THINGS -= set("m kg s A K mol month gallon tablespoon byte".split())


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
        self.certain = 0  # how many spellings can be nothing but a unit
        self.read_so_far = 0

    def peek(self):
        return self.tokens[self.position].text if self.position < len(self.tokens) else ""

    def read(self):
        while self.peek() in ADJECTIVES and self.position + 1 < len(self.tokens):
            self.position += 1
        unit, sign = ONE, "*"
        while self.position < len(self.tokens):
            start = self.position
            factor = self.powered()
            if sign == "" and (self.is_thing(start) or self.is_thing(start - 1)):
                raise Unreadable("two things side by side")
            unit = unit.times(factor, -1 if sign in ("/", "per") else 1)
            sign = self.peek() if self.peek() in ("/", "per", "*", "-") else ""
            if sign:
                self.position += 1
                if self.position == len(self.tokens):
                    raise Unreadable("a unit is missing")
        return unit

    def is_thing(self, index):
        """Things are counted alone, while kg m is a product: 4 units digit is no amount."""
        unit = find_unit(self.tokens[index].text)
        return unit == ONE or (unit is not None and unit.powers[0][0] in THINGS)

    def powered(self):
        power = 1
        if self.peek() in POWER_WORDS and self.position + 1 < len(self.tokens):
            power = POWER_WORDS[self.peek()]
            self.position += 1
            self.position += self.peek() == "."
        unit = self.single()
        self.position += self.peek() == "old"  # years old
        if self.peek() in POWERS_BEHIND:
            power *= POWERS_BEHIND[self.peek()]
            self.position += 1
        elif self.peek() == "^":
            exponent, self.position = argument(self.tokens, self.position + 1)
            digits = "".join(token.text for token in exponent)
            if digits.lstrip("-") not in ("1", "2", "3", "4"):
                raise Unreadable(f"{digits} is no power of a unit")
            power *= int(digits)
        return ONE.times(unit, power)

    def single(self):
        token = self.tokens[self.position]
        self.position += 1
        if token.text in ("(", "{"):
            end = closing(self.tokens, self.position - 1)
            inside = UnitReader(self.tokens[self.position : end])
            self.position = end + 1
            unit = inside.read()
            self.certain += inside.certain
            self.read_so_far += inside.read_so_far
            return unit
        if token.text == "\\frac":
            above, self.position = argument(self.tokens, self.position)
            below, self.position = argument(self.tokens, self.position)
            return UnitReader(above).read().times(UnitReader(below).read(), -1)
        text = token.text.strip("\\").replace("Omega", "Ω")
        if text in ("degree", "degrees") and self.peek() in ("C", "F", "Celsius", "Fahrenheit"):
            text = "°" + self.peek()[0]
            self.position += 1
        if text == "per" and self.peek() in ("cent", "hundred"):
            text = "percent"
            self.position += 1
        if text in PREFIXES and self.peek() == "\\Omega":
            text += "Ω"
            self.position += 1
        if token.text == "\\mu" and self.position < len(self.tokens):
            text = "u" + self.peek().strip("\\")
            self.position += 1
        if text in ("a", "p") and [x.text for x in self.tokens[self.position :][:2]] == [".", "m"]:
            text += "m"
            self.position += 2
            self.position += self.peek() == "."
        unit = find_unit(text)
        if unit is None:
            raise Unreadable(f"{text} is no unit")
        may_be_variables = text in AMBIGUOUS or (len(text) == 1 and text.isalpha() and text != "Ω")
        self.certain += token.upright or not may_be_variables
        self.read_so_far += 1
        if self.peek() == "." and self.position < len(self.tokens):
            self.position += 1
        return unit


def read_unit(tokens):
    """(unit, whether its letters may be variables)."""
    reader = UnitReader(tokens)
    unit = reader.read()
    return unit, reader.certain == 0 and reader.read_so_far == 1
