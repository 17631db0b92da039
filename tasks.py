"""The reasoning environments. A task is any object with these methods:

    problems(split, count, seed) -> list of problems     distinct; "train", "validation" and "test" never share one. A generator
                                                         gives exactly `count`; a file (Math) at most: all it has when it has fewer
    prompt(problem) -> str                               the question, and the format of the answer
    answer(text) -> str or None                          what a completion answers (majority voting compares these)
    reward(problem, text) -> 0.0 or 1.0                  the verifier; `text` is a completion, any string at all
    question(text) -> problem                            what a person asks with --ask; ValueError when it makes no sense

Completions are hostile input: the verifiers parse them, with bounds on length, depth and integer size, and never
evaluate them. `trace` and `aggregation` write the noisy demonstrations from which the tiny policy gets its warm start.
Run as a program, this file is the worker process in which Math asks the math-verify library.
"""

import contextlib, functools, json, random, re, signal, subprocess, sys, threading, zlib  # noqa: E401
from fractions import Fraction
from operator import add, mul, sub, truediv

ANSWER, YES, NO = "Answer: ", ": yes\n", ": no\n"
COUNTDOWN = ("Use all the numbers, each exactly once, with + - * / and parentheses to reach the target.\nNumbers: ", "\nTarget: ",
             '\nThink step by step, then end with one line "Answer: <expression>".\n')
ARITHMETIC = ("Compute ", '\nThink step by step, then end with one line "Answer: <integer>".\n')
WORDS = (*COUNTDOWN, *ARITHMETIC, ANSWER, YES, NO, ", ", "none")    # each is one token to the tiny policy
OPERATIONS = {"+": add, "-": sub, "*": mul, "/": truediv}
MAX_ANSWER, MAX_DIGITS, MAX_DEPTH, MAX_PROBLEM, MAX_SECONDS = 200, 9, 20, 20_000, 3

def extract_answer(text):
    """The rest of the line after the last "Answer:", cleaned of decoration; None when there is none (or it is empty)."""
    start = text.rfind("Answer:")
    if start < 0:
        return None
    line = text[start + len("Answer:"):][:MAX_ANSWER].lstrip().split("\n")[0]
    return line.lstrip(" \t\r$*`").rstrip(" \t\r.$*`") or None           # .5 keeps its point

def evaluate(expression):
    """(value, integers) of an arithmetic expression with + - * / and parentheses, as (Fraction, list of int). Raises ValueError for
    anything else: over 200 characters, 9 digits or 20 parentheses deep, `**`, signs, division by 0."""
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

    def chain(operators, operand, depth):
        value = operand(depth)
        while operator := take(operators):
            right = operand(depth)
            if operator == "/" and right == 0:
                raise ValueError("division by zero")
            value = OPERATIONS[operator](value, right)
        return value

    product = functools.partial(chain, "*/", atom)
    summation = functools.partial(chain, "+-", product)
    value = summation(0)
    if tokens != ["end"]:
        raise ValueError("not an expression")
    return value, integers

def split_of(text):
    """The split a problem belongs to for ever, by a checksum: a tenth each "validation" and "test", the rest "train"."""
    return {0: "test", 1: "validation"}.get(zlib.crc32(text.encode()) % 10, "train")

class Task:
    """What the generated tasks share: splits, and the demonstrations of an aggregation."""
    def problems(self, split, count, seed):
        """`count` distinct problems of the split. Raises ValueError when the task doesn't hold that many."""
        rng, found = random.Random(f"{split} {seed}"), {}
        for _ in range(50 * count + 1000):
            if len(found) == count:
                return list(found.values())
            problem = self.draw(rng)
            if split == split_of(self.key(problem)):
                found.setdefault(self.key(problem), problem)
        raise ValueError(f"{type(self).__name__} has too few different problems for {count} in the split {split!r}")

    def answer(self, text):
        answer = extract_answer(text)
        return None if answer == "none" else answer             # the demonstrations give up with "none"

    def aggregation(self, problem, traces, rng, noise=0.1):
        """A demonstration: audit the candidates one by one (each verdict is wrong with probability `noise`), then repeat the
        last attempt and the answer of one that passed, or try again. It thus shows its work to the next aggregation."""
        passed = [(self.reward(problem, trace) > 0) != (rng.random() < noise) for trace in traces]
        audit = "".join(f"{i + 1}{YES if ok else NO}" for i, ok in enumerate(passed))
        good = [trace for trace, ok in zip(traces, passed) if ok and self.answer(trace)]
        return audit + ("\n".join(rng.choice(good).split("\n")[-2:]) if good else self.trace(problem, rng))

