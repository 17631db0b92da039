"""The reasoning environments, and tokenizers. A task has these methods:

    problems(split, count, seed) -> list    up to `count` distinct ones; the splits never share one
    prompt(problem) -> str                  the question, and the format of the answer
    answer(text) -> str or None             what a completion answers; votes count these spellings
    reward(problem, text) -> 0.0 or 1.0     the verifier; `text` is any string at all
    question(text) -> problem               what a person asks with --ask, or ValueError

Completions are hostile: they are parsed, with bounds on length, depth and the size of integers, and
never evaluated. Run as a program, this file is the worker in which Math asks math-verify.
"""

import ast
import json
import re
import sys
import threading
import zlib
from contextlib import suppress
from fractions import Fraction
from functools import lru_cache, partial
from operator import add, eq, mul, sub
from pathlib import Path
from random import Random
from subprocess import DEVNULL, PIPE, Popen

from tiktoken import Encoding

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
FILE = (Path(__file__).parent / "math_task/spellings.txt").read_text("utf-8")
*TABLES, UNITS = FILE.split("\n\n")
EXPRESSION, LATEX, NUMERALS = [re.findall(r"(\S+?)=>(\S*)", table) for table in TABLES]
SPLITS = ("test", "validation", *["train"] * 8)
MAX_ANSWER, MAX_TEXT = 200, 20_000


class TinyTokenizer:  # integers below 1000, WORDS and role markers are single tokens
    def __init__(self):
        ranks = {bytes([byte]): byte for byte in range(256)}
        for word in [*WORDS, *map(str, range(10, 1000))]:
            ranks[word.encode()] = len(ranks)
        self.markers = [*map(CANDIDATE.format, range(1, 17)), CANDIDATE_END, AGGREGATE]
        special = {marker: len(ranks) + i for i, marker in enumerate(self.markers)}
        pattern = "|".join(map(re.escape, WORDS)) + r"|[0-9]{1,3}|[\s\S]"
        self.encoding = Encoding(
            "tiny", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special
        )
        self.eos_ids = [self.encoding.n_vocab]  # no text is encoded as this one

    def encode(self, text):
        return self.encoding.encode_ordinary(text)

    def decode(self, tokens):
        return self.encoding.decode([t for t in tokens if t not in self.eos_ids], errors="replace")

    def chat(self, text):  # markers in `text` become role markers
        return self.encoding.encode(text, allowed_special="all")


class HubTokenizer:  # of Hugging Face: its chat template. Every special token ends a completion
    def __init__(self, path, settings):
        from transformers import AutoTokenizer, GenerationConfig  # the worker has no use for them

        with suppress(OSError):  # no generation_config.json
            settings = GenerationConfig.from_pretrained(path)
        ends = settings.eos_token_id
        try:
            self.hf = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
            self.eos_ids = {*self.hf.all_special_ids, *(ends if isinstance(ends, list) else [ends])}
            assert self.chat("one") != self.chat("two"), "it leaves out the message"
        except Exception as error:  # a template is somebody else's program
            raise ValueError(f"{path}: tokenizer or chat template fails: {error}") from None
        self.encode = partial(self.hf.encode, add_special_tokens=False)
        self.decode = partial(self.hf.decode, skip_special_tokens=True)
        added = self.hf.added_tokens_decoder.values()
        self.markers = [x.content for x in added if re.search(r"[<[|].*[]>|]", x.content)]

    def chat(self, text):
        if self.hf.chat_template:
            return self.hf.apply_chat_template(
                [{"role": "user", "content": text}],
                add_generation_prompt=True,
                return_dict=False,
                date_string="26 Jul 2024",  # else some prompts change overnight
            )
        return [t for t in self.hf.encode(text) if t != self.hf.eos_token_id]  # some end every text


def rewrite(text, table):
    for pattern, replacement in table:
        text = re.sub(pattern, replacement, text)
    return text


def balanced(opening, closing):
    """A pattern of text in which these brackets match, up to 20 deep."""
    pattern = other = f"[^{opening}{closing}]"
    for _ in range(20):
        pattern = f"(?:{other}|[{opening}]{pattern}*[{closing}])"
    return pattern + "*"


