"""The reasoning environments, and the tokenizer of the tiny policy. A task has these methods:

    problems(split, count, seed) -> list    up to `count` distinct ones; the splits never share one
    prompt(problem) -> str                  the question, and the format of the answer
    answer(text) -> str or None             what a completion answers; votes count these spellings
    reward(problem, text) -> 0.0 or 1.0     the verifier; `text` is any string at all
    question(text) -> problem               what a person asks with --ask, or ValueError

Completions are hostile: they are parsed, with bounds on length, depth and the size of integers, and
never evaluated. Run as a program, this file is the worker in which Math asks math-verify.
"""

import ast
import contextlib
import functools
import json
import random
import re
import signal
import sys
import threading
import zlib
from fractions import Fraction
from operator import add, eq, mul, sub
from pathlib import Path
from subprocess import DEVNULL, PIPE, Popen

import tiktoken

ANSWER, YES, NO = "Answer: ", ": yes\n", ": no\n"
COUNTDOWN = (
    "Use all the numbers, each exactly once, with + - * / and parentheses to reach the target.\n"
    "Numbers: ",
    "\nTarget: ",
    '\nThink step by step, then end with one line "Answer: <expression>".\n',
)
ARITHMETIC = ("Compute ", '\nThink step by step, then end with one line "Answer: <integer>".\n')
WORDS = (*COUNTDOWN, *ARITHMETIC, ANSWER, YES, NO, ", ", "none")  # each is one token
MATH = "\n\nReason step by step, and put your final answer within \\boxed{}.\n"
CANDIDATE, CANDIDATE_END = "<candidate {}>\n", "\n</candidate>\n"
AGGREGATE = (
    "Each candidate above may be wrong. Audit them one by one (number, verdict), keep what is "
    "right, settle their disagreements, and if all are wrong try another way. Then end with the "
    "answer in the format asked for.\n"
)
TABLES = Path(__file__).with_name("spellings.txt").read_text("utf-8")
EXPRESSION, LATEX, NUMERALS, UNITS = TABLES.split("\n\n")
SPLITS = ("test", "validation", *["train"] * 8)
MAX_ANSWER, MAX_DEPTH, MAX_TEXT, MAX_SECONDS = 200, 20, 20_000, 3


class TinyTokenizer:
    """A tiktoken encoding: integers below 1000, WORDS and role markers are single tokens."""

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

    def chat(self, text):  # markers in `text` become role markers
        return self.encoding.encode(text, allowed_special=set(self.markers), disallowed_special=())


def rewrite(text, table):
    """Apply each rule pattern=>replacement of a table."""
    for rule in table.split():
        pattern, arrow, replacement = rule.partition("=>")
        if arrow:
            text = re.sub(pattern, replacement, text)
    return text


def balanced(opening, closing):
    """A pattern of text in which these brackets match."""
    pattern = other = f"[^{opening}{closing}]"
    for _ in range(MAX_DEPTH):
        pattern = f"(?:{other}|[{opening}]{pattern}*[{closing}])"
    return pattern + "*"


ANSWER_LINE = re.compile(r"(?i)answer(?: is)?[*_ ]{0,4}[:：](?:[\s$*`}]|\\[(\[])*")
INTEGER = r"(?<![0-9.,])(?:(?<![0-9)])[-−–])?[0-9][0-9,.]{0,200}"
BARE = r"[-−]?[0-9][^\s$}]*|[A-Za-z](?![A-Za-z])"
BOX = re.compile(rf"\\(?:boxed|fbox)\s*(?:\{{({balanced('{', '}')})\}}|({BARE}))")


def after_thought(text):
    return text.rpartition("</think>")[2].partition("<think>")[0][-MAX_TEXT:]


def extract_answer(text):
    """What follows the last "Answer:" on its line or the next, undecorated; None: nothing."""
    parts = ANSWER_LINE.split(after_thought(text))
    line = parts[-1][:MAX_ANSWER].split("\n")[0] if len(parts) > 1 else ""
    return line.rstrip(" \t\r.$*`") or None


