"""The section of test_spiral.py about tasks.py. By itself:  pytest -q tasks_section_of_tests.py"""

import json
import random
import re
import shutil
import subprocess
import sys
import time
import zlib
from collections import Counter
from fractions import Fraction
from itertools import permutations, product
from pathlib import Path

import pytest

import spiral
import tasks

HERE = Path(__file__).resolve().parent
each = pytest.mark.parametrize
COUNTDOWN = tasks.Countdown()
ARITHMETIC = tasks.Arithmetic()


# ---- tasks.py: problems ----

REACH_26 = {"numbers": [3, 7, 5], "target": 26}
REACH_24 = {"numbers": [4, 7, 1], "target": 24}
REACH_63 = {"numbers": [11, 4, 19], "target": 63}
EVERY_TASK = ["countdown", "arithmetic", "countdown:numbers=4,high=50", "arithmetic:operations=5"]


def lines_of(table):
    return table.strip("\n").split("\n")


def test_importing_tasks_reads_no_other_file(tmp_path):
    shutil.copy(HERE / "tasks.py", tmp_path)
    subprocess.run([sys.executable, "-c", "import tasks"], cwd=tmp_path, check=True)


@each("name", EVERY_TASK)
def test_problems_are_solvable_distinct_reproducible_and_splits_disjoint(name):
    task = tasks.make_task(name)
    seen = Counter()
    for split in ("train", "validation", "test"):
        problems = task.problems(split, 200, seed=0)
        others = task.problems(split, 200, seed=1)
        keys = {task.key(problem) for problem in problems}
        assert len(keys) == 200
        assert problems != others
        assert problems[:20] == task.problems(split, 20, seed=0)
        seen.update(keys | {task.key(problem) for problem in others})
        for problem in problems:
            solution = problem.get("solution") or problem["expression"]
            target = problem.get("target") or problem.get("value", 0)
            assert eval(solution) == target
            assert task.reward(problem, f"Answer: {solution} = {target}") == 1.0
    assert max(seen.values()) <= 2  # by both seeds of one split


PROBLEMS_OF_THE_STUDIES = {
    "countdown": 3080193988,
    "countdown:max_target=100": 1021628709,
    "countdown:numbers=4,high=30": 3845017060,
    "arithmetic": 3918404813,
    "arithmetic:operations=1,high=12": 950727198,
}


@each("name", PROBLEMS_OF_THE_STUDIES)
def test_problems_never_change(name):
    """The shipped policy, runs and studies depend on them."""
    task = tasks.make_task(name)
    drawn = [
        task.problems(split, 50, seed)
        for split in ("train", "validation", "test")
        for seed in (0, 1)
    ]
    assert zlib.crc32(json.dumps(drawn).encode()) == PROBLEMS_OF_THE_STUDIES[name]


def test_prompts_never_change():
    """The tiny policy was trained on them, and its tokenizer has their phrases as tokens."""
    assert COUNTDOWN.prompt(REACH_26) == (
        "Use all the numbers, each exactly once, with + - * / and parentheses to reach the target."
        "\nNumbers: 3 7 5\nTarget: 26\n"
        'Think step by step, then end with one line "Answer: <expression>".\n'
    )
    assert ARITHMETIC.prompt({"expression": "3*(4+5)"}) == (
        'Compute 3*(4+5)\nThink step by step, then end with one line "Answer: <integer>".\n'
    )
    assert zlib.crc32("|".join(tasks.PHRASES).encode()) == 3677331281


def test_a_task_gives_all_it_has_when_it_has_fewer():
    small = tasks.make_task("countdown: numbers = 2, high=5")
    assert 10 < len(small.problems("train", 8000, seed=0)) < 100


def test_a_range_of_numbers_mixes_the_sizes():
    task = tasks.make_task("countdown:numbers=3-4")
    sizes = Counter(len(problem["numbers"]) for problem in task.problems("test", 200, seed=0))
    assert set(sizes) == {3, 4}
    assert min(sizes.values()) > 50