ANSWER_LINE = r"(?i)answer(?: is)?[*_ ]{0,4}[:：](?:[\s$*`}]|\\[(\[])*(?=(.*))"
INTEGER = r"(?<![0-9.,])(?:(?<![0-9)])[-−–])?[0-9][0-9,.]{0,200}"
BOX = rf"\\(?:boxed|fbox)\s*(?:\{{({balanced('{', '}')})\}}"
BOX += r"|([-−]?[0-9][^\s$}]*|[A-Za-z](?![A-Za-z])))"  # without braces


def after_thought(text):
    return text.rpartition("</think>")[2].partition("<think>")[0][-MAX_TEXT:]


def extract_answer(text):
    """What follows the last "Answer:", blank lines skipped, undecorated; None: nothing."""
    *_, line = "", *re.findall(ANSWER_LINE, after_thought(text))
    return line[:MAX_ANSWER].rstrip(" \t\r.$*`") or None


def final_answer(text):
    r"""The last \boxed{...} of 1 to 200 characters, else the last "Answer:" line, else ""."""
    boxes = map("".join, re.findall(BOX, after_thought(text)))
    *_, box = "", *[box for box in boxes if 0 < len(box) <= MAX_ANSWER]
    return box or extract_answer(text) or ""


NODES = {ast.Add: add, ast.Sub: sub, ast.Mult: mul, ast.Div: Fraction}
SHORT = r"(?!.*[0-9]{10})(?!(?:[^(]*\(){21})[-+*/() 0-9]{1,200}"


def calculate(tree):
    if isinstance(tree, ast.Constant):
        return Fraction(tree.value)
    return NODES[type(tree.op)](calculate(tree.left), calculate(tree.right))


def evaluate(text):
    """(value, integers, spelling) of an expression with + - * / and parentheses; ValueError for
    anything else: over 200 characters, 9 digits or 20 parentheses, `**`, signs, division by 0."""
    try:
        tree = ast.parse(re.fullmatch(SHORT, text.strip())[0], mode="eval").body
        integers = [*map(int, re.findall("[0-9]+", text))]
        return calculate(tree), integers, ast.unparse(tree).replace(" ", "")
    except Exception:  # hostile text fails in any way
        raise ValueError(f"{text[:MAX_ANSWER]!r} is no short expression with + - * /") from None


def equation(text):
    """What `evaluate` says of each side of an equation; [] unless all have one value."""
    with suppress(ValueError):
        sides = [evaluate(side) for side in rewrite(text, EXPRESSION).split("=")]
        if len({side[0] for side in sides}) == 1:
            return sides
    return []


def apply(a, operator, b, limit):
    """a operator b as a non-negative integer (+ - *: up to `limit`), or None."""
    if operator == "/":
        return a // b if b and a % b == 0 else None
    value = {"+": a + b, "-": a - b, "*": a * b}[operator]
    return value if 0 <= value <= limit else None


def join(left, operator, right, limit):
    """(text, value, precedence) of two such, with the parentheses that are needed, or None."""
    (first, a, one), (second, b, other) = left, right
    mine = 1 + (operator in "*/")
    first = f"({first})" if one < mine else first
    second = f"({second})" if other < mine + (operator in "-/") else second
    value = apply(a, operator, b, limit)
    return None if value is None else (first + operator + second, value, mine)


def split_of(text):  # by a checksum, for ever
    return SPLITS[zlib.crc32(text.encode()) % 10]


class Task:
    def problems(self, split, count, seed):
        """Up to `count` distinct problems: fewer when 10,000 draws in a row bring no new one."""
        rng, found, misses = Random(f"{split} {seed}"), {}, 0
        while len(found) < count and misses < 10_000:
            misses += 1
            problem = self.combine([rng.randint(1, self.high) for _ in range(self.size)], rng)
            if not problem:
                continue
            key = self.key(problem)
            if split == split_of(key) and key not in found:
                found[key] = problem
                misses = 0
        if not found:
            raise ValueError(f"{type(self).__name__} has no problem in the split {split!r}")
        return list(found.values())


