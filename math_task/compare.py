"""Whether two answers agree in meaning. Of two that differ none may be rewarded; so a rule that
isn't here says no. `library` decides on formulas: see the class Library in worker.py."""

import re
from fractions import Fraction

from .expression import write_fraction
from .nodes import (
    EMPTY,
    Approximated,
    Between,
    Chain,
    Choice,
    Formula,
    InBase,
    Items,
    Named,
    Number,
    Quantity,
    Relation,
    SetOperation,
    Special,
    Words,
)

INTERVALS = ("()", "[]", "(]", "[)")
IN_ANY_ORDER = ("", "{}")
DEGREE, RADIAN, PERCENT = ((("degree", 1),), (("radian", 1),), (("percent", 1),))


def agree(gold, answer, library):
    """The verdict on two nodes: each rule is asked if one of the two is of its kind."""
    if gold == answer:
        return True
    for kinds, rule in RULES:
        if isinstance(gold, kinds) or isinstance(answer, kinds):
            return rule(gold, answer, library)
    return False


def agree_choice(gold, answer, library):
    """(B) 12 is B and 12, but neither (C) 12 nor (B) 13."""
    if isinstance(gold, Choice) and isinstance(answer, Choice):
        if gold.letter != answer.letter:
            return False
        if gold.value is None or answer.value is None:
            return True
        return agree(gold.value, answer.value, library)
    choice, other = (gold, answer) if isinstance(gold, Choice) else (answer, gold)
    if isinstance(other, Formula) and other.letters == choice.letter:
        return True
    if choice.value is None:
        return False
    if choice is gold:
        return agree(choice.value, other, library)
    return agree(other, choice.value, library)


def agree_approximated(gold, answer, library):
    r"""\sqrt2 \approx 1.41 is \sqrt2, and the decimal 1.41; 5 \approx 7 is nothing."""
    if isinstance(gold, Approximated):
        return agree(gold.exact, answer, library) or agree(gold.decimal, answer, library)
    if not is_near(answer, library):
        return False
    if agree(gold, answer.exact, library):
        return True
    return is_decimal(gold) and gold == answer.decimal


def is_decimal(node):
    """2.5, but neither 2 nor 1/3."""
    if not isinstance(node, Number) or node.value.denominator == 1:
        return False
    return 10**200 % node.value.denominator == 0


def is_near(answer, library):
    if not isinstance(answer.decimal, Number) or not write(answer.exact):
        return False
    return library.near(write(answer.exact), answer.decimal.value)


def agree_chain(gold, answer, library):
    """Of a = b = c each side has to be right."""
    if isinstance(gold, Chain):
        return all(agree(side, answer, library) for side in gold.sides)
    return all(agree(gold, side, library) for side in answer.sides)


def agree_named(gold, answer, library):
    """A value may lack its name, but not have another one: y = 2x is 2x, and not z = 2x."""
    if isinstance(gold, Named) and isinstance(answer, Named):
        if gold.name == answer.name:
            return agree(gold.value, answer.value, library)
        return same_equation(gold, answer, library)
    if is_relation_without_name(gold) or is_relation_without_name(answer):
        return same_equation(gold, answer, library)
    if isinstance(gold, Named):
        return names_fit(gold, answer) and agree(gold.value, answer, library)
    return names_fit(gold, answer) and agree(gold, answer.value, library)


def is_relation_without_name(node):
    return isinstance(node, Relation) and node.operator == "="


def names_fit(gold, answer):
    names = {node.name for node in (gold, answer) if getattr(node, "name", "")}
    return len(names) < 2


def same_equation(gold, answer, library):
    """x + y = 4 is 2x + 2y = 8."""
    differences = [left_minus_right(node) for node in (gold, answer)]
    return all(differences) and library.proportional(*differences, either_sign=True)


def left_minus_right(node):
    """The LaTeX of left - right; "" where a side isn't a formula."""
    if isinstance(node, Named):
        left, right = node.latex, write(node.value)
    else:
        left, right = write(node.left), write(node.right)
    return f"{left}-({right})" if left and right else ""


def agree_quantity(gold, answer, library):
    """A unit that one side lacks is forgiven, two different ones never; 5 km is 5000 m."""
    if isinstance(gold, Formula) and gold.quantity and isinstance(answer, Quantity):
        gold = gold.quantity
    if isinstance(answer, Formula) and answer.quantity and isinstance(gold, Quantity):
        answer = answer.quantity
    if isinstance(gold, Quantity) and isinstance(answer, Quantity):
        return agree_units(gold, answer, library)
    quantity, bare = (gold, answer) if isinstance(gold, Quantity) else (answer, gold)
    if quantity.unit.powers == PERCENT:
        return agree_percent(quantity.value, bare, library)
    if quantity.unit.powers == DEGREE and isinstance(bare, Formula):  # 30 degrees are \pi/6
        is_angle = agree(in_radians(quantity), bare, library)
        return is_angle or ("\\pi" not in bare.latex and agree(quantity.value, bare, library))
    return agree(quantity.value, bare, library)


def agree_units(gold, answer, library):
    powers = gold.unit.powers, answer.unit.powers
    if set(powers) == {DEGREE, RADIAN}:
        return agree(in_radians(gold), in_radians(answer), library)
    if powers[0] != powers[1]:
        return False
    converted = scaled(answer.value, answer.unit.factor / gold.unit.factor)
    return converted is not None and agree(gold.value, converted, library)