def final_answer(text):
    r"""What the last \boxed{...} holds, else the last "Answer:" line, else ""."""
    boxes = [match[match.lastindex] for match in BOX.finditer(after_thought(text))]
    short = [box for box in boxes if len(box) <= MAX_ANSWER]
    return short[-1] if short else extract_answer(text) or ""


OPERATIONS = {"+": add, "-": sub, "*": mul, "/": Fraction}
NODES = {ast.Add: add, ast.Sub: sub, ast.Mult: mul, ast.Div: Fraction}
SHORT = re.compile(r"(?!.*[0-9]{10})(?!(?:[^(]*\(){21})[-+*/() 0-9]{1,200}")


def calculate(tree):
    if isinstance(tree, ast.Constant):
        return Fraction(tree.value)
    return NODES[type(tree.op)](calculate(tree.left), calculate(tree.right))


def evaluate(text):
    """(value, integers, spelling) of an expression with + - * / and parentheses; ValueError for
    anything else: over 200 characters, 9 digits or 20 parentheses, `**`, signs, division by 0."""
    try:
        tree = ast.parse(SHORT.fullmatch(text.strip())[0], mode="eval").body
        integers = [int(digits) for digits in re.findall("[0-9]+", text)]
        return calculate(tree), integers, ast.unparse(tree).replace(" ", "")
    except (SyntaxError, TypeError, AttributeError, KeyError, ZeroDivisionError):
        raise ValueError(f"{text[:MAX_ANSWER]!r} is no short expression with + - * /") from None


def equation(text):
    """What `evaluate` says of each side of an equation; [] unless all have one value."""
    try:
        sides = [evaluate(side) for side in rewrite(text, EXPRESSION).split("=")]
    except ValueError:
        return []
    return sides if len({value for value, _, _ in sides}) == 1 else []


def apply(a, operator, b, limit):
    """a operator b as a non-negative integer up to `limit`, or None."""
    if operator == "/":
        return a // b if b and a % b == 0 else None
    value = OPERATIONS[operator](a, b)
    return value if 0 <= value <= limit else None


def write(left, operator, right):
    """(text, precedence) of two such pairs joined, with only the parentheses that are needed."""
    (first, a), (second, b) = left, right
    mine = 1 if operator in "+-" else 2
    first = f"({first})" if a < mine else first
    second = f"({second})" if b < mine or (b == mine and operator in "-/") else second
    return first + operator + second, mine


def split_of(text):  # by a checksum, for ever
    return SPLITS[zlib.crc32(text.encode()) % 10]


class Task:
    def problems(self, split, count, seed):
        """Up to `count` distinct problems: fewer when 10,000 draws in a row bring no new one."""
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


class Countdown(Task):  # reach a target with each given number used exactly once
    def __init__(self, numbers=3, high=30, max_target=120):
        if not 2 <= numbers <= 6 or not 2 <= high <= 100 or not 10 <= max_target <= 999:
            raise ValueError("needs 2 to 6 numbers, high in 2..100 and max_target in 10..999")
        self.numbers, self.high, self.max_target = numbers, high, max_target

    def attempt(self, numbers, rng):
        """A random way to combine all the numbers: (steps like "3*7=21", expression, value)."""
        items, steps = [(number, (str(number), 3)) for number in numbers], []
        while len(items) > 1:
            i, j = rng.sample(range(len(items)), 2)
            operator = rng.choice("++--**/")
            (a, left), (b, right) = items[i], items[j]
            value = apply(a, operator, b, 2 * self.max_target)
            if value is not None:
                steps.append(f"{a}{operator}{b}={value}")
                rest = [item for k, item in enumerate(items) if k not in (i, j)]
                items = [*rest, (value, write(left, operator, right))]
        return steps, items[0][1][0], items[0][0]

    def draw(self, rng):
        while True:
            numbers = [rng.randint(1, self.high) for _ in range(self.numbers)]
            steps, solution, target = self.attempt(numbers, rng)
            if 1 <= target <= self.max_target and target not in numbers:
                return {"numbers": numbers, "target": target, "steps": steps, "solution": solution}

    def question(self, text):
        numbers = [int(digits) for digits in re.findall(r"[0-9]{1,9}", text)]
        if not 3 <= len(numbers) <= 7:
            raise ValueError(f"{text!r}: give 2 to 6 numbers, and then the target")
        return {"numbers": numbers[:-1], "target": numbers[-1]}

    def key(self, problem):
        return f"{sorted(problem['numbers'])} {problem['target']}"

    def prompt(self, problem):
        numbers, target, end = COUNTDOWN
        return f"{numbers}{' '.join(map(str, problem['numbers']))}{target}{problem['target']}{end}"

    def answer(self, text):
        """Of `3*7+5 = 21+5 = 26` the side with the most numbers, 3*7+5."""
        sides = equation(extract_answer(text) or final_answer(text))
        return max(sides, key=lambda side: len(side[1]), default=(0, [], None))[2]

    def reward(self, problem, text):
        right = problem["target"], sorted(problem["numbers"])
        sides = equation(self.answer(text) or "")
        return float(any((value, sorted(integers)) == right for value, integers, _ in sides))