class Countdown(Task):  # reach a target with each given number used exactly once
    def __init__(self, numbers=3, high=30, max_target=120):
        if not 2 <= numbers <= 6 or not 2 <= high <= 100 or not high <= max_target <= 999:
            raise ValueError("needs 2 to 6 numbers, high in 2..100 and max_target in high..999")
        self.size, self.high, self.max_target = numbers, high, max_target

    def attempt(self, numbers, rng):
        """A random way to combine all the numbers: (steps like "3*7=21", expression, value)."""
        items, steps = [(str(number), number, 3) for number in numbers], []
        while len(items) > 1:
            left, right = rng.sample(items, 2)
            operator = rng.choice("++--**/")
            if joined := join(left, operator, right, 2 * self.max_target):
                steps.append(f"{left[1]}{operator}{right[1]}={joined[1]}")
                items = [item for item in items if item is not left and item is not right]
                items.append(joined)
        return steps, *items[0][:2]

    def combine(self, numbers, rng):
        steps, solution, target = self.attempt(numbers, rng)
        if 1 <= target <= self.max_target and target not in numbers:
            return {"numbers": numbers, "target": target, "steps": steps, "solution": solution}

    def question(self, text):
        numbers = [*map(int, re.findall("[0-9]{1,9}", text))]
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
        return max(sides, key=lambda side: len(side[1]), default=[None] * 3)[2]

    def reward(self, problem, text):
        value, integers, _ = evaluate(self.answer(text) or "0")  # a number alone solves nothing
        answered = {"numbers": integers, "target": value}
        return float(self.key(answered) == self.key(problem))


class Arithmetic(Task):  # compute an expression of several operations
    def __init__(self, operations=3, high=20, max_value=400):
        if not 1 <= operations <= 8 or not 2 <= high <= 100 or not 10 <= max_value <= 999:
            raise ValueError("needs 1 to 8 operations, high in 2..100 and max_value in 10..999")
        self.size, self.high, self.max_value = operations + 1, high, max_value

    def combine(self, numbers, rng):
        items, steps = [(str(number), number, 3) for number in numbers], []
        while len(items) > 1:
            i, operator = rng.randrange(len(items) - 1), rng.choice("+-*")
            left, right = items[i : i + 2]
            joined = join(left, operator, right, self.max_value)
            if not joined:
                return
            steps.append([left[1], operator, right[1]])
            items[i : i + 2] = [joined]
        expression, value, _ = items[0]
        return {"expression": expression, "value": value, "steps": steps}

    def question(self, text):
        return {"expression": text.replace(" ", ""), "value": int(evaluate(text)[0])}

    def key(self, problem):
        return problem["expression"]

    def prompt(self, problem):
        return f"{ARITHMETIC[0]}{problem['expression']}{ARITHMETIC[1]}"

    def answer(self, text):
        """The integer on the answer line; without such a line the last one of the text."""
        text = after_thought(text)
        integers = [] if re.search(ANSWER_LINE, text) else re.findall(INTEGER, text)
        sides = equation(extract_answer(text) or "".join(integers[-1:]))
        return next((side[2] for side in sides if side[2].isdigit()), None)

    def reward(self, problem, text):
        return float(self.answer(text) == str(problem["value"]))


