"""The reasoning environments, and the tokenizer of the tiny policy. A task is any object with these methods:

    problems(split, count, seed) -> list     up to `count` distinct ones; "train", "validation" and "test" never share one
    prompt(problem) -> str                   the question, and the format of the answer
    answer(text) -> str or None              what a completion answers, in one spelling: majority voting compares these
    reward(problem, text) -> 0.0 or 1.0      the verifier; `text` is a completion, any string at all
    question(text) -> problem                what a person asks with --ask; ValueError when it makes no sense

Completions are hostile input: the verifiers parse them, with bounds on length, depth and the size of integers, and never
evaluate them. Other spellings of an answer are rewritten by tables of `pattern -> replacement`, one rule a line.
Run as a program, this file is the worker process in which Math asks the math-verify library.
"""

import contextlib
import functools
import json
import random
import re
import signal
import subprocess
import sys
import threading
import zlib
from dataclasses import dataclass
from fractions import Fraction
from operator import add, eq, mul, sub

import tiktoken

ANSWER, YES, NO = "Answer: ", ": yes\n", ": no\n"
COUNTDOWN = (
    "Use all the numbers, each exactly once, with + - * / and parentheses to reach the target.\n"
    "Numbers: ",
    "\nTarget: ",
    '\nThink step by step, then end with one line "Answer: <expression>".\n',
)
ARITHMETIC = ("Compute ", '\nThink step by step, then end with one line "Answer: <integer>".\n')
CANDIDATE, CANDIDATE_END = "<candidate {}>\n", "\n</candidate>\n"
AGGREGATE = (
    "Each candidate above may be wrong. Audit them one by one (number, verdict), keep what is right, "
    "settle their disagreements, and if all are wrong try another way. Then end with the answer in the "
    "format asked for.\n"
)
WORDS = (*COUNTDOWN, *ARITHMETIC, ANSWER, YES, NO, ", ", "none")
MAX_ANSWER, MAX_DIGITS, MAX_DEPTH, MAX_BOXES, MAX_PROBLEM, MAX_SECONDS = 200, 9, 20, 20, 20_000, 3


class TinyTokenizer:
    """A tiktoken encoding built here. Integers below 1000, the tasks' WORDS and the role markers are
    single tokens, so that readable prompts stay short."""

    def __init__(self):
        words = [*WORDS, *map(str, range(10, 1000))]
        ranks = {bytes([byte]): byte for byte in range(256)}
        ranks |= {word.encode(): 256 + i for i, word in enumerate(words)}
        self.markers = [*(CANDIDATE.format(i) for i in range(1, 17)), CANDIDATE_END, AGGREGATE]
        special = {marker: len(ranks) + i for i, marker in enumerate([*self.markers, "<end>"])}
        pattern = "|".join(map(re.escape, WORDS)) + r"|[0-9]{1,3}|[\s\S]"
        self.encoding = tiktoken.Encoding(
            "tiny", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special
        )
        self.size = self.encoding.n_vocab
        self.eos_id = special["<end>"]
        self.eos_ids = [self.eos_id]

    def encode(self, text):
        return self.encoding.encode_ordinary(text)

    def decode(self, tokens):
        return self.encoding.decode([t for t in tokens if t != self.eos_id], errors="replace")

    def chat(self, text):
        """The tokens of a prompt: markers in `text` become role markers."""
        allowed = set(self.markers)
        return self.encoding.encode(text, allowed_special=allowed, disallowed_special=())


# ---- What a completion answers ------------------------------------------------------------------

ANSWER_LINE = re.compile(r"answer(?: is)?[*_ ]{0,4}[:：]", re.IGNORECASE)
DECORATION = re.compile(r"(?:[\s$*`}]|\\[(\[])*")
BOX = re.compile(r"\\(?:boxed|fbox)\s*")


