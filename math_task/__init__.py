"""Competition mathematics: problems of a JSONL file, and whether a completion's answer is right.

The way of an answer: answers.py finds it in the completion; tokens.py and parse.py read it (with
expression.py for formulas and units.py for units); worker.py carries it to a process of its own;
there compare.py holds it against the gold, and asks math-verify about formulas.
"""

import json
import sys
from importlib.util import find_spec
from pathlib import Path
from random import Random

from tasks import MAX_TEXT, SPLITS, split_of

from .answers import final_answer, read_gold
from .nodes import Number
from .parse import read
from .spell import spell
from .worker import equivalent

PROMPT = "\n\nReason step by step, and put your final answer within \\boxed{}.\n"


class Math:
    """The task. A checksum of the problem decides on a row's split, unless the row names one."""

    def __init__(self, path=""):
        if sys.platform == "win32":
            raise ValueError("the math task needs Linux or macOS")
        if find_spec("math_verify") is None:
            raise ValueError("the math task needs: pip install math-verify==0.9.0")
        self.rows = {}  # by problem
        lines = Path(path).read_bytes().split(b"\n") if path else []  # none: for `question` alone
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                self.add(json.loads(line, parse_float=str, parse_int=str))  # digits as written
            except (ValueError, RecursionError) as error:
                reason = getattr(error, "msg", error)
                raise ValueError(f"{path} line {number}: {reason}") from None

    def add(self, row):
        if not isinstance(row, dict):
            raise ValueError("not a JSON object")
        problem = row.get("problem")
        if not isinstance(problem, str) or len(problem) > MAX_TEXT or not problem.strip("$ \n"):
            raise ValueError(f'"problem" must be 1 to {MAX_TEXT} characters, not only $')
        row["answer"] = read_gold(row.get("answer"))
        if row.setdefault("split", split_of(problem)) not in SPLITS:
            raise ValueError('"split" must be "train", "validation" or "test"')
        self.rows.setdefault(problem, row)

    def problems(self, split, count, seed):
        rows = [row for row in self.rows.values() if row["split"] == split]
        if not rows:
            raise ValueError(f"math: no --data, or none in the split {split!r}")
        Random(f"{split} {seed}").shuffle(rows)
        return rows[:count]

    def question(self, text):
        return {"problem": text, "answer": ""}

    def prompt(self, problem):
        return problem["problem"] + PROMPT

    def answer(self, text):
        """What a completion answers, with one spelling for each value: votes count these."""
        node = read(final_answer(text))
        return None if node is None else spell(node) or None

    def reward(self, problem, text):
        """1.0 if the answer agrees with the problem's in meaning, else 0.0."""
        gold_text, answer_text = problem["answer"], final_answer(text)
        gold, answer = read(gold_text), read(answer_text)
        if gold is None or answer is None:
            return 0.0
        if gold == answer or (isinstance(gold, Number) and isinstance(answer, Number)):
            return float(gold == answer)
        return float(equivalent(gold_text, answer_text))