REFUSED_TASKS = [
    ("chess", "", "countdown, arithmetic, math"),
    ("countdown:colour=3", "", "'colour'; there are: numbers, high, max_target$"),
    ("countdown:data=3", "", "'data'"),
    ("countdown:numbers", "", "numbers="),
    ("countdown:numbers=7", "", "2 to 6"),
    ("countdown:numbers=4-3", "", "empty"),
    ("countdown:numbers=3-", "", "range"),
    ("countdown:high=many", "", "high=many: needs an integer from 2 to 100"),
    ("countdown:high=1", "", "high=1"),
    ("countdown:high=99,max_target=40", "", "max_target"),  # no two may be combined
    ("countdown:numbers=3", "some.jsonl", "leave out the options"),
    ("arithmetic", "some.jsonl", "--data"),
    ("arithmetic:operations=0", "", "operations"),
    ("arithmetic:max_value=1000", "", "max_value"),
    ("arithmetic:operations=8,high=100,max_value=10", "", "no problem in the split 'test'"),
]


@each("name, data, words", REFUSED_TASKS)
def test_unknown_tasks_and_options_are_refused_in_a_line(name, data, words):
    with pytest.raises(ValueError, match=words) as error:
        tasks.make_task(name, data).problems("test", 1, seed=0)
    assert len(str(error.value).splitlines()) == 1


def test_tasks_of_users_need_no_options(monkeypatch):
    class Parity:
        pass

    monkeypatch.setitem(tasks.TASKS, "parity", Parity)
    assert isinstance(tasks.make_task("parity"), Parity)
    with pytest.raises(ValueError, match="--data"):
        tasks.make_task("parity", "some.jsonl")


def test_questions_become_problems():
    assert COUNTDOWN.question("Numbers: 3, 7 and 5. Target: 26") == REACH_26
    problem = ARITHMETIC.question("3 * (4+5)")
    assert problem == {"expression": "3*(4+5)", "value": 27}
    assert ARITHMETIC.reward(problem, "Answer: 27") == 1.0


@each("text", ["2**9", "what?", "", "7/2", "3-5", "1/0", "9" * 10, "(" * 10**6, "1+" * 150 + "1"])
def test_what_is_no_question_is_refused_in_a_line(text):
    for task in (COUNTDOWN, ARITHMETIC):
        with pytest.raises(ValueError) as error:
            task.question(text)
        assert len(str(error.value).splitlines()) == 1


def test_countdown_refuses_a_question_without_a_target():
    with pytest.raises(ValueError, match="target"):
        COUNTDOWN.question("3 26")


# ---- Countdown puzzles from a file ----


def write_rows(path, *rows):
    """A JSONL file of rows, which are JSON objects or lines as they stand."""
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    path.write_bytes(b"\n".join(lines))
    return str(path)


def test_public_countdown_rows_are_read_once_and_keep_their_split(tmp_path):
    path = write_rows(
        tmp_path / "countdown.jsonl",
        b"\xef\xbb\xbf" + json.dumps({"nums": [19, 36, 55, 7], "target": 65}).encode() + b"\r",
        b"",
        {"nums": [3, 7, 5], "target": 26, "split": "test", "id": 7},
        {"nums": [5, 3, 7], "target": 26, "split": "train"},  # the same puzzle again
        {"nums": [100, 75], "target": 7500, "split": "validation"},
    )
    task = tasks.make_task("countdown", path)
    assert task.problems("test", 9, seed=0)[-1]["numbers"] in ([3, 7, 5], [19, 36, 55, 7])
    found = []
    for split in set(tasks.SPLITS):
        try:
            found += task.problems(split, 9, seed=0)
        except ValueError:  # none in this split
            continue
    assert len(found) == 3
    problem = max(found, key=lambda problem: len(problem["numbers"]))
    assert problem["split"] == tasks.split_of("[7, 19, 36, 55] 65")
    assert "Numbers: 19 36 55 7\nTarget: 65\n" in task.prompt(problem)
    assert task.reward(problem, "Answer: 55 + 36 - 19 - 7 = 65") == 1.0


