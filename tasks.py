"""The reasoning tasks: what to ask, and how to tell whether the answer is right.

A task is any object with these methods:

    problems(split, count, seed) -> list    up to `count` distinct ones; the splits never share one
    prompt(problem) -> str                  the question, and the format of the answer
    answer(text) -> str or None             what a completion answers; a vote counts these
    reward(problem, text) -> 0.0 or 1.0     the verifier; `text` is any string at all
    question(text) -> problem               what a person asks with --ask, or ValueError
    example                                 such a text (these two may be missing)

Countdown and Arithmetic come first, then what they are made of: random problems, rows of a file,
and the reading of answers. Competition mathematics is in the folder math_task/.

The texts that a verifier reads come from a model that is paid for what the verifier believes. They
are parsed, within bounds, and never evaluated.
"""

import inspect
import json
import re
import zlib
from dataclasses import dataclass
from fractions import Fraction
from itertools import groupby
from pathlib import Path
from random import Random
from typing import NamedTuple

SPLITS = ("test", "validation", *["train"] * 8)
MAX_TEXT = 20_000  # characters of a completion that are read: the last ones
MAX_ANSWER = 200  # characters of an answer
MAX_DIGITS = 9  # of a number in an answer
MAX_DEPTH = 20  # of brackets in brackets in an answer


def split_of(text):
    """The split of a problem: a checksum of its text decides, on every machine and for ever."""
    return SPLITS[zlib.crc32(text.encode()) % 10]


def check_option(name, value, smallest, largest):
    if not isinstance(value, int) or not smallest <= value <= largest:
        raise ValueError(f"{name}={value}: needs an integer from {smallest} to {largest}")


class RandomTask:
    """Problems made of random numbers up to `high`; `sizes` says how many numbers there may be."""

    def problems(self, split, count, seed):
        """Up to `count` distinct problems: fewer when 10,000 draws in a row bring no new one."""
        rng = Random(f"{split} {seed}")
        problems = {}
        draws_in_vain = 0
        while len(problems) < count and draws_in_vain < 10_000:
            draws_in_vain += 1
            size = self.sizes[0]
            if len(self.sizes) > 1:
                size = rng.choice(self.sizes)
            numbers = [rng.randint(1, self.high) for _ in range(size)]
            problem = self.make_problem(numbers, rng)
            if problem is None:
                continue
            key = self.key(problem)
            if split_of(key) == split and key not in problems:
                problems[key] = problem
                draws_in_vain = 0
        if not problems:
            raise ValueError(f"{type(self).__name__} has no problem in the split {split!r}")
        return list(problems.values())


# ---- Countdown: reach a target with each of the given numbers used exactly once ----

COUNTDOWN_PROMPT = (
    "Use all the numbers, each exactly once, with + - * / and parentheses to reach the target.\n"
    "Numbers: {}\nTarget: {}\n"
    'Think step by step, then end with one line "Answer: <expression>".\n'
)