class Arithmetic(Task):  # compute an expression of several operations
    def __init__(self, operations=3, high=20, max_value=400):
        if not 1 <= operations <= 8 or not 2 <= high <= 100 or not 10 <= max_value <= 999:
            raise ValueError("needs 1 to 8 operations, high in 2..100 and max_value in 10..999")
        self.operations, self.high, self.max_value = operations, high, max_value

    def draw(self, rng):
        while True:
            numbers = [rng.randint(1, self.high) for _ in range(self.operations + 1)]
            items, steps = [(number, (str(number), 3)) for number in numbers], []
            while len(items) > 1:
                i, operator = rng.randrange(len(items) - 1), rng.choice("+-*")
                (a, left), (b, right) = items[i : i + 2]
                value = apply(a, operator, b, self.max_value)
                if value is None:
                    break
                steps.append([a, operator, b])
                items[i : i + 2] = [(value, write(left, operator, right))]
            else:
                return {"expression": items[0][1][0], "value": items[0][0], "steps": steps}

    def question(self, text):
        return {"expression": text.replace(" ", ""), "value": int(evaluate(text)[0])}

    def key(self, problem):
        return problem["expression"]

    def prompt(self, problem):
        return f"{ARITHMETIC[0]}{problem['expression']}{ARITHMETIC[1]}"

    def answer(self, text):
        """The integer on the answer line; without such a line the last one of the text."""
        text = after_thought(text)
        integers = [] if ANSWER_LINE.search(text) else re.findall(INTEGER, text)
        sides = equation(extract_answer(text) or "".join(integers[-1:]))
        return next((spelling for _, _, spelling in sides if spelling.isdigit()), None)

    def reward(self, problem, text):
        return float(self.answer(text) == str(problem["value"]))


NUMBER = re.compile(
    r"[+-]?(?:(?:[0-9]+~)?[0-9]+/0*[1-9][0-9]*"
    r"|(?=\.?[0-9])[0-9]*\.?[0-9]*(?:[eE][+-]?[0-9]{1,2}|\\overline\{[0-9]+\})?)"
)
# A plural s is understood. A single letter may be a variable, unless it is text
UNIT = "|".join(UNITS.split())
UNIT = rf'(.+?)~*(?:"|(?<![A-Za-z\\])(?=[A-Za-z]{{2}}))({UNIT})(?:e?s)?\.?"?((?:\^[23])?)\.?"?'
TEXT = re.compile(r'"|:|(?<![A-Za-z\\{])[A-Za-z]{3}|^[A-Za-z~,]+$|^[0-9A-F]+_')
worker, lock = None, threading.Lock()  # the process that asks math-verify; False: it doesn't start
INSIDE = balanced(r"(\[{", r")\]}")
COMMA = re.compile(rf",(?!{INSIDE}[)\]}}])")
GROUP = re.compile(rf"\\?([(\[{{])({INSIDE}?)\\?([)\]}}])")
NAME = re.compile(
    r'((?:\\(?!frac|sqrt|not|ne|le|ge)[a-z]+(?![a-z])|["A-Za-z~])+(?:_\w|_\{\w+\})?(?:\([^()=]*\))?'
    r"|\([A-Za-z,]+\))(?:=|\\in(?![a-z]))(?:[^=]*=)*(?=.)"
)