def test_countdown_rows_are_split_by_checksum_and_shuffled_by_seed(tmp_path):
    rows = [{"nums": [a, b], "target": a + b} for a in range(1, 30) for b in range(1, a)]
    task = tasks.make_task("countdown", write_rows(tmp_path / "countdown.jsonl", *rows))
    found = []
    for split in ("train", "validation", "test"):
        problems = task.problems(split, 8000, seed=0)
        assert problems != task.problems(split, 8000, seed=1)
        assert problems[:9] == task.problems(split, 9, seed=0)
        found += [tuple(problem["numbers"]) for problem in problems]
    assert sorted(found) == sorted(tuple(row["nums"]) for row in rows)


BAD_ROWS = [
    b"{",
    b"3",
    b"null",
    b"[" * 10**5,
    b"\xff\xfe",
    b'{"nums": [1, 2], "target": NaN}',
    b'{"nums": [1, 2], "target": ' + b"9" * 5000 + b"}",
    {"nums": [1, 2]},
    {"target": 3},
    {"nums": 12, "target": 3},
    {"nums": "1 2", "target": 3},
    {"nums": [1], "target": 1},
    {"nums": [1] * 7, "target": 7},
    {"nums": [1, "2"], "target": 3},
    {"nums": [1, True], "target": 2},
    {"nums": [1, 2.0], "target": 3},
    {"nums": [1, 0], "target": 1},
    {"nums": [1, 10000], "target": 3},
    {"nums": [1, 2], "target": 0},
    {"nums": [1, 2], "target": "3"},
    {"nums": [1, 2], "target": None},
    {"nums": [1, 2], "target": 3, "split": "dev"},
    {"nums": [1, 2], "target": 3, "split": None},
    {"nums": [1, 2], "target": 3, "split": ["train"]},
]


@each("bad", BAD_ROWS, ids=range(len(BAD_ROWS)))
def test_malformed_countdown_rows_are_named_by_file_and_line(bad, tmp_path):
    good = {"nums": [3, 7, 5], "target": 26}
    path = write_rows(tmp_path / "countdown.jsonl", good, b"", bad, good)
    with pytest.raises(ValueError, match="line 3: ") as error:
        tasks.make_task("countdown", path)
    message = str(error.value)
    assert path in message
    assert len(message.splitlines()) == 1


def test_a_file_without_rows_of_a_split_says_so(tmp_path):
    task = tasks.make_task("countdown", write_rows(tmp_path / "countdown.jsonl"))
    with pytest.raises(ValueError, match="no row of --data is in the split 'test'"):
        task.problems("test", 1, seed=0)


# ---- Answers to Countdown ----

