"""The reasoning environments. A task is any object with four methods:

    problems(split, count, seed) -> list of problems     distinct; "train", "validation" and "test" never share one
    prompt(problem) -> str                               the question, and the format of the answer
    answer(text) -> str or None                          what a completion answers (majority voting compares these)
    reward(problem, text) -> 0.0 or 1.0                  the verifier; `text` is a completion, any string at all

Completions are hostile input: the verifiers parse them, with bounds on length, depth and integer size, and never
evaluate them. `trace` and `aggregation` write the noisy demonstrations from which the tiny policy gets its warm start.
"""

import random
import re
import zlib
from fractions import Fraction

ANSWER, YES, NO = "Answer: ", ": yes\n", ": no\n"
COUNTDOWN = ("Use all the numbers, each exactly once, with + - * / and parentheses to reach the target.\nNumbers: ", "\nTarget: ",
             '\nThink step by step, then end with one line "Answer: <expression>".\n')
ARITHMETIC = ("Compute ", '\nThink step by step, then end with one line "Answer: <integer>".\n')
WORDS = (*COUNTDOWN, *ARITHMETIC, ANSWER, YES, NO, ", ", "none")    # each is one token to the tiny policy
MAX_ANSWER, MAX_DIGITS, MAX_DEPTH = 200, 9, 20


def extract_answer(text):
    """The rest of the line after the last "Answer:", cleaned of decoration; None when there is none (or it is empty)."""
    start = text.rfind("Answer:")
    if start < 0:
        return None
    line = text[start + len("Answer:"):][:MAX_ANSWER].lstrip().split("\n")[0]
    return line.strip(" \t\r.$*`") or None


def evaluate(expression):
    """(value, integers) of an arithmetic expression with + - * / and parentheses, as (Fraction, list of int).

    Raises ValueError for anything else: over 200 characters, 9 digits or 20 parentheses deep, `**`, signs, division by 0.
    """
    if len(expression) > MAX_ANSWER:
        raise ValueError("too long")
    tokens = re.findall(r"[0-9]+|\S", expression) + ["end"]
    integers = []

    def take(allowed):
        return tokens.pop(0) if tokens[0] in allowed else None

    def atom(depth):
        if take("("):
            if depth == MAX_DEPTH:
                raise ValueError("too deep")
            value = summation(depth + 1)
            if not take(")"):
                raise ValueError("unbalanced")
            return value
        token = tokens.pop(0)
        if not re.fullmatch(r"[0-9]{1,%d}" % MAX_DIGITS, token):
            raise ValueError("not a number")
        integers.append(int(token))
        return Fraction(integers[-1])

    def product(depth):
        value = atom(depth)
        while operator := take("*/"):
            right = atom(depth)
            if operator == "/" and right == 0:
                raise ValueError("division by zero")
            value = value * right if operator == "*" else value / right
        return value

    def summation(depth):
        value = product(depth)
        while operator := take("+-"):
            right = product(depth)
            value = value + right if operator == "+" else value - right
        return value

    value = summation(0)
    if tokens != ["end"]:
        raise ValueError("not an expression")
    return value, integers


class Task:
    """What the two tasks share: splits, and the demonstrations of an aggregation."""

    def problems(self, split, count, seed):
        """`count` distinct problems. A problem belongs to one split for ever, by a checksum of what it asks: a tenth each
        to "validation" and "test", the rest to "train". Raises ValueError when the task doesn't hold that many."""
        rng, found = random.Random(f"{split} {seed}"), {}
        for _ in range(50 * count + 1000):
            if len(found) == count:
                return list(found.values())
            problem = self.draw(rng)
            bucket = zlib.crc32(self.key(problem).encode()) % 10
            if split == {0: "test", 1: "validation"}.get(bucket, "train"):
                found.setdefault(self.key(problem), problem)
        raise ValueError(f"{type(self).__name__} has too few different problems for {count} in the split {split!r}")

    def answer(self, text):
        answer = extract_answer(text)
        return None if answer == "none" else answer             # the demonstrations give up with "none"

    def aggregation(self, problem, traces, rng, noise=0.1):
        """A demonstration: audit the candidates one by one (each verdict is wrong with probability `noise`), then repeat
        the answer of one that passed, or try again."""
        passed = [(self.reward(problem, trace) > 0) != (rng.random() < noise) for trace in traces]
        audit = "".join(f"{i + 1}{YES if ok else NO}" for i, ok in enumerate(passed))
        answers = [self.answer(trace) for trace, ok in zip(traces, passed) if ok and self.answer(trace)]
        return audit + (ANSWER + rng.choice(answers) if answers else self.trace(problem, rng))


def apply(a, operator, b, limit):
    """a operator b as a non-negative integer up to `limit`, or None."""
    if operator == "/":
        return a // b if b and a % b == 0 else None
    value = a + b if operator == "+" else a - b if operator == "-" else a * b
    return value if 0 <= value <= limit else None


def write(items):
    """(text, precedence) of `left operator right`, with only the parentheses it needs. items: (text, precedence) pairs."""
    (left, p), operator, (right, q) = items
    mine = 1 if operator in "+-" else 2
    left = f"({left})" if p < mine else left
    right = f"({right})" if q < mine or (q == mine and operator in "-/") else right
    return f"{left}{operator}{right}", mine