def rules(table):
    """[(pattern, replacement)] of a table."""
    lines = [line.partition(" ->") for line in table.strip().splitlines()]
    return [(re.compile(pattern), replacement[1:]) for pattern, _, replacement in lines]


def rewrite(text, table):
    for pattern, replacement in table:
        text = pattern.sub(replacement, text)
    return text


def after_thought(text):
    """What follows a thought: nothing when it never ends."""
    said = text.rpartition("</think>")[2]
    return "" if "<think>" in said else said


def extract_answer(text):
    """The line at, or after, the last "Answer:", without decoration; None when there is none, or an empty one."""
    said = after_thought(text)
    ends = [match.end() for match in ANSWER_LINE.finditer(said)]
    if not ends:
        return None
    start = DECORATION.match(said, ends[-1]).end()
    return said[start : start + MAX_ANSWER].split("\n")[0].rstrip(" \t\r.$*`") or None


def box_content(rest):
    r"""What `rest`, which follows a \boxed, has in its braces, or its first number or letter; None when there is none."""
    if not rest.startswith("{"):
        bare = re.match(r"[-−]?[0-9][^\s$}]*|[A-Za-z](?![A-Za-z])", rest)
        return bare and bare[0]
    depth = 0
    for i, character in enumerate(rest):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return rest[1:i]
    return None


def final_answer(text):
    r"""What the last whole \boxed{...} holds, else the last "Answer:" line, else ""."""
    said = after_thought(text)
    for match in list(BOX.finditer(said))[: -MAX_BOXES - 1 : -1]:
        content = box_content(said[match.end() : match.end() + MAX_ANSWER + 2])
        if content is not None:
            return content
    return extract_answer(text) or ""


# ---- Expressions --------------------------------------------------------------------------------

OPERATIONS = {"+": add, "-": sub, "*": mul, "/": Fraction}
EXPRESSION = rules(r"""
[−–—] -> -
(?<=[0-9])(?:\{,\}|\\?,|[\u2009\u202f\u00a0 ])(?=[0-9]{3}(?![0-9])) ->
\\[dt]?frac\{([0-9]+)\}\{([0-9]+)\} -> (\1/\2)
\\(?:boxed|fbox|left|right|[,;! ()\[\]])|[$`] ->
\\(?:times|cdot|ast)|[×·⋅∙∗]|(?<=[0-9)\] ])[xX](?=[0-9(\[ ]) -> *
\\div|[÷⁄∕] -> /
[\[{<] -> (
[\]}>] -> )
^[\s=]+|[\s,;.!✓✔✅]+$ ->
""")


@dataclass
class Expression:
    """text, with only the parentheses it needs; precedence: 1 of a sum, 2 of a product, 3 of a number."""

    value: Fraction
    text: str
    precedence: int
    integers: list


def integer(number):
    return Expression(number, str(number), 3, [number])


def combine(left, operator, right):
    if operator == "/" and right.value == 0:
        raise ValueError("division by zero")
    value = OPERATIONS[operator](left.value, right.value)
    mine = 1 if operator in "+-" else 2
    lower = right.precedence < mine or (right.precedence == mine and operator in "-/")
    first = f"({left.text})" if left.precedence < mine else left.text
    second = f"({right.text})" if lower else right.text
    return Expression(value, first + operator + second, mine, left.integers + right.integers)


def parse_sum(tokens, depth):
    return parse_chain(tokens, depth, "+-", parse_product)


def parse_product(tokens, depth):
    return parse_chain(tokens, depth, "*/", parse_atom)


def parse_chain(tokens, depth, operators, parse_operand):
    left = parse_operand(tokens, depth)
    while tokens[0] in operators:
        operator = tokens.pop(0)
        left = combine(left, operator, parse_operand(tokens, depth))
    return left


def parse_atom(tokens, depth):
    token = tokens.pop(0)
    if token == "(" and depth < MAX_DEPTH:
        inside = parse_sum(tokens, depth + 1)
        if tokens.pop(0) == ")":
            return inside
    elif re.fullmatch(r"[0-9]{1,%d}" % MAX_DIGITS, token):
        return integer(int(token))
    raise ValueError("not an expression")