RIGHT_63 = {
    "plain": """
11*4+19
(11*4)+19
((11*4)+19)
11*4+19.
11*4+19,
""",
    "quoted": """
"11*4+19"
'11*4+19'
“11*4+19”
«11*4+19» = 63
`11*4+19`
`11*4+19` = `63`
""",
    "a remark in brackets": """
11*4+19 (which equals 63)
11*4+19 (which is 63).
11*4+19 (equals 63)
11*4+19 (= 63)
11*4+19 (63)
11*4+19 = 63 (target)
11*4+19 = 63 (the target)
11*4+19 (44+19=63)
11*4+19 (using 11, 4 and 19)
11*4+19 (using all the numbers exactly once)
11*4+19 [63]
(11*4+19 = 63)
11*4+19 (correct)
11*4+19 (i.e. 63)
11*4+19 = 63 (matches the target)
11*4+19 (uses all three numbers)
""",
    "a remark": """
11*4+19, which is 63
11*4+19, which equals 63.
11*4+19 which gives 63
11*4+19; this equals 63
11*4+19 equals the target of 63
11*4+19 and it equals 63
11*4+19 = sixty-three
11*4+19 = 63! That's the target
11*4+19 since 11*4=44 and 44+19=63
11*4+19 is the expression
11*4+19  # = 63
11*4+19 hits the target, as required
11*4+19 adds up to 63
11*4+19 = 63 - target
11*4+19 = 63, so the answer is 11*4+19
""",
    "arrows and equality signs": """
11*4+19 -> 63
11*4+19 --> 63
11*4+19 → 63
11*4+19 => 63
11*4+19 ⇒ 63
11*4+19 ➡️ 63
11*4+19 = 63 <- target
11*4+19 == 63
11*4+19 = 63 = target
11*4+19 = target
11*4+19 = 44+19 = 63 ✓
11*4+19 = 63.0
63 = 11*4+19
""",
    "a name before it": """
expression = 11*4+19
Expression: 11*4+19
the expression is 11*4+19 = 63
<expression> = 11*4+19
<expression>11*4+19</expression>
x = 11*4+19
ans = 11*4+19
target = 11*4+19
We get 11*4+19
You can use 11*4+19
Using all numbers, 11*4+19 = 63
One possible expression is 11*4+19
""",
    "products without a sign": """
4(11)+19
4 (11) + 19
(4)(11)+19
(11)4+19
19+4(11)
19 + 4 (11)
4(11)+19 = 44+19 = 63
""",
    "other signs": """
11×4+19
11 · 4 + 19
11 x 4 + 19
11x4+19
(11 X 4) + 19
11∗4＋19
（11*4）＋19 ＝ 63
[11*4]+19
{11*4}+19
<11*4+19>
""",
    "LaTeX": r"""
$11 \times 4 + 19$
$11 \times 4 + 19 = 63$
\(11 \times 4 + 19\) = 63
\[11 \cdot 4 + 19 = 63\]
\boxed{11 \times 4 + 19}
$\boxed{11\times 4+19=63}$
11*4+19 = \boxed{63}
$\left(11 \times 4\right) + 19$
11 \times 4 + 19 \quad \text{(which equals 63)}
\text{Expression: } 11 \times 4 + 19
$11\,\times\,4 + 19 \rightarrow 63$
\mathbf{11 \times 4} + 19
\displaystyle 11{\times}4 + 19
""",
    "bold and italic type": """
**11*4+19** = 63
**11 * 4 + 19 = 63**
**11 * 4 + 19** (which equals 63)
The result is **11*4+19**
*11 * 4 + 19*
__11*4+19__
""",
}


@each("kind", RIGHT_63)
def test_right_answers_to_countdown(kind):
    for answer in lines_of(RIGHT_63[kind]):
        assert COUNTDOWN.reward(REACH_63, f"4*11=44\n**Answer**: {answer}\n") == 1.0, answer
        assert COUNTDOWN.reward(REACH_63, f"### Answer\n\n{answer}\n") == 1.0, answer
        assert COUNTDOWN.reward(REACH_63, f"The answer is {answer}") == 1.0, answer
        assert COUNTDOWN.answer(f"Answer: {answer}") == "11*4+19", answer


RIGHT_24 = r"""
4*(7-1)
4*(7−1)
**4 × (7 – 1) = 24.**
4(7-1)
4 (7-1)
(7-1)4
(7-1)(4)
24 = 4*(7-1)
(4)*((7)-(1))
$\boxed{4\times\left(7-1\right)=24}$
"""
WRONG_24 = {
    "two answers": """
4*(7-1)=24 or 1+2
4*(7-1) or (7-1)*4
4*(7-1), 1+2
4*(7-1) and 1+2
4*(7-1);0
""",
    "another value": """
4*(7-1)=25
4*(7-1) -> 25
4*(7-1) (which equals 25)
4*(7-1) (25)
4*(7-1), which is twenty-three
1+2 = 4*(7-1)
""",
    "doubted": """
not 4*(7-1)
maybe 4*(7-1)
4*(7-1) is wrong
4*(7-1) isn't 24
4*(7-1) ≠ 24
4*(7-1) ≈ 24
4*(7-1) < 24
4*(7-1)?
none
""",
    "another expression": r"""
24
4*7-1
4*6
4*(7-1)*1
4*(7-1)+(
(4*(7-1)
4*(7-1))
4*(7-1)+
-4*(1-7)
4*-1*-6
4(7-1)(1)
4*(7-1)x
\sqrt4*(7-1)
sqrt(4)*(7-1)
4*(7-1)/(1-1)
24/4(7-1)
""",
    "no expression": r"""
4*(7-1)**1
4*(7-1) ** 1
4*(7-1)^1
4*(7-1)²
4*(7-1)//1
4*(7-1)%
4**(7-1)
4.0*(7-1)
٤*(7-1)
\alpha 4*(7-1)
""",
}