def apply(a, operator, b, limit):
    """a operator b as a non-negative integer up to `limit`, or None."""
    if operator == "/":
        return a // b if b and a % b == 0 else None
    value = OPERATIONS[operator](a, b)
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

    def question(self, text):
        *numbers, target = [int(n) for n in re.findall(r"[0-9]{1,9}", text)] or [0]
        if not 2 <= len(numbers) <= 6:
            raise ValueError(f"{text!r}: give 2 to 6 numbers, and then the target")
        return {"numbers": numbers, "target": target}

    def key(self, problem): return f"{sorted(problem['numbers'])} {problem['target']}"

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

    def question(self, text): return {"expression": text.replace(" ", ""), "value": int(evaluate(text)[0])}
    def key(self, problem): return problem["expression"]
    def prompt(self, problem): return f"{ARITHMETIC[0]}{problem['expression']}{ARITHMETIC[1]}"

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

def final_answer(text):
    """What the last \boxed{...} with balanced braces holds, else the last "Answer:" line, else ""."""
    for rest in reversed(text.split(r"\boxed{")[1:]):
        depth = 1
        for i, character in enumerate(rest[:MAX_ANSWER + 1]):
            depth += (character == "{") - (character == "}")
            if depth == 0:
                return rest[:i]
    return extract_answer(text) or ""

def normal(answer):
    """One spelling for answers that mean the same at first sight: undecorated, numbers as exact fractions in lowest terms."""
    answer = " ".join(answer.replace("−", "-").replace("{,}", ",").split())
    answer = re.sub(r"\\(?:text|textbf|mathrm|mathbf|mbox) ?\{([^{}]*)\}", r"\1", answer)
    answer = re.sub(r"(?<!\\)\\(?:(?:left|right)(?![a-zA-Z])|[!,;:$%])|[$%°]|\^\{?\\circ\}?", "", answer)
    answer = re.sub(r"\\frac ?([0-9])([0-9])", r"\\frac{\1}{\2}", re.sub(r"\\[dt]frac", r"\\frac", answer))
    answer = re.sub(r" (?![0-9A-Za-z])|(?<![0-9A-Za-z]) ", "", answer).rstrip(".")      # "1 1/2" is not 11/2
    if re.fullmatch(r"[+-]?[0-9]{1,3}(,[0-9]{3})+(\.[0-9]+)?", answer):
        answer = answer.replace(",", "")
    # Fraction itself would take 1e999999999, 1_0 and other digits than 0 to 9
    number = re.sub(r"^([+-]?)\\frac\{([+-]?[0-9]+)\}\{([0-9]+)\}$", r"\1\2/\3", answer)
    plain = len(number) <= 60 and re.fullmatch(r"[+-]?([0-9]+/0*[1-9][0-9]*|[0-9]+\.?|[0-9]*\.[0-9]+)", number)
    return str(Fraction(number)) if plain else answer

worker, lock = None, threading.Lock()       # the process that asks math-verify; False: it doesn't start