class Countdown(Task):
    """Reach a target with each given number used exactly once. Solvable by construction: a problem is a random solution."""

    def __init__(self, numbers=3, high=30, max_target=120):
        if not 2 <= numbers <= 6 or not 2 <= high <= 100 or not 10 <= max_target <= 999:
            raise ValueError("countdown needs 2 to 6 numbers, high in 2..100 and max_target in 10..999")
        self.numbers, self.high, self.max_target = numbers, high, max_target

    def attempt(self, numbers, rng):
        """A random way to combine all the numbers: (steps like "3*7=21", expression, value)."""
        items, steps = [(n, (str(n), 3)) for n in numbers], []
        while len(items) > 1:
            i, j = rng.sample(range(len(items)), 2)
            operator = rng.choice("++--**/")
            value = apply(items[i][0], operator, items[j][0], 2 * self.max_target)
            if value is not None:
                steps.append(f"{items[i][0]}{operator}{items[j][0]}={value}")
                joined = (value, write((items[i][1], operator, items[j][1])))
                items = [item for k, item in enumerate(items) if k not in (i, j)] + [joined]
        return steps, items[0][1][0], items[0][0]

    def draw(self, rng):
        while True:
            numbers = [rng.randint(1, self.high) for _ in range(self.numbers)]
            steps, expression, target = self.attempt(numbers, rng)
            if 1 <= target <= self.max_target and target not in numbers:
                return {"numbers": numbers, "target": target, "steps": steps, "solution": expression}

    def key(self, problem):
        return f"{sorted(problem['numbers'])} {problem['target']}"

    def prompt(self, problem):
        numbers, target, end = COUNTDOWN
        return f"{numbers}{' '.join(map(str, problem['numbers']))}{target}{problem['target']}{end}"

    def reward(self, problem, text):
        answer = self.answer(text)
        try:
            value, integers = evaluate((answer or "").replace("×", "*").replace("÷", "/").split("=")[0])
        except ValueError:
            return 0.0
        return float(value == problem["target"] and sorted(integers) == sorted(problem["numbers"]))

    def trace(self, problem, rng, attempts=None, skill=0.3, wishful=0.1):
        """A demonstration: up to 3 attempts, each checked. `skill`: chance that an attempt is a solution; `wishful`: that
        a wrong one is bent to fit (its last result, or the numbers it uses) and believed."""
        text = ""
        for _ in range(attempts or rng.choice((1, 2, 3))):
            steps, expression, value = problem["steps"], problem["solution"], problem["target"]
            if rng.random() >= skill:
                numbers, bent = list(problem["numbers"]), rng.random() < wishful
                if bent and rng.random() < 0.5:
                    numbers[rng.randrange(len(numbers))] = rng.choice(numbers)
                steps, expression, value = self.attempt(numbers, rng)
                if bent:
                    steps, value = steps[:-1] + [f"{steps[-1].split('=')[0]}={problem['target']}"], problem["target"]
            text += ", ".join(steps) + (YES if value == problem["target"] else NO)
            if value == problem["target"]:
                return text + ANSWER + expression
        return text + ANSWER + "none"


class Arithmetic(Task):
    """Compute an expression of several operations."""

    def __init__(self, operations=3, high=20, max_value=400):
        if not 1 <= operations <= 8 or not 2 <= high <= 100 or not 10 <= max_value <= 999:
            raise ValueError("arithmetic needs 1 to 8 operations, high in 2..100 and max_value in 10..999")
        self.operations, self.high, self.max_value = operations, high, max_value

    def draw(self, rng):
        while True:
            items, steps = [(n, (str(n), 3)) for n in (rng.randint(1, self.high) for _ in range(self.operations + 1))], []
            while len(items) > 1:
                i, operator = rng.randrange(len(items) - 1), rng.choice("+-*")
                (a, left), (b, right) = items[i], items[i + 1]
                value = apply(a, operator, b, self.max_value)
                if value is None:
                    break
                steps.append([a, operator, b])
                items[i:i + 2] = [(value, write((left, operator, right)))]
            else:
                return {"expression": items[0][1][0], "value": items[0][0], "steps": steps}

    def key(self, problem):
        return problem["expression"]

    def prompt(self, problem):
        return f"{ARITHMETIC[0]}{problem['expression']}{ARITHMETIC[1]}"

    def reward(self, problem, text):
        answer = self.answer(text) or ""
        return float(bool(re.fullmatch(r"[0-9]{1,%d}" % MAX_DIGITS, answer)) and int(answer) == problem["value"])

    def trace(self, problem, rng, attempts=None, slip=0.25):
        """A demonstration: work through the steps, each going wrong with probability `slip`; then again, until two
        attempts agree (at most 3)."""
        text, results = "", []
        for _ in range(attempts or rng.choice((1, 2, 3))):
            steps, values = [], {}                      # values: what this attempt believes each true result to be
            for a, operator, b in problem["steps"]:
                true = apply(a, operator, b, self.max_value)
                x, y = values.get(a, a), values.get(b, b)
                value = apply(x, operator, y, 999)
                value = true if value is None else value
                if rng.random() < slip:
                    value = max(0, value + rng.choice((-10, -2, -1, 1, 2, 10)))
                steps.append(f"{x}{operator}{y}={value}")
                values[true] = value
            agrees = value in results
            text += ", ".join(steps) + (YES if agrees else NO if results else "\n")
            results.append(value)
            if agrees:
                break
        return text + ANSWER + str(value)


TASKS = {"countdown": Countdown, "arithmetic": Arithmetic}


def make_task(name):
    """A task from its name and options, "countdown" or "countdown:numbers=4,high=30". Raises ValueError for others."""
    name, _, options = name.partition(":")
    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}; there are: {', '.join(TASKS)}")
    try:
        return TASKS[name](**{key: int(value) for key, value in (pair.split("=") for pair in options.split(",") if pair)})
    except (TypeError, ValueError) as error:
        raise ValueError(f"task {name} with options {options!r}: {error}") from None