def test_other_right_answers_to_countdown():
    for answer in lines_of(RIGHT_24):
        assert COUNTDOWN.reward(REACH_24, f"Answer: {answer}") == 1.0, answer
    assert COUNTDOWN.reward({"numbers": [1, 3, 3], "target": 1}, "Answer: 1/3*3") == 1.0


@each("kind", WRONG_24)
def test_wrong_answers_to_countdown(kind):
    for answer in ["", *lines_of(WRONG_24[kind])]:
        assert COUNTDOWN.reward(REACH_24, f"Answer: 4*(7-1)\nAnswer: {answer}") == 0.0, answer
        assert COUNTDOWN.reward(REACH_24, f"<answer>{answer}</answer>") == 0.0, answer
        assert COUNTDOWN.reward(REACH_24, f"The answer is {answer}") == 0.0, answer


SAYS_26 = r"""
<answer>3*7+5</answer>
<answer>\n3*7+5 = 26\n</answer>
<answer>Answer: 3*7+5</answer>
Answer: <answer>3*7+5</answer>
### Answer\n3*7+5
## Final Answer:\n\n$3 \times 7 + 5$
**Answer**\r\n3*7+5
Answer\n3*7+5
The answer is 3*7+5.
The answer is 3*7+5. I hope that this helps!
So the **answer** is: **3*7+5**
The final answer is\n\n$$\boxed{3*7+5}$$
answer = 3*7+5
Answer - 3*7+5
Answer -> 3*7+5
Answer 3*7+5
### Answer 3*7+5
The answer to this problem is 3*7+5
The answer should be 3*7+5
<final_answer>3*7+5</final_answer>
[ANSWER] 3*7+5 [/ANSWER]
We get \boxed{3*7+5}.
We get $\boxed{3 \times 7 + 5 = 26}$ as desired
The answer is 1\nAnswer: 3*7+5
Answer: 1\nAnswer: 3*7+5
\boxed{1}, and the answer is 3*7+5
Answer: 3*7+5\nThe answer is 1
<think>Answer: 1</think>Answer: 3*7+5
"""
SAYS_NO_26 = r"""
3*7+5
3*7+5 = 26
Answer: none\n\n3*7+5
<think>Answer: 3*7+5
<think>\boxed{3*7+5}</think>
3*7+5\nAnswer:
The answer is not 3*7+5
Is the answer 3*7+5?
"""


def test_an_answer_is_found_where_small_models_write_it():
    for text in lines_of(SAYS_26):
        text = text.replace(r"\n", "\n").replace(r"\r", "\r")
        assert COUNTDOWN.reward(REACH_26, text) == 1.0, text
    for text in lines_of(SAYS_NO_26):
        text = text.replace(r"\n", "\n")
        assert COUNTDOWN.reward(REACH_26, text) == 0.0, text


# ---- Votes count solutions, not spellings ----


def spelling_of(expression):
    return COUNTDOWN.answer(f"Answer: {expression}")


SAME_SOLUTION = [
    ["13*4+9", "9+13*4", "4*13+9", "(9+4*13)", "((13)*4)+9", "9 + 4(13)", "9+4×13 = 61"],
    ["9-2-5", "9-5-2", "9-(2+5)", "(9-5)-2", "9-(5+2)"],
    ["9-(5-2)", "9-5+2", "2+9-5", "(2-5+9)", "9+(2-5)"],
    ["6*5/3", "6/3*5", "5/3*6", "5*(6/3)", "6/(3/5)", r"\frac{6*5}{3}"],
    ["2*(3+4)", "(4+3)*2", "2(4+3)"],
    ["24/(3*4)", "24/3/4", "24/4/3"],
]