DECIMAL = r"(?=\.?[0-9])[0-9]*\.?[0-9]*(?:[eE][+-]?[0-9]{1,2}|\\overline\{[0-9]+\})?"
NUMBER = rf"[+-]?(?:(?:[0-9]+~)?[0-9]+/0*[1-9][0-9]*|{DECIMAL})"
# A plural s is understood. A single letter may be a variable, unless it is text
UNIT = "|".join(UNITS.split())
UNIT = rf'(.*?[^"])~*(?:"|(?<![A-Za-z\\])(?=[A-Za-z]{{2}}))({UNIT})(?:e?s)?\.?"?((?:\^[23])?)\.?"?'
TEXT = r'"|:|(?<![A-Za-z\\{])[A-Za-z]{3}|^[A-Za-z~,]+$|^[0-9A-F]+_'
worker, lock = None, threading.Lock()  # the process that asks math-verify; False: it doesn't start
INSIDE = balanced(r"(\[{", r")\]}")
GROUP = rf"\\?([(\[{{])({INSIDE}?)\\?([)\]}}])"
NAME = r'(?:\\(?!frac|sqrt|not|ne|le|ge)[a-z]+(?![a-z])|["A-Za-z~])+(?:_\w|_\{\w+\})?'
NAME = rf"({NAME}(?:\([^()=]*\))?|\([A-Za-z,]+\))(?:=|\\in(?![a-z]))(?:[^=]*=)*(.+)"


def number(text):
    """A number in lowest terms; "" for anything else."""
    plain = rewrite(text, NUMERALS)
    if not re.fullmatch(NUMBER, plain):
        return ""
    digits, _, period = plain.strip("+-}").partition(r"\overline{")
    value = sum(map(Fraction, digits.split("~")))
    if period:
        value += Fraction(int(period), 10 ** len(period) - 1) / 10 ** len(digits.partition(".")[2])
    return str(-value if plain[0] == "-" else value)


def parse(text, table=LATEX):
    """[name, value, unit] with a number, text behind a quotation mark, or LaTeX as value. Of a list
    [name, nodes, brackets]: {} of a set, and of a bare list of anything but words."""
    text = rewrite(text, table)
    found = re.fullmatch(GROUP, text)
    brackets = found[1] + found[3] if found else "()" if re.search(TEXT, text) else "{}"
    parts = re.split(rf",(?!{INSIDE}[)\]}}])", found[2] if found else text)
    if len(parts) > 1:
        nodes = [parse(part, ()) for part in parts]
        if brackets == "{}":  # in one order
            nodes.sort(key=str)
        return ["", nodes, brackets]
    if found:
        return parse(found[2], ())
    if found := re.fullmatch(NAME, text):
        return [found[1].casefold(), *parse(found[2], ())[1:]]
    unit = ""
    if found := re.fullmatch(UNIT, text):
        text, unit = found[1], found[2] + found[3]
    value = number(text)
    if not value and re.search(TEXT, text):
        value = '"' + re.sub(r'["{}~]', "", text).casefold()
    return ["", value or text, unit]


def spell(node):
    """One spelling for all answers with the value of the node."""
    _, value, brackets = node
    if isinstance(value, list):
        return ", ".join(map(spell, value)).join(brackets)  # which go around it
    return value.lstrip('"')


def agree(right, answer, same):
    """Whether nodes are equal, by same(a, b) of values; name and unit unless they are missing."""
    names, values, units = zip(right, answer, strict=True)
    value, other = values
    if '"' in names[0] == other or '"' in names[1] == value:  # of (B) 12, "b is enough
        return True
    if any(a and b and a != b for a, b in (names, units)):
        return False
    if type(value) is type(other) is list and len(value) == len(other):
        if units[0] == "{}":
            here, there = ([sum(agree(a, b, same) for b in side) for a in value] for side in values)
            return here == there  # each as often as in the other list
        return all(agree(*pair, same) for pair in zip(*values, strict=True))
    if number(str(value)):  # for 5 as an answer a + b = 5 is right
        other = re.sub(".*[^<>!:]=", "", str(other))
    return same(value, other)


@lru_cache(100_000)  # the completions of a problem mostly agree
def equivalent(right, answer):
    """The worker's verdict on two answers; False when it dies of it, or isn't there."""
    global worker
    with lock, suppress(OSError):
        process, worker = worker, None  # an interrupt loses the process, and with it a late reply
        if process is None or (process and process.poll() is not None):
            pipes = {"stdin": PIPE, "stdout": PIPE, "stderr": DEVNULL, "text": True}
            process = Popen([sys.executable, "-u", __file__], **pipes, start_new_session=True)
            if not process.stdout.readline():
                process.wait()
                process = False
                print("note: no math-verify: LaTeX is compared by spelling", file=sys.stderr)
        reply = ""
        if process:
            print(json.dumps([right, answer]), file=process.stdin, flush=True)
            reply = process.stdout.readline() or process.wait()
        worker = process
        return reply == "True\n"
    return False