class Countdown(RandomTask):
    """`numbers` says how many there are: 3, or "3-4" for both. `data` is a file of puzzles."""

    example = "4 9 13 61"

    def __init__(self, numbers=3, high=30, max_target=120, data=""):
        if not re.fullmatch("[2-6](-[2-6])?", str(numbers)):
            raise ValueError(f"numbers={numbers}: needs 2 to 6, or a range such as 3-4")
        smallest, _, largest = str(numbers).partition("-")
        check_option("high", high, 2, 100)
        check_option("max_target", max_target, high, 999)
        self.sizes = range(int(smallest), int(largest or smallest) + 1)
        if not self.sizes:
            raise ValueError(f"numbers={numbers}: the range is empty")
        self.high = high
        self.max_target = max_target
        self.puzzles = read_puzzles(data) if data else None

    def problems(self, split, count, seed):
        if self.puzzles is None:
            return super().problems(split, count, seed)
        chosen = [puzzle for puzzle in self.puzzles if puzzle["split"] == split]
        if not chosen:
            raise ValueError(f"countdown: no row of --data is in the split {split!r}")
        Random(f"{split} {seed}").shuffle(chosen)
        return chosen[:count]

    def attempt(self, numbers, rng):
        """A random way to combine all the numbers: (steps like "3*7=21", expression, value)."""
        parts = [Part(str(number), number, rank=3) for number in numbers]
        steps = []
        while len(parts) > 1:
            left, right = rng.sample(parts, 2)
            operator = rng.choice("++--**/")
            joined = join(left, operator, right, limit=2 * self.max_target)
            if joined is None:
                continue
            steps.append(f"{left.value}{operator}{right.value}={joined.value}")
            parts = [part for part in parts if part is not left and part is not right]
            parts.append(joined)
        return steps, parts[0].text, parts[0].value

    def make_problem(self, numbers, rng):
        steps, solution, target = self.attempt(numbers, rng)
        if target in numbers or not 1 <= target <= self.max_target:
            return None
        return {"numbers": numbers, "target": target, "steps": steps, "solution": solution}

    def question(self, text):
        """The problem of "4 9 13 61": the last number is the target."""
        numbers = [int(digits) for digits in re.findall("[0-9]{1,9}", text)]
        if not 3 <= len(numbers) <= 7:
            raise ValueError(f"{text!r}: give 2 to 6 numbers, and then the target")
        return {"numbers": numbers[:-1], "target": numbers[-1]}

    def key(self, problem):
        return puzzle_key(problem["numbers"], problem["target"])

    def prompt(self, problem):
        numbers = " ".join(str(number) for number in problem["numbers"])
        return COUNTDOWN_PROMPT.format(numbers, problem["target"])

    def solution(self, text):
        """The Expression of the answer: of "3*7+5 = 21+5 = 26" the side with the most numbers."""
        sides = read_answer(extract_answer(text, ALL_MARKS))
        return max(sides, key=lambda side: len(side.numbers), default=None)

    def answer(self, text):
        """The solution in one spelling for all orders and brackets: a vote counts solutions.

        13*4+9, 9+13*4, 4*13+9 and (9+(4*13)) all are 13*4+9.
        """
        solution = self.solution(text)
        if solution is None:
            return None
        return solution.spelling

    def reward(self, problem, text):
        solution = self.solution(text)
        if solution is None:
            return 0.0
        uses_each_number_once = sorted(solution.numbers) == sorted(problem["numbers"])
        return float(uses_each_number_once and solution.value == problem["target"])


# ---- Arithmetic: compute an expression of several operations ----

ARITHMETIC_PROMPT = 'Compute {}\nThink step by step, then end with one line "Answer: <integer>".\n'


class Arithmetic(RandomTask):
    """`operations` of + - * on numbers up to `high`; no result on the way exceeds `max_value`."""

    example = "3*(4+5)"

    def __init__(self, operations=3, high=20, max_value=400):
        check_option("operations", operations, 1, 8)
        check_option("high", high, 2, 100)
        check_option("max_value", max_value, 10, 999)
        self.sizes = [operations + 1]
        self.high = high
        self.max_value = max_value

    def make_problem(self, numbers, rng):
        parts = [Part(str(number), number, rank=3) for number in numbers]
        steps = []
        while len(parts) > 1:
            i = rng.randrange(len(parts) - 1)
            operator = rng.choice("+-*")
            left, right = parts[i : i + 2]
            joined = join(left, operator, right, limit=self.max_value)
            if joined is None:
                return None
            steps.append([left.value, operator, right.value])
            parts[i : i + 2] = [joined]
        return {"expression": parts[0].text, "value": parts[0].value, "steps": steps}

    def question(self, text):
        """The problem of "3 * (4+5)"."""
        sides = read_answer(text)
        if len(sides) != 1 or re.search("[^-+*/() 0-9]", text):
            raise ValueError(f"{text[:MAX_ANSWER]!r} is no expression with + - * /")
        value = sides[0].value
        if value < 0 or value.denominator != 1:
            raise ValueError(f"{text!r} is {value}: ask for an integer of 0 or more")
        return {"expression": text.replace(" ", ""), "value": int(value)}

    def key(self, problem):
        return problem["expression"]

    def prompt(self, problem):
        return ARITHMETIC_PROMPT.format(problem["expression"])

    def answer(self, text):
        """The integer that the answer states, in digits."""
        line = extract_answer(text, ALL_MARKS)
        if line is None and not ANSWER_MARK.search(after_thought(text)):
            line = last_result(text)
        for side in read_answer(line):
            if side.kind == "number":
                return side.spelling
        return None

    def reward(self, problem, text):
        return float(self.answer(text) == str(problem["value"]))


# ---- All tasks by name ----