@each("expressions", SAME_SOLUTION)
def test_one_solution_has_one_spelling(expressions):
    (spelling,) = {spelling_of(expression) for expression in expressions}
    assert eval(spelling) == eval(expressions[0])
    assert sorted(re.findall("[0-9]+", spelling)) == sorted(re.findall("[0-9]+", expressions[0]))


def test_different_solutions_have_different_spellings():
    """All expressions of three numbers. Two are one solution if they have the same value whatever
    the three numbers are: here for three random choices of them."""
    rng = random.Random(0)
    choices = [[rng.randint(10**5, 10**6) for _ in range(3)] for _ in range(3)]
    spellings_of_values = {}
    for a, b, c in permutations("abc"):
        for first, second in product("+-*/", repeat=2):
            for text in (f"({a}{first}{b}){second}{c}", f"{a}{first}({b}{second}{c})"):
                values = []
                for numbers in choices:
                    names = dict(zip("abc", map(Fraction, numbers), strict=True))
                    values.append(eval(text, names))
                written = text.translate(str.maketrans("abc", "235"))
                spellings_of_values.setdefault(tuple(values), set()).add(spelling_of(written))
    assert len(spellings_of_values) > 30
    assert all(len(spellings) == 1 for spellings in spellings_of_values.values())
    assert len(set.union(*spellings_of_values.values())) == len(spellings_of_values)


def random_tree(numbers, rng):
    """A number, or [operator, left tree, right tree]."""
    if len(numbers) == 1:
        return numbers[0]
    middle = rng.randrange(1, len(numbers))
    left = random_tree(numbers[:middle], rng)
    right = random_tree(numbers[middle:], rng)
    return [rng.choice("+-*/"), left, right]


def random_spelling(tree, rng):
    """The tree as text: operands of + and * in any order, and more brackets than are needed."""
    if isinstance(tree, int):
        return rng.choice((f"{tree}", f"{tree}", f"({tree})"))
    operator, left, right = tree
    operands = [random_spelling(left, rng), random_spelling(right, rng)]
    if operator in "+*":
        rng.shuffle(operands)
    if operator in "+*" and isinstance(right, list) and right[0] == operator:
        rotated = [operator, [operator, left, right[1]], right[2]]  # a+(b+c) as (a+b)+c
        if rng.random() < 0.5:
            return random_spelling(rotated, rng)
    return f"({operands[0]}{rng.choice(('', ' '))}{operator}{operands[1]})"


def test_random_expressions_agree_with_their_permutations():
    rng = random.Random(0)
    spellings = Counter()
    for _ in range(1000):
        numbers = rng.sample(range(1, 100), 5)
        tree = random_tree(numbers, rng)
        try:
            value = eval(re.sub("([0-9]+)", r"Fraction(\1)", random_spelling(tree, rng)))
        except ZeroDivisionError:
            assert spelling_of(random_spelling(tree, rng)) is None
            continue
        (spelling,) = {spelling_of(random_spelling(tree, rng)) for _ in range(5)}
        assert eval(re.sub("([0-9]+)", r"Fraction(\1)", spelling)) == value
        assert sorted(map(int, re.findall("[0-9]+", spelling))) == sorted(numbers)
        assert spelling_of(spelling) == spelling
        spellings[spelling] += 1
    assert len(spellings) > 900


# ---- Answers to Arithmetic ----