def evaluate(text):
    """The Expression of a text with + - * / and parentheses. Raises ValueError for anything else: over
    200 characters, 9 digits or 20 parentheses deep, `**`, signs, division by 0."""
    if len(text) > MAX_ANSWER:
        raise ValueError("too long")
    tokens = re.findall(r"[0-9]+|\S", text) + ["end"]
    expression = parse_sum(tokens, 0)
    if tokens != ["end"]:
        raise ValueError("not an expression")
    return expression


def equation(text):
    """The Expressions of an equation's sides, or of one expression; [] unless all have one value."""
    if len(text) > MAX_ANSWER:
        return []
    try:
        sides = [evaluate(side) for side in rewrite(text, EXPRESSION).split("=")]
    except ValueError:
        return []
    return sides if len({side.value for side in sides}) == 1 else []


def apply(a, operator, b, limit):
    """a operator b as a non-negative integer up to `limit`, or None."""
    if operator == "/":
        return a // b if b and a % b == 0 else None
    value = OPERATIONS[operator](a, b)
    return value if 0 <= value <= limit else None


# ---- Generated tasks ----------------------------------------------------------------------------


def split_of(text):
    """The split a problem belongs to for ever, by a checksum: a tenth each "validation" and "test"."""
    return {0: "test", 1: "validation"}.get(zlib.crc32(text.encode()) % 10, "train")


class Task:
    """What the generated tasks share."""

    def problems(self, split, count, seed):
        """Up to `count` distinct problems of the split: fewer when 10,000 draws in a row bring no new one."""
        rng, found, misses = random.Random(f"{split} {seed}"), {}, 0
        while len(found) < count and misses < 10_000:
            problem = self.draw(rng)
            key = self.key(problem)
            misses += 1
            if split == split_of(key) and key not in found:
                found[key] = problem
                misses = 0
        if not found:
            raise ValueError(f"{type(self).__name__} has no problem in the split {split!r}")
        return list(found.values())


class Countdown(Task):
    """Reach a target with each given number used exactly once. A problem is made from a random solution."""

    def __init__(self, numbers=3, high=30, max_target=120):
        if not 2 <= numbers <= 6 or not 2 <= high <= 100 or not 10 <= max_target <= 999:
            raise ValueError("needs 2 to 6 numbers, high in 2..100 and max_target in 10..999")
        self.numbers, self.high, self.max_target = numbers, high, max_target

    def attempt(self, numbers, rng):
        """A random way to combine all the numbers: (steps like "3*7=21", expression, value)."""
        items, steps = [integer(number) for number in numbers], []
        while len(items) > 1:
            i, j = rng.sample(range(len(items)), 2)
            operator = rng.choice("++--**/")
            left, right = items[i], items[j]
            value = apply(left.value, operator, right.value, 2 * self.max_target)
            if value is not None:
                steps.append(f"{left.value}{operator}{right.value}={value}")
                rest = [item for k, item in enumerate(items) if k not in (i, j)]
                items = [*rest, combine(left, operator, right)]
        return steps, items[0].text, int(items[0].value)

    def draw(self, rng):
        while True:
            numbers = [rng.randint(1, self.high) for _ in range(self.numbers)]
            steps, solution, target = self.attempt(numbers, rng)
            if 1 <= target <= self.max_target and target not in numbers:
                return {"numbers": numbers, "target": target, "steps": steps, "solution": solution}

    def question(self, text):
        *numbers, target = [int(n) for n in re.findall(r"[0-9]{1,9}", text)] or [0]
        if not 2 <= len(numbers) <= 6:
            raise ValueError(f"{text!r}: give 2 to 6 numbers, and then the target")
        return {"numbers": numbers, "target": target}

    def key(self, problem):
        return f"{sorted(problem['numbers'])} {problem['target']}"

    def prompt(self, problem):
        numbers, target, end = COUNTDOWN
        listed = " ".join(map(str, problem["numbers"]))
        return f"{numbers}{listed}{target}{problem['target']}{end}"

    def expression(self, text):
        """The side with the most numbers, `3*7+5` of `3*7+5 = 21+5 = 26`; None when there is no valid answer."""
        sides = equation(extract_answer(text) or final_answer(text))
        return max(sides, key=lambda side: len(side.integers), default=None)

    def answer(self, text):
        found = self.expression(text)
        return found and found.text

    def reward(self, problem, text):
        found = self.expression(text)
        reached = found is not None and found.value == problem["target"]
        return float(reached and sorted(found.integers) == sorted(problem["numbers"]))