# The phrases that the tasks and the traces of the tiny policy are made of. Its tokenizer makes each
# of them one token, as well as each integer below 1000.
ANSWER = "Answer: "
YES = ": yes\n"
NO = ": no\n"
PHRASES_OF_PROMPTS = (*COUNTDOWN_PROMPT.split("{}"), *ARITHMETIC_PROMPT.split("{}"))
PHRASES = (*PHRASES_OF_PROMPTS, ANSWER, YES, NO, ", ", "none")
TASKS = {"countdown": Countdown, "arithmetic": Arithmetic}  # add yours; "math" is found as well


def make_task(name, data=""):
    """The task of a name such as "countdown:numbers=4,high=30"; `data` is a file of problems."""
    kind, _, options = name.replace(" ", "").partition(":")
    if kind == "math" and not options:
        from math_task import Math

        return Math(data)
    if kind not in TASKS:
        raise ValueError(f"unknown task {name!r}; there are: {', '.join(TASKS)}, math")

    known = list(inspect.signature(TASKS[kind]).parameters)
    arguments = {}
    if data:
        if "data" not in known:
            raise ValueError(f"task {name} takes no --data {data}")
        if options:
            raise ValueError(f"task {name}: with --data leave out the options, the rows decide")
        arguments["data"] = data
    for option in filter(None, options.split(",")):
        key, _, value = option.partition("=")
        if key not in known or key == "data":
            names = ", ".join(option for option in known if option != "data")
            raise ValueError(f"task {name}: no option {key!r}; there are: {names or 'none'}")
        arguments[key] = int(value) if value.isdecimal() else value
    try:
        return TASKS[kind](**arguments)
    except ValueError as error:
        raise ValueError(f"task {name}: {error}") from None


# ---- Random expressions ----


class Part(NamedTuple):
    """A part of a random expression. `rank` is 1 of a sum, 2 of a product, 3 of a number."""

    text: str
    value: int
    rank: int


def apply(a, operator, b, limit):
    """a operator b, or None unless it is an integer of 0 or more (of + - *: up to `limit`)."""
    if operator == "/":
        if b == 0 or a % b != 0:
            return None
        return a // b
    value = {"+": a + b, "-": a - b, "*": a * b}[operator]
    if 0 <= value <= limit:
        return value
    return None


def join(left, operator, right, limit):
    """The Part "left operator right" with the brackets that it needs, or None as `apply` says."""
    value = apply(left.value, operator, right.value, limit)
    if value is None:
        return None
    rank = 2 if operator in "*/" else 1
    left_text = left.text
    if left.rank < rank:
        left_text = f"({left_text})"
    right_text = right.text
    if right.rank < rank or (right.rank == rank and operator in "-/"):
        right_text = f"({right_text})"
    return Part(left_text + operator + right_text, value, rank)


# ---- Countdown puzzles from a file ----


def puzzle_key(numbers, target):
    return f"{sorted(numbers)} {target}"


def puzzle_of_row(row):
    """The puzzle of {"nums": [19, 36, 55, 7], "target": 65}, as TinyZero publishes them."""
    if not isinstance(row, dict):
        raise ValueError("not a JSON object")
    numbers = row.get("nums")
    target = row.get("target")
    if not isinstance(numbers, list) or not 2 <= len(numbers) <= 6:
        raise ValueError('"nums" must be a list of 2 to 6 integers')
    for number in (*numbers, target):
        if type(number) is not int or not 1 <= number <= 9999:
            raise ValueError('"nums" and "target" must be integers from 1 to 9999')
    split = row.get("split", split_of(puzzle_key(numbers, target)))
    if split not in SPLITS:
        raise ValueError('"split" must be "train", "validation" or "test"')
    return {"numbers": numbers, "target": target, "split": split}


