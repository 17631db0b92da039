"""One spelling for all answers of one value, so that votes count values. Names and units are left
out, as an answer may lack them."""

import re

from .compare import IN_ANY_ORDER
from .nodes import (
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
    Words,
)


def spell(node):
    """One spelling for all answers of a value, without its name and its unit."""
    if isinstance(node, Number):
        return str(node.value)
    if isinstance(node, Formula):
        return re.sub(r"\\mathrm\{([^{}]*)\}|I", lambda found: found[1] or "i", node.latex).strip()
    if isinstance(node, Named | Quantity):
        return spell(node.value)
    if isinstance(node, Approximated):
        return spell(node.exact)
    if isinstance(node, Chain):
        return spell(node.sides[-1])
    if isinstance(node, Choice):
        return node.letter
    if isinstance(node, Words):
        return node.text
    if isinstance(node, Items):
        return spell_items(node)
    return spell_rest(node)


def spell_items(node):
    spellings = [spell(item) for item in node.items]
    if node.brackets == ":":
        return ":".join(spellings)
    if node.brackets in IN_ANY_ORDER:
        return "{" + ", ".join(sorted(spellings)) + "}"
    opening, closing = node.brackets if len(node.brackets) == 2 else "()"
    return opening + ", ".join(spellings) + closing


def spell_rest(node):
    if isinstance(node, Between):
        return spell(node.interval)
    if isinstance(node, SetOperation):
        return f" {node.operator} ".join([spell(part) for part in node.parts] or [node.operator])
    if isinstance(node, Relation):
        return f"{spell(node.left)} {node.operator} {spell(node.right)}"
    if isinstance(node, InBase):
        return f"{node.digits}_{node.base}"
    return node.latex