class Arithmetic(Task):
    """Compute an expression of several operations."""

    def __init__(self, operations=3, high=20, max_value=400):
        if not 1 <= operations <= 8 or not 2 <= high <= 100 or not 10 <= max_value <= 999:
            raise ValueError("needs 1 to 8 operations, high in 2..100 and max_value in 10..999")
        self.operations, self.high, self.max_value = operations, high, max_value

    def draw(self, rng):
        while True:
            items = [integer(rng.randint(1, self.high)) for _ in range(self.operations + 1)]
            steps = []
            while len(items) > 1:
                i, operator = rng.randrange(len(items) - 1), rng.choice("+-*")
                left, right = items[i : i + 2]
                if apply(left.value, operator, right.value, self.max_value) is None:
                    break
                steps.append([left.value, operator, right.value])
                items[i : i + 2] = [combine(left, operator, right)]
            else:
                return {"expression": items[0].text, "value": items[0].value, "steps": steps}

    def question(self, text):
        return {"expression": text.replace(" ", ""), "value": int(evaluate(text).value)}

    def key(self, problem):
        return problem["expression"]

    def prompt(self, problem):
        return f"{ARITHMETIC[0]}{problem['expression']}{ARITHMETIC[1]}"

    def answer(self, text):
        """The integer on the answer line, `26` of `3*7+5 = 26`; without such a line the last one of the text."""
        said = extract_answer(text)
        if said is None:
            numbers = re.findall(r"(?:(?<![0-9)])[-−–])?[0-9][0-9,.]*", after_thought(text))
            said = numbers[-1] if numbers else ""
        for side in equation(said):
            if len(side.integers) == 1:
                return side.text
        return None

    def reward(self, problem, text):
        return float(self.answer(text) == str(problem["value"]))


# ---- Math: answers in LaTeX ---------------------------------------------------------------------