def read_puzzles(path):
    """The puzzles of a JSONL file, each with its split. Equal ones count once, the first."""
    puzzles = {}
    for line_number, line in enumerate(Path(path).read_bytes().split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            puzzle = puzzle_of_row(json.loads(line))
        except (ValueError, RecursionError) as error:
            reason = getattr(error, "msg", error)  # of json, without its own line number
            raise ValueError(f"{path} line {line_number}: {reason}") from None
        puzzles.setdefault(puzzle_key(puzzle["numbers"], puzzle["target"]), puzzle)
    return list(puzzles.values())


# ---- Where a completion says its answer ----

MARKUP = r"(?:[\s$*`}]|\\[(\[])*"  # between a mark and the answer, line breaks included
ANSWER_MARK = re.compile(r"(?i)answer(?: is)?[*_ ]{0,4}[:：]" + MARKUP)
WEAKER_MARK = re.compile(
    r"(?im)(?:[<[](?:final[_ ])?answer[]>]"  # <answer>3*7+5</answer>
    r"|^[ #*_]{0,8}(?:the |my )?(?:final )?answer[ *_\r]{0,4}(?:$|(?=[0-9([{$\\`]))"  # a heading
    r"|\banswer(?: (?:to|for) [^.=\n]{0,40}?)?[*_ ]{0,4}"  # The answer is 3*7+5.
    r"(?:=|[-=]>|→|(?<=[\s*_])[-–]\s|\b(?:is|equals|(?:would|should|must) be)\b))" + MARKUP
)
BOX_MARK = re.compile(r"\\(?:boxed|fbox)\b")
ALL_MARKS = (ANSWER_MARK, WEAKER_MARK, BOX_MARK)

INTEGER = r"(?<![0-9.,])(?:(?<![0-9)])[-−–])?[0-9][0-9,.]{0,200}"
RESULT = re.compile(rf"[\s$*`+]*({INTEGER})(?![0-9]|\s*[-+*/]+\s*[0-9]|\s*[-+*/]\s*\()")


def after_thought(text):
    """The text behind <think>...</think>; "" where a thought doesn't end."""
    return text.rpartition("</think>")[2].partition("<think>")[0][-MAX_TEXT:]


def extract_answer(text, marks=(ANSWER_MARK, WEAKER_MARK)):
    """What follows the last "Answer:", undecorated, or the next weaker mark where there is none."""
    text = after_thought(text)
    for mark in marks:
        places = list(mark.finditer(text))
        if places:
            line = text[places[-1].end() :].partition("\n")[0]
            line = re.split(r"(?i)[<[]/(?:final[_ ])?answer", line)[0]
            if mark is WEAKER_MARK:
                line = re.split(r"\.\s+[A-Z]", line)[0]  # The answer is 26. I hope that this helps
            return line[:MAX_ANSWER].rstrip(" \t\r.$*`") or None
    return None


def last_result(text):
    """For a text that marks no answer: the result of the last equation in the last line that has
    numbers, 16 in "7+9=16 (Step 1)"; where that line has no equation, its last integer."""
    lines = [line for line in after_thought(text).split("\n") if re.search("[0-9]", line)]
    if not lines:
        return None
    _, equals, end_of_line = lines[-1].rpartition("=")
    if equals:
        result = RESULT.match(end_of_line)
        return result[1] if result else None
    integers = re.findall(INTEGER, end_of_line)
    return integers[-1] if integers else None


# ---- Expressions: numbers with + - * / and brackets ----


@dataclass
class Expression:
    """A number, a sum, or a product; in which order it was written is forgotten.

    (5)+3*7, 7*3+5 and 5+(7*3) are the sum of the operands 3*7 and 5.
    """

    value: Fraction
    numbers: list  # all of them, each as often as it occurs
    kind: str  # "number", "sum" or "product"
    direct: list  # spellings of what is added in a sum, or multiplied in a product
    inverse: list  # spellings of what is subtracted, or divided by

    @property
    def spelling(self):
        """One text for all ways to write this: operands in the order of their spellings."""
        direct_sign, inverse_sign = ("+", "-") if self.kind == "sum" else ("*", "/")
        text = direct_sign.join(sorted(self.direct))
        for operand in sorted(self.inverse):
            text += inverse_sign + operand
        return text

    def operands(self, kind):
        """What this contributes to a sum or product that it is part of: (direct, inverse)."""
        if self.kind == kind:
            return self.direct, self.inverse
        if self.kind == "sum":
            return [f"({self.spelling})"], []
        return [self.spelling], []


def combine(left, operator, right):
    """The Expression "left operator right"."""
    if operator == "+":
        value = left.value + right.value
    elif operator == "-":
        value = left.value - right.value
    elif operator == "*":
        value = left.value * right.value
    elif right.value == 0:
        raise ValueError("division by zero")
    else:
        value = left.value / right.value

    kind = "sum" if operator in "+-" else "product"
    left_direct, left_inverse = left.operands(kind)
    right_direct, right_inverse = right.operands(kind)
    if operator in "-/":  # a-(b-c) is a+c-b
        right_direct, right_inverse = right_inverse, right_direct
    return Expression(
        value=value,
        numbers=left.numbers + right.numbers,
        kind=kind,
        direct=left_direct + right_direct,
        inverse=left_inverse + right_inverse,
    )


def number_expression(digits):
    """The Expression of "26" or "1,021"."""
    digits = re.sub(r"[,\s]", "", digits)
    if not re.fullmatch("[0-9]+", digits) or len(digits) > MAX_DIGITS:
        raise ValueError(f"{digits!r} is no short integer")
    value = int(digits)
    return Expression(Fraction(value), [value], "number", direct=[str(value)], inverse=[])


class Parser:
    r"""Reads tokens as a sum of products of numbers, brackets, and \frac{sum}{sum}."""

    def __init__(self, tokens):
        self.tokens = [*tokens, "end"]
        self.position = 0
        self.depth = 0

    def next(self):
        return self.tokens[self.position]

    def take(self):
        self.position += 1
        return self.tokens[self.position - 1]

    def parse(self):
        expression = self.sum()
        if self.next() != "end":
            raise ValueError(f"{self.next()!r} is left over")
        return expression

    def sum(self):
        left = self.product()
        while self.next() in ("+", "-"):
            operator = self.take()
            left = combine(left, operator, self.product())
        return left

    def product(self):
        left = self.factor()
        operator = ""
        while self.next() in ("*", "/") or self.at_juxtaposed():
            if not self.at_juxtaposed():
                operator = self.take()
            elif operator == "/":
                raise ValueError("6/2(3) has two readings")
            else:
                operator = "*"
            left = combine(left, operator, self.factor())
        return left

    def at_juxtaposed(self):
        """Whether a factor follows without an operator, as in 4(11) and (7-1)4."""
        after_bracket = self.tokens[self.position - 1] == ")"
        return self.next() == "(" or (after_bracket and self.next()[0].isdigit())

    def factor(self):
        token = self.take()
        if token == r"\frac":
            numerator = self.factor()
            return combine(numerator, "/", self.factor())
        if token != "(":
            return number_expression(token)
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise ValueError("too many brackets in brackets")
        inside = self.sum()
        self.depth -= 1
        if self.take() != ")":
            raise ValueError("a bracket isn't closed")
        return inside


# ---- Answers as models write them, such as "$4 \times (7-1)$ = 4*6 = 24 (the target)" ----

CHARACTERS = str.maketrans(
    {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)}  # full-width forms
    | dict.fromkeys(map(ord, "−–—‒‐‑"), "-")
    | dict.fromkeys(map(ord, "×·⋅∙∗•✕✖"), "*")
    | dict.fromkeys(map(ord, "÷⁄∕"), "/")
    | dict.fromkeys(map(ord, "→⇒⟹⟶➔➜➡≡"), "=")
    | dict.fromkeys(map(ord, "$`_&\"'“”„‘’«»✓✔✅☑\ufe0f\u200b"), " ")
)
BRACKETS = str.maketrans("[{<]}>", "((()))")
LATEX = {  # what it means, and how it is written behind a backslash
    "*": "times|cdot|ast",
    "/": "div",
    "=": "to|implies|equiv|[rR]ightarrow|[lL]ongrightarrow",
    r" \\frac ": "[dtc]?frac",
    " ": "left|right|[bB]igg?[lr]?|boxed|fbox|text[a-z]*|math[a-z]*|[a-z]*style|underline|q?quad"
    "|checkmark",
}
TOKEN = r"[0-9]+(?:[,\s][0-9]{3}(?![0-9]))*(?:\.[0-9]+)?|\\?[A-Za-z]+|\S"  # 1,021 is one
SEPARATORS = "=,;:.!#"
EXPLANATION = r"(?i)([0-9)].*?)[(\s]*\b(?:because|since|using|where)\b.*"  # behind the answer
DOUBTFUL = set(  # words that put an answer in doubt ("t" ends isn't) or make another number of it
    """about above actually after almost approximately around attempt base before below between
    billion but candidate cannot close cube cubed divided double dozen either except factorial fails
    false fewer fifth fifths greater guess half halves hundred hundreds hundredths if impossible
    incorrect instead invalid inverse larger least less ln log maybe million millions minus mod
    modulo more most multiplied nearly negative never no none nor not opposite option or over
    percent perhaps plus point possibly power probably quarter quarters reciprocal remainder root
    roughly smaller sqrt square squared step t tenths than third thirds thousand thousands
    thousandths times triple twice under unknown unless unsure versus wait without wrong""".split()
)
ONES = """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen
fifteen sixteen seventeen eighteen nineteen""".split()
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()