def library(right, answer):
    """Whether two values are equal by math-verify, as serve() changes it."""
    from math_verify import parser, verify

    spelled = re.fullmatch('-?[0-9/]+,-?[0-9/]+|.*".*', f"{right},{answer}")  # numbers, or text
    if right == answer or spelled or ("=" in right) != ("=" in answer):
        return right == answer
    pair = [parser.parse_latex_cached(text.replace("~", " ")) for text in (right, answer)]
    return verify(*pair, timeout_seconds=None)


def serve():
    """The worker: a verdict a line [right, answer], without tolerances, eval, and long thought."""
    import resource  # not on Windows, where the timer is missing as well
    from signal import ITIMER_PROF, setitimer  # of CPU time: a busy machine judges the same

    replies, sys.stdout = sys.stdout, sys.stderr  # what the libraries print is no reply
    import sympy.physics.units  # reads texts by eval when first imported
    from latex2sympy2_extended import latex2sympy2, symbols
    from math_verify import grader

    def equal(a, b, *tolerances):
        difference = (a - b).doit().subs(symbols.get_symbol("i"), sympy.I)
        return all(entry.equals(0) for entry in sympy.Matrix([difference]))

    # without this, sympy reads even numbers by eval
    sympy.parsing.sympy_parser.parse_expr = lambda text, **options: sympy.Rational(text)
    latex2sympy2.get_symbol = lambda text, *_: symbols.get_symbol(text)  # real; R is no r
    grader.sympy_numeric_eq = equal
    grader.sympy_solve_and_compare = None  # takes equations without solutions for equal
    assert library(r"\frac{1}{2}+x", "x+0.5")
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_AS, [4 << 30] * 2)
    print(file=replies)  # ready
    for line in sys.stdin:
        setitimer(ITIMER_PROF, 3)
        verdict = False
        with suppress(Exception):  # LaTeX that the library can't read
            verdict = agree(*map(parse, json.loads(line)), library)
        print(verdict, file=replies)


class Math:  # problems of a JSONL file; a checksum decides on the split, unless a row does
    def __init__(self, path=""):
        self.rows = {}
        lines = Path(path).read_bytes().split(b"\n") if path else []  # none: for `question` alone
        for number, line in enumerate(lines, 1):
            try:
                if line.strip():
                    self.add(json.loads(line, parse_float=str, parse_int=str))  # digits as written
            except (ValueError, RecursionError) as error:
                reason = getattr(error, "msg", error)
                raise ValueError(f"{path} line {number}: {reason}") from None

    def add(self, row):
        if not isinstance(row, dict):
            raise ValueError("not a JSON object")
        for name, limit in ("problem", MAX_TEXT), ("answer", MAX_ANSWER):
            text = row.get(name)
            if not isinstance(text, str) or len(text) > limit or not text.strip("$ \n"):
                raise ValueError(f'"{name}" must be 1 to {limit} characters, not only $')
        if row.setdefault("split", split_of(row["problem"])) not in SPLITS:
            raise ValueError('"split" must be "train", "validation" or "test"')
        self.rows.setdefault(row["problem"], row)

    def problems(self, split, count, seed):
        rows = [row for row in self.rows.values() if row["split"] == split]
        if not rows:
            raise ValueError(f"math: no --data, or none in the split {split!r}")
        Random(f"{split} {seed}").shuffle(rows)
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
        return float(answer[1] != "" and (agree(right, answer, eq) or equivalent(*texts)))


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
        return TASKS[kind](*data.splitlines(), **{key: int(value) for key, value in pairs})
    except (TypeError, ValueError) as error:
        raise ValueError(f"task {name}: {error}") from None


if __name__ == "__main__":
    serve()