def number(text):
    """A number in lowest terms; "" for anything else."""
    plain = rewrite(text, NUMERALS)
    if not NUMBER.fullmatch(plain):
        return ""
    digits, _, period = plain.strip("+-}").partition(r"\overline{")
    value = sum(map(Fraction, digits.split("~")))
    if period:
        places = len(digits.partition(".")[2])
        value += Fraction(int(period), (10 ** len(period) - 1) * 10**places)
    return str(-value if plain[0] == "-" else value)


def parse(text, table=LATEX):
    """[name, value, unit] with a number, text behind a quotation mark, or LaTeX as value. Of a list
    [name, nodes, brackets]: {} of a set, and of a bare list of anything but words."""
    text = rewrite(text, table)
    found = GROUP.fullmatch(text)
    brackets = found[1] + found[3] if found else "()" if TEXT.search(text) else "{}"
    parts = COMMA.split(found[2] if found else text)
    if len(parts) > 1:
        nodes = [parse(part, "") for part in parts]
        if brackets == "{}":  # in one order: numbers first
            nodes.sort(key=lambda node: ("\\" in str(node), str(node)))
        return [None, nodes, brackets]
    if found:
        return parse(found[2], "")
    if found := NAME.match(text):
        return [found[1].rstrip('"').casefold(), *parse(text[found.end() :], "")[1:]]
    unit = ""
    if found := re.fullmatch(UNIT, text):
        text, unit = found[1], found[2] + found[3]
    if value := number(text):
        text = value
    elif TEXT.search(text):
        text = '"' + re.sub(r'["{}~]', "", text).casefold()
    return [None, text, unit]


def spell(node):
    """One spelling for all answers with the value of the node."""
    _, value, brackets = node
    if isinstance(value, list):
        return brackets[0] + ", ".join(map(spell, value)) + brackets[1]
    return value.lstrip('"')


def agree(right, answer, same):
    """Whether nodes are equal, by same(a, b) of values; name and unit unless they are missing."""
    (name, value, unit), (other_name, other_value, other_unit) = right, answer
    if name == other_value or other_name == value:  # (B) 12 is as right as B
        return True
    for one, other in ((name, other_name), (unit, other_unit)):
        if one and other and one != other:
            return False
    if isinstance(value, list) and len(value) == len(other_value):
        return all(agree(*pair, same) for pair in zip(value, other_value, strict=True))
    return same(value, other_value)


@functools.lru_cache(maxsize=100_000)  # the completions of a problem mostly agree
def equivalent(right, answer):
    """The worker's verdict on two answers; False when it dies of it, or isn't there."""
    global worker
    with lock, contextlib.suppress(OSError):
        process, worker = worker, None  # an interrupt loses the process, and with it a late reply
        if process is None or (process and process.poll() is not None):
            pipes = {"stdin": PIPE, "stdout": PIPE, "stderr": DEVNULL, "text": True}
            process = Popen([sys.executable, __file__], **pipes, start_new_session=True)
            if not process.stdout.readline():
                process.wait()
                process = False
                print("note: no math-verify: numbers and text are compared alone", file=sys.stderr)
        reply = ""
        if process:
            print(json.dumps([right, answer]), file=process.stdin, flush=True)
            reply = process.stdout.readline() or process.wait()
        worker = process
        return reply == "1\n"
    return False