SYMBOLS = r"""
−- –- —- ‒- √\sqrt ½\frac12 ⅓\frac13 ⅔\frac23 ¼\frac14 ¾\frac34 ⅕\frac15 ⅛\frac18 π\pi θ\theta
α\alpha β\beta γ\gamma λ\lambda μ\mu φ\phi ω\omega ∞\infty ∅\emptyset ≤\le ≥\ge ≠\ne ≈\approx ∪\cup
∩\cap ∈\in ·\cdot ⋅\cdot ×\times ÷/ ±\pm ⁄/ ∕/ ⁰^0 ¹^1 ²^2 ³^3 ⁴^4 ⁵^5 ⁶^6 ⁷^7 ⁸^8 ⁹^9
"""
# A space is written ~ from the first rule on. Words of \text{...} end up in quotation marks.
LATEX = rules(r"""
(?:\s|(?<!\\)\\[,:;\s]|\\q?quad(?![a-z]))+ -> ~
["“”`]|^\*+|\*+$ ->
\\(?:text(?:bf|it|rm|normal|tt)?|math(?:rm|bf|it|sf)|mbox)~?\{([^{}]*)\} -> "\1"
(?<!\\)\\(?:left|right|[bB]igg?[lrm]?|displaystyle|textstyle|[lL]arge|LARGE|rm|bf|it)(?![A-Za-z]) ->
(?<!\\)\\(?:underline|boxed|fbox)(?=[~{])|\\(?:text)?color~?\{\w+\} ->
(?<!\\)\\[!$%()[\]]|\\degree|\^~?\{?~?\\circ~?\}?|[$%°] ->
\{([,:])\} -> \1
\\[dtc]frac -> \\frac
\{([^{}]*)\\over~?([^{}]*)\} -> \\frac{\1}{\2}
\\frac~?([0-9])~?(?=[0-9{]) -> \\frac{\1}
(\\frac\{[^{}]*\})~?([0-9]) -> \1{\2}
(?<![A-Za-z\\])sqrt -> \\sqrt
\\sqrt~?\(([^()]*)\) -> \\sqrt{\1}
\\sqrt~?([0-9]+|[A-Za-z]) -> \\sqrt{\1}
(?<![A-Za-z\\])(sin|cos|tan|log|ln|pi|infty)(?![A-Za-z]) -> \\\1
\\(le|ge|ne)(?:q|qslant|slant)(?![a-z]) -> \\\1
\\varnothing|\\\{~?\\\} -> \\emptyset
\\langle -> (
\\rangle -> )
(?<=.)~?\\approx.* ->
\b(?:square|sq\.?)~([A-Za-z]+) -> \1^2
\bcubic~([A-Za-z]+) -> \1^3
,?~*"?~*(?<![A-Za-z(])(?:or|and)(?![A-Za-z])~*"?|; -> ,
"([^"A-Za-z]*)" -> \1
(?<=[0-9])(?<![0-9]{4})[,~](?=[0-9]{3}(?![0-9/]))(?![^(\[{]*[)\]}]) ->
~+(?![0-9A-Za-z])|(?<![0-9A-Za-z])~+|(?<=[0-9])~+(?=[A-Za-z]) ->
([_^])\{(.)\} -> \1\2
\^([0-9])\^([0-9]) -> ^{\1\2}
\\(?:cdot|times)(?=\\sqrt|\\pi|[a-z]) ->
""")
# An entry holds the names of one unit; a plural s is understood.
UNITS = """
mm=millimeter cm=centimeter=centimetre m=meter=metre km=kilometer=kilometre inch=in foot=feet=ft yard=yd
mile=mi g=gram kg=kilogram mg pound=lb ounce=oz ton second=sec=s minute=min hour=hr=h day week month year
liter=litre=L ml gallon quart pint acre unit degree=deg radian=rad dollar cent euro rupee mph=mi/h=miles~per~hour
km/h=kph m/s ft/s N J W V Hz pm=p.m am=a.m percent people=person child=children man=men woman=women student
boy girl apple orange book page car ball marble coin egg cookie box bag ticket game point time way number
integer solution piece slice item tree bird cat dog fish chair table pencil pen card side edge face triangle
vertex=vertices hundredth friend bottle cup glass shirt shoe flower rose candy candies stamp sticker toy class
"""
UNIT_NAMES = {name: entry.split("=")[0] for entry in UNITS.split() for name in entry.split("=")}
UNIT = re.compile(  # a single letter may be a variable, unless it is text
    r'(.+?)~*(?:"|(?<![A-Za-z\\])(?=[A-Za-z]{2}))(%s)(?:e?s)?\.?"?(\^[23])?\.?"?'
    % "|".join(UNIT_NAMES)
)
LETTERS = r'(?:\\(?!frac|sqrt|not|ne|le|ge)[a-z]+|["A-Za-z~])+(?:_\w|_\{\w+\})?(?:\([^()=]*\))?'
NAME = re.compile(rf'({LETTERS}|\([A-Za-z,]+\))(?:=|\\in(?![a-z]))(?:[^=]*=)*|"?(\([A-J]\))"?(?=.)')
TEXT = re.compile(r'"|:|(?<![A-Za-z\\{])[A-Za-z]{3}|^[A-Za-z~]+$|^[0-9A-F]+_')
NUMBER = re.compile(
    r"([+-]?)(?:(?:([0-9]+)~)?([0-9]+)/(0*[1-9][0-9]*)"
    r"|(?=\.?[0-9])([0-9]*)\.?([0-9]*)(?:\\overline\{?([0-9]+)\}?)?"
    r"(?:(?:[eE]|(?:\\times|\\cdot|\*)10\^)\{?([+-]?[0-9]{1,2})\}?)?)"
)