@functools.lru_cache(maxsize=100_000)       # the completions of a problem mostly agree
def equivalent(right, answer):
    """Whether math-verify, in a process of its own, holds two answers for equal; False when that dies of it, or isn't there."""
    global worker
    with lock, contextlib.suppress(OSError):
        process, worker = worker, None      # an interrupt loses the process, lest its reply be taken for that to the next pair
        if process is None or (process and process.poll() is not None):
            process = subprocess.Popen([sys.executable, __file__, str(MAX_SECONDS)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                       stderr=subprocess.DEVNULL, text=True, start_new_session=True)      # Ctrl-C is not for it
            if not process.stdout.readline():
                process.wait()
                process = False
                print("note: no math-verify (pip install math-verify): answers are compared as text and numbers only", file=sys.stderr)
        reply = ""
        if process:
            print(json.dumps([right, answer]), file=process.stdin, flush=True)
            reply = process.stdout.readline() or process.wait()
        worker = process
        return reply == "1\n"
    return False

def serve(seconds):
    """The worker: a line 1 or 0 for each line [right answer, answer] of standard input, until that ends. When a pair takes too
    long the kernel ends the process by an alarm, which also holds when the parent asks from a thread, or is gone."""
    replies, sys.stdout = sys.stdout, sys.stderr        # what the libraries print is no reply
    import resource                                     # not on Windows, where the alarm is missing as well
    signal.signal(signal.SIGALRM, signal.SIG_DFL)       # a parent may have it ignored
    signal.alarm(60)
    from math_verify import LatexExtractionConfig, parse, verify
    import sympy.physics.units                          # reads texts by eval when first imported
    def number(code, *scopes):      # sympy reads even numbers by eval, and only numbers: no text is evaluated from here on
        kind, digits = re.fullmatch(r"(Integer|Float) \('?([0-9.]+)'? \)", code).groups()
        return getattr(sympy, kind)(digits)

    def same(pair):                 # as LaTeX, which has a grammar; math-verify's plain expressions go through eval
        right, answer = (parse(f"${text}$", [LatexExtractionConfig()], parsing_timeout=None) for text in pair)
        return verify(right, answer, timeout_seconds=None)

    sympy.parsing.sympy_parser.eval_expr = number
    assert same([r"\frac{1}{2}+x", "x+0.5"]) and not same(["1", "2"])
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
    signal.alarm(0)
    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        signal.alarm(seconds)
        verdict = int(same(json.loads(line)))
        signal.alarm(0)
        print(verdict, file=replies, flush=True)

class Math:
    """Problems from a file with one JSON object a line: {"problem": text, "answer": text or number} and, if you like,
    "split": "train", "validation" or "test" (else a checksum decides). Of equal problems the first counts."""
    def __init__(self, path=""):
        self.path, self.rows = path, {}
        if not path:                                    # for `question` alone
            return
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                try:
                    if line.strip():
                        row = self.row(line)
                        self.rows.setdefault(row["problem"], row)
                except (ValueError, RecursionError) as error:
                    raise ValueError(f"{path} line {number}: {getattr(error, 'msg', error)}") from None

    def row(self, line):
        row = json.loads(line, parse_float=str)         # 0.10 stays as it is written
        if not isinstance(row, dict):
            raise ValueError("not a JSON object")
        row["answer"] = str(row.get("answer")) if type(row.get("answer")) is int else row.get("answer")
        for name, limit in (("problem", MAX_PROBLEM), ("answer", MAX_ANSWER)):
            text = row.get(name)
            if not isinstance(text, str) or len(text) > limit or not normal(text):
                raise ValueError(f'"{name}" must be a text of 1 to {limit} characters')
        row = {"split": split_of(row["problem"]), **row}
        if row["split"] not in ("train", "validation", "test"):
            raise ValueError('"split" must be "train", "validation" or "test"')
        return row

    def problems(self, split, count, seed):
        """Up to `count` problems of the split, shuffled. Raises ValueError when it has none."""
        if not self.path:
            raise ValueError("task math needs --data, a JSONL file of problems")
        rows = [row for row in self.rows.values() if row["split"] == split]
        if not rows:
            raise ValueError(f'{self.path} has no problem in the split "{split}", of {len(self.rows)} in all')
        random.Random(f"{split} {seed}").shuffle(rows)
        return rows[:count]

    def question(self, text): return {"problem": text, "answer": ""}
    def prompt(self, problem): return problem["problem"] + "\n\nReason step by step, and put your final answer within \\boxed{}.\n"
    def answer(self, text): return normal(final_answer(text)) or None

    def reward(self, problem, text):
        raw = final_answer(text)
        answer, right = normal(raw), normal(problem["answer"])
        decided = answer == right or not answer or all(re.fullmatch(r"-?[0-9/]+", number) for number in (answer, right))
        return float(answer == right if decided else equivalent(problem["answer"].replace("$", ""), raw.replace("$", "")))

TASKS = {"countdown": Countdown, "arithmetic": Arithmetic, "math": Math}

def make_task(name, data=""):
    """A task from its name and options: "countdown", "countdown:numbers=4,high=30", or "math" with a file `data`. Raises
    ValueError for others."""
    kind, _, options = name.partition(":")
    if kind not in TASKS:
        raise ValueError(f"unknown task {kind!r}; there are: {', '.join(TASKS)}")
    if data and kind != "math":
        raise ValueError(f"task {kind} takes no --data {data}")
    try:
        options = {key: int(value) for key, value in (pair.split("=") for pair in options.split(",") if pair)}
        return TASKS[kind](*[data] * bool(data), **options)
    except (TypeError, ValueError) as error:
        raise ValueError(f"task {name}: {error}") from None

if __name__ == "__main__":
    serve(int(sys.argv[1]))
