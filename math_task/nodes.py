"""What an answer may be. Fields with compare=False hold another reading of the same answer."""

from dataclasses import dataclass, field
from fractions import Fraction

from .units import Unit


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