def number(text):
    """The Fraction that a spelling of a number means; None for anything else."""
    plain = re.sub(r"\\frac\{(-?[0-9]+)\}\{([0-9]+)\}", r"~\1/\2", text)
    found = NUMBER.fullmatch(re.sub("^([+-]?)~", r"\1", plain))
    if not found or len(text) > 60:
        return None
    sign, whole, top, bottom, integer_part, decimals, repeated, exponent = found.groups()
    if bottom:
        value = int(whole or 0) + Fraction(int(top), int(bottom))
    else:
        value = Fraction(f"{integer_part or 0}.{decimals or 0}")
        if repeated:
            value += Fraction(int(repeated), (10 ** len(repeated) - 1) * 10 ** len(decimals))
        value *= Fraction(10) ** int(exponent or 0)
    return -value if sign == "-" else value


def split_list(text):
    """The parts between the commas outside of brackets; [] when these don't match."""
    parts, depth = [""], 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        if depth < 0:
            return []
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts


def parse_value(text):
    """A node of what has no commas and no name: a number in lowest terms, text behind a quotation mark, or LaTeX."""
    unit = ""
    if found := UNIT.fullmatch(text):
        text, unit = found[1], UNIT_NAMES[found[2]] + (found[3] or "")
    value = number(text)
    if value is not None:
        text = str(value)
    elif TEXT.search(text):
        plain = re.sub(r'["{}~]', "", text)
        text = '"' + (plain.casefold() if len(plain) > 2 else plain)
    return ["", text, unit]


def parse_node(text):
    """[name, value, unit], or [name, nodes, brackets] of a list. Brackets of sets and of bare lists are {}."""
    parts = split_list(text)
    if len(parts) > 1:
        nodes = [parse_node(part) for part in parts]
        words = any(node[1][:1] == '"' for node in nodes)
        return ["", nodes, "()" if words else "{}"]
    found = NAME.match(text)
    if found and found.end() < len(text):
        return [found[1] or found[2], *parse_node(text[found.end() :])[1:]]
    inside = re.fullmatch(r"(\(|\[|\\?\{)(.*?)(\)|\]|\\?\})", text)
    if not inside or not split_list(inside[2]):
        return parse_value(text)
    node = parse_node(inside[2])
    if isinstance(node[1], list) and "," in inside[2]:
        node[2] = inside[1][-1] + inside[3][-1]
    return node


def parse_answer(text):
    for symbol in SYMBOLS.split():
        text = text.replace(symbol[0], symbol[1:] + " ")
    return parse_node(rewrite(text.strip(), LATEX).rstrip("."))


def spell(node):
    """One spelling for all answers with the value of the node."""
    _, value, brackets = node
    if isinstance(value, str):
        return value.lstrip('"').replace("~", " ")
    parts = [spell(part) for part in value]
    return brackets[0] + ", ".join(sorted(parts) if brackets == "{}" else parts) + brackets[1]


def settled(right, answer):
    """Whether the spelling of two values tells if they are equal: of numbers, text, and an equation against none."""
    numbers = re.fullmatch(r"-?[0-9/]+,-?[0-9/]+", f"{right},{answer}")
    return right == answer or numbers or '"' in right + answer or ("=" in right) != ("=" in answer)