def normalise(text):
    """The text with + - * / ( ) = for all their spellings, and without decoration."""
    text = text.translate(CHARACTERS)
    for meaning, commands in LATEX.items():
        text = re.sub(rf"\\(?:{commands})(?![A-Za-z])", meaning, text)
    text = re.sub(r"\\[](),;:\\ []|\\(?=[{}])", " ", text)  # LaTeX spaces and delimiters
    text = re.sub(r"\{([-+*/=,])\}", r"\1", text)  # 1{,}021
    text = re.sub(r"</?[A-Za-z]+>", " ", text)  # <expression>
    text = re.sub(r"[-=~]+>|<-+", "=", text)  # an arrow
    text = text.translate(BRACKETS)
    text = re.sub(EXPLANATION, r"\1", text)
    text = re.sub(r"(?<=[0-9)])\s*[xX]\s*(?=[0-9(])", "*", text)  # 4 x 6
    text = re.sub(r"(?<=[A-Za-z0-9)])\s*-\s*(?=[A-Za-z])", " ", text)  # twenty-six; 26 - target
    text = re.sub(r"(^|=)\s*\+", r"\1", text)  # +26

    # Two stars are bold type. Only between operands they are a power, which nothing here reads.
    text = re.sub(r"\*{2,}(?!\*|\s*[0-9(])", " ", text)
    text = re.sub(r"\*{2,}(?=\s*\([A-Za-z=])", " ", text)
    return re.sub(r"(?<![0-9)\s*])\s*\*{2,}", " ", text)