def in_radians(quantity):
    if quantity.unit.powers == RADIAN:
        return quantity.value
    factor = write_fraction(quantity.unit.factor / 180)
    return Formula(f"({write(quantity.value)})*({factor})*\\pi ")


def agree_percent(percents, bare, library):
    """25% is 0.25, and 25 where the question asks for percents; 0.5% isn't 0.5."""
    as_part = scaled(percents, Fraction(1, 100))
    if isinstance(bare, Number) and isinstance(percents, Number):
        if bare.value == percents.value:
            return abs(bare.value) > 1 or bare.value == 0
        is_part = bare.value.denominator != 1 or bare.value == 1
        return is_part and bare == as_part
    if as_part is None:
        return False
    return agree(as_part, bare, library) or agree(percents, bare, library)


def scaled(node, factor):
    """The node times a factor; None where that isn't known."""
    if factor == 1:
        return node
    if isinstance(node, Number):
        return Number(node.value * factor)
    if isinstance(node, Formula):
        return Formula(f"({node.latex})*({write_fraction(factor)})")
    return None


def agree_sets(gold, answer, library):
    """1 < x < 2 is (1, 2); [1,2] \\cup [2,3] is [1,3]; x = 1 isn't x < 1."""
    if isinstance(gold, Relation) and isinstance(answer, Relation):
        if same_relation(gold, answer, library):
            return True
    if isinstance(answer, Relation) and answer.operator == "=":
        return is_value_of_letters(gold, answer) and agree(gold, answer.right, library)
    if not names_fit(gold, answer):
        return False
    return is_set(gold) and is_set(answer) and library.same_sets(gold, answer)


def same_relation(gold, answer, library):
    if gold.operator != answer.operator:
        return False
    differences = left_minus_right(gold), left_minus_right(answer)
    either_sign = gold.operator in ("=", "\\ne")
    return all(differences) and library.proportional(*differences, either_sign=either_sign)


def is_value_of_letters(gold, answer):
    """a + b = 5 is 5, if the gold is a number; but 2x = 5 is an equation, as is x + y = 0.
    \\int 2x dx = x^2 is x^2."""
    if isinstance(answer.left, Special):
        return "\\begin" not in answer.left.latex
    names = set(re.findall(r"\\mathrm\{[^{}]*\}", write(answer.left)))
    constant = write(gold)
    if isinstance(gold, Quantity):
        constant = write(gold.value)
    is_constant = bool(constant) and "\\mathrm" not in constant
    return is_constant and len(names) > 1 and answer.right != Number(Fraction(0))


def is_set(node):
    if isinstance(node, SetOperation | Between):
        return True
    if isinstance(node, Relation):
        return node.name != "" and node.operator != "="
    if not isinstance(node, Items):
        return False
    return node.brackets == "{}" or (node.brackets in INTERVALS and len(node.items) == 2)


def agree_items(gold, answer, library):
    """Pairs and intervals are in order; bare lists and sets aren't."""
    if not isinstance(gold, Items) or not isinstance(answer, Items):
        return False
    if len(gold.items) != len(answer.items) or EMPTY in (gold, answer):
        return False
    kinds = gold.brackets, answer.brackets
    if set(kinds) <= set(IN_ANY_ORDER):
        return agree_in_any_order(gold.items, answer.items, library)
    values_of_names = "=" in kinds and set(kinds) <= {"=", "()", ""}
    if kinds[0] != kinds[1] and not values_of_names:
        return False
    pairs = zip(gold.items, answer.items, strict=True)
    return all(agree(right, given, library) for right, given in pairs)


def agree_in_any_order(gold, answer, library):
    left = list(answer)
    for item in gold:
        for i, other in enumerate(left):
            if agree(item, other, library):
                del left[i]
                break
        else:
            return False
    return True


def agree_words(gold, answer, library):
    """Letters in order; AB is A*B only where one of the two has the sign."""
    words, other = (gold, answer) if isinstance(gold, Words) else (answer, gold)
    if not isinstance(other, Formula):
        return False
    if other.letters:
        return other.letters == words.text
    return bool(words.product) and library.same(words.product, other.latex)


def agree_special(gold, answer, library):
    latex = write(gold), write(answer)
    return all(latex) and library.same_as_written(*latex)


def agree_formulas(gold, answer, library):
    latex = write(gold), write(answer)
    return all(latex) and library.same(*latex)


def agree_never(gold, answer, library):
    return False


# In the order in which they are asked.
RULES = (
    (Choice, agree_choice),
    (Approximated, agree_approximated),
    (Chain, agree_chain),
    (Named, agree_named),
    (Quantity, agree_quantity),
    (Relation | Between | SetOperation, agree_sets),
    (Items, agree_items),
    (Words, agree_words),
    (InBase, agree_never),
    (Special, agree_special),
    (Formula, agree_formulas),
)


def write(node):
    """The LaTeX of a number or formula for the library; "" of anything else."""
    if isinstance(node, Number):
        return write_fraction(node.value)
    return node.latex if isinstance(node, Formula | Special) else ""