def agree(right, answer, same):
    """Whether two nodes are equal, where same(a, b) compares values. A name or unit may be missing, but not differ."""
    (name, value, unit), (other_name, other_value, other_unit) = right, answer
    for choice, bare in ((name, other_value), (other_name, value)):
        if isinstance(bare, str) and choice == f"({bare[1:]})":
            return True
    if (name and other_name and name != other_name) or (unit and other_unit and unit != other_unit):
        return False
    if isinstance(value, str) or isinstance(other_value, str):
        return isinstance(value, type(other_value)) and same(value, other_value)
    if len(value) != len(other_value):
        return False
    rest = list(other_value)
    for part in value:
        candidates = rest if unit == "{}" else rest[:1]
        found = next((other for other in candidates if agree(part, other, same)), None)
        if found is None:
            return False
        rest.remove(found)
    return True


worker, lock = None, threading.Lock()  # the process that asks math-verify; False: it doesn't start


def start_worker():
    process = subprocess.Popen(
        [sys.executable, __file__, str(MAX_SECONDS)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,  # Ctrl-C is not for it
    )
    if process.stdout.readline():
        return process
    process.wait()
    note = "note: no math-verify (pip install math-verify): answers are compared as text and numbers only"
    print(note, file=sys.stderr)
    return False


@functools.lru_cache(maxsize=100_000)  # the completions of a problem mostly agree
def equivalent(question):
    """The worker's verdict on a line of JSON; False when it dies of it, or isn't there."""
    global worker
    with lock, contextlib.suppress(OSError):
        # An interrupt loses the process, lest its reply be taken for that to the next question
        process, worker = worker, None
        if process is None or (process and process.poll() is not None):
            process = start_worker()
        reply = ""
        if process:
            print(question, file=process.stdin, flush=True)
            reply = process.stdout.readline() or process.wait()
        worker = process
        return reply == "1\n"
    return False


def exact_library():
    """same(right, answer) of two LaTeX texts by math-verify, without its tolerances and without eval."""
    import math_verify
    import sympy.physics.units  # reads texts by eval when first imported

    normalization = math_verify.parser.NormalizationConfig(
        basic_latex=True, malformed_operators=True, nits=True, boxed="none"
    )
    config = [math_verify.LatexExtractionConfig(normalization_config=normalization)]

    def read_number(code, *scopes):  # sympy reads even numbers by eval, and only numbers
        return sympy.Rational(re.fullmatch(r"(?:Integer|Float) \('?([0-9.]+)'? \)", code)[1])

    def equal_numbers(a, b, *tolerances):
        return (a - b).doit().equals(0) is True

    def equal_equations(a, b, *tolerances):
        ratio = sympy.simplify((a.lhs - a.rhs) / (b.lhs - b.rhs))
        turned = ratio.is_negative and isinstance(a, sympy.Eq)
        return type(a) is type(b) and bool(ratio.is_positive or turned)

    def read(
        text,
    ):  # as LaTeX, which has a grammar; math-verify's plain expressions go through eval
        text = text.replace("~", " ")
        (expression, *_) = math_verify.parse(f"${text}$", config, parsing_timeout=None)
        floats = getattr(expression, "atoms", lambda kind: ())(sympy.Float)
        return (
            expression.xreplace({x: sympy.Rational(str(x)) for x in floats})
            if floats
            else expression
        )

    def same(right, answer):
        if settled(right, answer):
            return right == answer
        return math_verify.verify(read(right), read(answer), timeout_seconds=None)

    sympy.parsing.sympy_parser.eval_expr = read_number
    math_verify.grader.sympy_numeric_eq = equal_numbers
    math_verify.grader.sympy_solve_and_compare = equal_equations
    assert same(r"\frac{1}{2}+x", "x+0.5") and not same("x", "y")
    return same


def serve(seconds):
    """The worker: a line 1 or 0 for each line [right, answer] of standard input, until that ends. When a pair takes
    too long the kernel ends the process by an alarm, which also holds when the parent asks from a thread, or is gone."""
    import resource  # not on Windows, where the alarm is missing as well

    replies, sys.stdout = sys.stdout, sys.stderr  # what the libraries print is no reply
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # a parent may have it ignored
    signal.alarm(60)
    same = exact_library()
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
    signal.alarm(0)
    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        signal.alarm(seconds)
        verdict = int(agree(*json.loads(line), same))
        signal.alarm(0)
        print(verdict, file=replies, flush=True)


class Math:
    """Problems from a file with one JSON object a line: {"problem": text, "answer": text or number} and, if you like,
    "split": "train", "validation" or "test" (else a checksum decides). Of equal problems the first counts."""

    def __init__(self, path=""):
        self.path, self.rows = path, {}
        if not path:  # for `question` alone
            return
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                try:
                    if line.strip():
                        row = self.row(line)
                        self.rows.setdefault(row["problem"], row)
                except (ValueError, RecursionError) as error:
                    reason = getattr(error, "msg", error)
                    raise ValueError(f"{path} line {number}: {reason}") from None

    def row(self, line):
        row = json.loads(line, parse_float=str)  # 0.10 stays as it is written
        if not isinstance(row, dict):
            raise ValueError("not a JSON object")
        if type(row.get("answer")) is int:
            row["answer"] = str(row["answer"])
        for name, limit in (("problem", MAX_PROBLEM), ("answer", MAX_ANSWER)):
            text = row.get(name)
            if not isinstance(text, str) or len(text) > limit or not text.strip("$ \n"):
                raise ValueError(f'"{name}" must be a text of 1 to {limit} characters')
        row = {"split": split_of(row["problem"]), **row}
        if row["split"] not in ("train", "validation", "test"):
            raise ValueError('"split" must be "train", "validation" or "test"')
        return row

    def problems(self, split, count, seed):
        if not self.path:
            raise ValueError("task math needs --data, a JSONL file of problems")
        rows = [row for row in self.rows.values() if row["split"] == split]
        if not rows:
            has = f'{self.path} has no problem in the split "{split}"'
            raise ValueError(f"{has}, of {len(self.rows)} in all")
        random.Random(f"{split} {seed}").shuffle(rows)
        return rows[:count]

    def question(self, text):
        return {"problem": text, "answer": ""}

    def prompt(self, problem):
        end = "\n\nReason step by step, and put your final answer within \\boxed{}.\n"
        return problem["problem"] + end

    def answer(self, text):
        return spell(parse_answer(final_answer(text))) or None

    def reward(self, problem, text):
        right, answer = parse_answer(problem["answer"]), parse_answer(final_answer(text))
        if not answer[1] or agree(right, answer, eq):
            return float(answer[1] != "")
        values = [right[1], answer[1]]
        if isinstance(values[0], str) and isinstance(values[1], str) and settled(*values):
            return 0.0
        return float(equivalent(json.dumps([right, answer])))


TASKS = {"countdown": Countdown, "arithmetic": Arithmetic, "math": Math}


def make_task(name, data=""):
    """A task from its name and options: "countdown", "countdown:numbers=4,high=30", or "math" with a file `data`.
    Raises ValueError for others."""
    kind, _, options = name.partition(":")
    if kind.strip() not in TASKS:
        raise ValueError(f"unknown task {kind!r}; there are: {', '.join(TASKS)}")
    if data and kind.strip() != "math":
        raise ValueError(f"task {kind} takes no --data {data}")
    try:
        pairs = [pair.split("=") for pair in options.split(",") if pair.strip()]
        chosen = {key.strip(): int(value) for key, value in pairs}
        return TASKS[kind.strip()](*[data] * bool(data), **chosen)
    except (TypeError, ValueError) as error:
        raise ValueError(f"task {name}: {error}") from None


if __name__ == "__main__":
    serve(int(sys.argv[1]))