RIGHT_16 = r"""
Answer: 16
Answer: +16
Answer: x = 16
Answer: x = +16
Answer: 16 (sixteen)
Answer: sixteen (16)
Answer: **16** units
Answer: **16** apples
Answer: f = 16
Answer: 16 in total
Answer: $\underline{16}$
Answer: 16 units
Answer: **16** (sixteen)
Answer: \boxed{16}
Answer: 16.0
Answer: 016
Answer: 7+9 = 16
Answer: 16 = 7+9
Answer: 16 (7+9)
Answer: 16, because 7+9=16
Answer: <integer>16</integer>
Answer: [16]
Answer: "16"
Answer: 16!
Answer: 16\text{ units}
Answer: 16 is the answer
**Answer:** **16**
The answer is 16.
The final answer is **16**. I hope that this helps.
### Answer\n\n16
**Final Answer**\n$16$
<answer>7+9 = 16</answer>
We get \boxed{16}.
7+9=16 (Step 1)
7 + 9 = **16** (step 2 of 2)
7+9=16 in 2 steps
Step 2: 7+9=16
7+9=+16
3*4=12, 12+4=16
The sum of 7 and 9 is 16.
So it is 16.
16\n\nDone.
<think>Answer: 5</think>16
"""
WRONG_16 = r"""
Answer: -16
Answer: −16
Answer: - 16
Answer: 16.5
Answer: 16 or 17
Answer: 16 or 16
Answer: 16 (seventeen)
Answer: 16 thousand
Answer: 16 hundred units
Answer: sixteen thousand (16)
Answer: step 16
Answer: f(16)
Answer: sqrt(16)
Answer: 16, wait, no
Answer: none of the 16
Answer: 16 dozen
Answer: 16 hundredths
Answer: 16 squared
Answer: 16 percent
Answer: 16%
Answer: negative 16
Answer: -sixteen
Answer = -16
Answer -16
Answer: not 16
Answer: about 16
Answer: at least 16
Answer: log 16
Answer: the square of 16
Answer: two times 16
Answer: 16 and a half
Answer: 16 point five
Answer: between 16 and 17
Answer: 1/16
Answer: 32/2
Answer: 7+9
Answer: 16x
Answer: 2x = 16
Answer: 16^2
Answer: 16²
Answer: 16**1
Answer: 1 6
Answer: 16, 17
Answer: 16 units + 16 units
Answer: 16 units * 16
Answer: 7+9 = 17
Answer: 7+8 = 16
Answer: ١٦
Answer: 16?
16 Answer:
16\nAnswer: none
<think>16
The answer is not 16.
The answer is 16 or 17.
−16
It is 16.5
7+9=-16
7+9=16.5
7+9=16+1
7+9=16 * 2
1,16
16x1
16, no 7
"""
RIGHT_1021 = r"""
Answer: 1,021
Answer: = 1021
Answer: 1 021.
Answer:\n1021
Answer: 1000+21 = 1021
Answer: \(1021\)
Answer: one thousand and twenty-one
Final answer: 1{,}021
Answer: 1\,021
So it is 1,021.
1000 + 21 = 1021
"""
WRONG_1021 = """
Answer: 1020+1
Answer: 10 21
10,21
1021x1
1021, no 7
1021 = 1022
"""


def test_answers_to_arithmetic():
    for text in lines_of(RIGHT_16):
        assert ARITHMETIC.answer(text.replace(r"\n", "\n")) == "16", text
    for text in lines_of(WRONG_16):
        assert ARITHMETIC.reward({"value": 16}, text.replace(r"\n", "\n")) == 0.0, text
    for text in lines_of(RIGHT_1021):
        assert ARITHMETIC.answer(text.replace(r"\n", "\n")) == "1021", text
    for text in lines_of(WRONG_1021):
        assert ARITHMETIC.reward({"value": 1021}, text) == 0.0, text