def is_word(token):
    return token.isascii() and token.isalpha()


def kind_of_token(token):
    if is_word(token):
        return "word"
    if token in SEPARATORS:
        return "separator"
    return "mathematics"


def open_remarks(tokens):
    """Turn brackets around words or an equation, as in "26 (the target)", into commas."""
    tokens = list(tokens)
    opened = []  # positions of the brackets that aren't closed yet
    for position, token in enumerate(tokens):
        if token == "(":
            opened.append(position)
        elif token == ")":
            if not opened:
                raise ValueError("a bracket isn't opened")
            start = opened.pop()
            inside = tokens[start:position]
            if "=" in inside or any(is_word(inner) for inner in inside):
                tokens[start] = ","
                tokens[position] = ","
    return tokens


def number_in_words(words):
    """The number that words end with, 26 for ["equals", "twenty", "six"]; None: with no number."""
    value = None
    for word in words:
        if word in ONES:
            value = (value or 0) + ONES.index(word)
        elif word in TENS:
            value = (value or 0) + 20 + 10 * TENS.index(word)
        elif word == "hundred" and value:
            value *= 100
        elif word == "thousand" and value:
            value *= 1000
        elif word in DOUBTFUL:
            raise ValueError(f"{word!r} may change the answer")
        elif word != "and":
            value = None
    return value


def read_tokens(tokens):
    """The Expressions between words and separators; ValueError if there is anything else."""
    expressions = []
    for kind, run in groupby(open_remarks(tokens), kind_of_token):
        if kind == "mathematics":
            formula = list(run)
            if len(formula) == 1:
                formula[0] = re.sub(r"\.0+$", "", formula[0])  # the result 26.0, but no 4.0*7
            expressions.append(Parser(formula).parse())
        elif kind == "word":
            value = number_in_words([word.lower() for word in run])
            if value is not None:
                expressions.append(number_expression(str(value)))
    return expressions


def read_answer(line):
    r"""The Expressions that an answer states to be equal; [] where they aren't, or it is unclear.

    "$3 \times 7 + 5$ = 21+5 = 26 (the target)" has three. The first is 3*7+5.
    """
    if line is None or len(line) > MAX_ANSWER:
        return []
    plain = normalise(line)
    if re.search("[0-9)][A-Za-z]|[A-Za-z][0-9(]", plain):
        return []  # 16x isn't 16, and sqrt(16) isn't either

    # In "16 (7+9)" the bracket repeats the value, in "4 (7+9)" it is a factor: try both readings.
    repeated = re.sub(r"(?<=[0-9)])\s+\(([^()]*)\)[\s.,!]*$", r" = \1", plain)
    for text in (repeated, plain):
        try:
            expressions = read_tokens(re.findall(TOKEN, text))
        except ValueError:
            continue
        if len({expression.value for expression in expressions}) == 1:
            return expressions
    return []