def exact_library():
    """same(right, answer) of values, by math-verify without its tolerances, and without eval."""
    import math_verify
    import sympy.physics.units  # reads texts by eval when first imported

    def read_number(text, **options):
        return sympy.Rational(text)

    def equal(a, b, *tolerances):
        return all(entry.equals(0) for entry in sympy.Matrix([(a - b).doit()]))

    def same(right, answer):
        spelled = re.fullmatch('-?[0-9/]+,-?[0-9/]+|.*".*', f"{right},{answer}")  # numbers, or text
        if right == answer or spelled or ("=" in right) != ("=" in answer):
            return right == answer
        read = math_verify.parser.parse_latex_cached
        pair = [read(text.replace("~", " ")) for text in (right, answer)]
        return math_verify.verify(*pair, timeout_seconds=None)

    sympy.parsing.sympy_parser.parse_expr = (
        read_number  # without it sympy reads even numbers by eval
    )
    math_verify.grader.sympy_numeric_eq = equal
    math_verify.grader.sympy_solve_and_compare = None  # takes equations without solutions for equal
    assert same(r"\frac{1}{2}+x", "x+0.5")
    return same


def serve():
    """The worker: 1 or 0 for each line [right, answer]. An alarm ends it when a pair takes long."""
    import resource  # not on Windows, where the alarm is missing as well

    replies, sys.stdout = sys.stdout, sys.stderr  # what the libraries print is no reply
    signal.alarm(60)
    same = exact_library()
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
    signal.alarm(0)
    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        signal.alarm(MAX_SECONDS)
        verdict = False
        with contextlib.suppress(Exception):  # LaTeX that the library can't read
            verdict = agree(*map(parse, json.loads(line)), same)
        signal.alarm(0)
        print(int(verdict), file=replies, flush=True)


class Math:
    """Problems of a JSONL file; a checksum decides on the split, unless a row does."""

    def __init__(self, path=""):
        self.path, self.rows = path, {}
        lines = Path(path).read_bytes().split(b"\n") if path else []  # none: for `question` alone
        for number, line in enumerate(lines, 1):
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
        for name, limit in (("problem", MAX_TEXT), ("answer", MAX_ANSWER)):
            text = row.get(name)
            if not isinstance(text, str) or len(text) > limit or not text.strip("$ \n"):
                raise ValueError(f'"{name}" must be a text of 1 to {limit} characters')
        row = {"split": split_of(row["problem"]), **row}
        if row["split"] not in SPLITS:
            raise ValueError('"split" must be "train", "validation" or "test"')
        return row

    def problems(self, split, count, seed):
        rows = [row for row in self.rows.values() if row["split"] == split]
        if not rows:
            part = f'in the split "{split}", of {len(self.rows)} in all'
            raise ValueError(f"task math: --data {self.path or '(none)'} has no problem {part}")
        random.Random(f"{split} {seed}").shuffle(rows)
        return rows[:count]

    def question(self, text):
        return {"problem": text, "answer": ""}

    def prompt(self, problem):
        return problem["problem"] + MATH

    def answer(self, text):
        return spell(parse(final_answer(text))) or None

    def reward(self, problem, text):
        texts = problem["answer"], final_answer(text)
        right, answer = map(parse, texts)
        given = right[1] and answer[1]
        return float(bool(given and (agree(right, answer, eq) or equivalent(*texts))))


TASKS = {"countdown": Countdown, "arithmetic": Arithmetic, "math": Math}


def make_task(name, data=""):
    """The task of a name with options like "countdown:numbers=4,high=30", or "math" with a file."""
    kind, _, options = name.replace(" ", "").partition(":")
    if kind not in TASKS:
        raise ValueError(f"unknown task {kind!r}; there are: {', '.join(TASKS)}")
    try:
        if data and kind != "math":
            raise ValueError(f"takes no --data {data}")
        pairs = [pair.split("=") for pair in options.split(",") if pair]
        return TASKS[kind](*[data] * bool(data), **{key: int(value) for key, value in pairs})
    except (TypeError, ValueError) as error:
        raise ValueError(f"task {name}: {error}") from None


if __name__ == "__main__":
    serve()