@each("value", [0, 7, 16, 40, 63, 100, 101, 219, 400])
def test_numbers_in_words_are_compared(value):
    words = []
    if value >= 100:
        words += [tasks.ONES[value // 100], "hundred"]
    if value % 100 >= 20:
        words.append(tasks.TENS[value % 100 // 10 - 2])
    if 0 < value % 100 < 20 or value == 0:
        words.append(tasks.ONES[value % 100])
    elif value % 10:
        words[-1] += "-" + tasks.ONES[value % 10]
    text = f"Answer: {value} ({' '.join(words)})"
    assert ARITHMETIC.answer(text) == str(value)
    assert ARITHMETIC.answer(text.replace(f" {value} ", f" {value + 1} ")) is None


# ---- Texts that attack the verifier ----

HOSTILE = [
    "99**98**97",
    "1/(0)",
    "×÷",
    "nan",
    "2²",
    "__import__('os')",
    "1e999",
    "9^{9^{9^{9}}}",
    "٣/٤",
    "$$",
    "\ud800",
    "\0",
    "(" * 60 + "3*7+5" + ")" * 60,
    "1/" + "0" * 150,
    "hundred " * 20,
    "one " + "thousand " * 20,
    "9" * 10 + " = " + "9" * 10,
    "answer" + "*" * 10**6,
    "Answer:" + " $" * 10**6,
]
HOSTILE_PIECES = r"""
=
(
)
9
+-
**
\frac
\frac{
\boxed{
\boxed{}
Answer: 
The answer is 
<answer>
</answer>
<think>
1,
1.
-9 
= 9 
9(
9 (9) 
 x 
because 
→
"""  # noqa: W291
HOSTILE += [piece * 66 for piece in lines_of(HOSTILE_PIECES)]
HOSTILE += [piece * 10**6 for piece in lines_of(HOSTILE_PIECES)]


@each("body", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_answers_are_worth_nothing_at_once(body):
    begin = time.perf_counter()
    for text in (body, rf"\boxed{{{body}}}", f"Answer: {body}\nAnswer: {body}"):
        for task, problem in ((COUNTDOWN, REACH_26), (ARITHMETIC, {"value": 26})):
            assert task.reward(problem, text) == 0.0
            assert len(task.answer(text) or "") <= 200
    assert COUNTDOWN.reward(REACH_26, body + "</think>\nAnswer: 3*7+5") == 1.0
    assert time.perf_counter() - begin < 3


def test_fuzzed_completions_get_a_reward_of_zero_or_one():
    rng = random.Random(0)
    rewards = set()
    pieces = ["3*7+5", "26", "Answer: ", "**", "none", r"\frac", "×", "٣", "$", "x", " or ", " is "]
    pieces += list(r"01235679+-*/()^_={}[].\ ")
    for _ in range(8000):
        start = rng.choice(("", "Answer: ", r"\boxed{", "Answer: 26", "Answer: 3*7+5"))
        text = start + "".join(rng.choices(pieces, k=rng.randrange(25))) + "}"
        for task, problem in ((COUNTDOWN, REACH_26), (ARITHMETIC, {"value": 26})):
            reward = task.reward(problem, text)
            rewards.add(reward)
            assert reward == 0.0 or task.answer(text)
    assert rewards == {0.0, 1.0}


def test_expressions_have_the_value_that_python_gives_them():
    rng = random.Random(0)
    valid = 0
    for _ in range(6000):
        text = "".join(rng.choices("0123456789+-*/()", k=5))
        sides = tasks.read_answer(text)
        juxtaposed = re.search(r"[0-9)]\(|\)[0-9]", text)
        signed = re.search(r"(^|[-+*/(])[-+]", text)
        bold = "**" in text
        if not sides or juxtaposed or signed or bold:
            continue
        (expression,) = sides
        valid += 1
        plain = re.sub(r"(?<![0-9])0+(?=[0-9])", "", text)  # Python refuses 07
        assert float(expression.value) == pytest.approx(eval(plain))
        assert float(expression.value) == pytest.approx(eval(expression.spelling))
        assert expression.numbers == [int(digits) for digits in re.findall("[0-9]+", text)]
    assert valid > 30


UNSAFE = r"(?<![.\w])(eval|exec|compile|__import__)\(|pickle|dill|joblib|marshal|np\.load|"
UNSAFE += r"torch\.load\((?!.*weights_only=True)|trust_remote_code\W+\b(?!False)"


@each("module", [spiral, tasks])
def test_nothing_evaluates_unpickles_or_runs_a_model_s_code(module):
    assert not re.search(UNSAFE, Path(module.__file__).read_text())
