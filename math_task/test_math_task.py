"""What must be true of the math task. A stand-in replaces math-verify where it has to misbehave.

pytest -q math_task
"""

import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import math_task
from math_task import worker as worker_module
from math_task.answers import MAX_ANSWER
from math_task.worker import equivalent, worker

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parent
MATH = math_task.Math()
each = pytest.mark.parametrize


def is_right(gold, answer):
    return MATH.reward({"problem": "?", "answer": gold}, rf"\boxed{{{answer}}}") == 1.0


def end_worker():
    """The next question starts another one."""
    equivalent.cache_clear()
    if worker.process:
        worker.process.kill()
        worker.process.communicate()
    worker.process = None


def jsonl(path, *rows):
    texts = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(texts), errors="surrogateescape")
    return str(path)


# ---- Verdicts ----

MAX_MISSED = 10  # of about 1,000 right answers


def test_of_all_pairs_no_wrong_answer_is_rewarded_and_few_right_ones_are_missed():
    missed = []
    for line in (FOLDER / "pairs.jsonl").read_text().splitlines():
        pair = json.loads(line)
        rewarded = is_right(pair["gold"], pair["answer"])
        assert pair["right"] or not rewarded, pair
        if pair["right"] and not rewarded:
            missed.append(pair)
    assert len(missed) <= MAX_MISSED, missed


def test_a_sum_of_letters_has_a_value_but_an_equation_as_gold_is_no_number():
    assert is_right("5", "a+b=5")
    assert not is_right("x+y=5", "5")


VOTES = {
    "1/2": r"0.5|\frac{1}{2}|\dfrac12|2/4|.5|+0.50|$0.5$|½|\frac{1}{2}\text{ cm}|x \approx 0.5",
    "5/2": r"2 1/2|2.5|2\frac{1}{2}|2½|25e-1",
    "1234567": r"1,234,567|1{,}234{,}567|1\,234\,567|1 234 567|\$1,234,567.00",
    "{1, 2}": r"\{2,1\}|1, 2|2 \text{ and } 1|x=1, x=2",
    "yes": r"Yes|\text{yes}|\mathrm{YES}",
    "-3": r"-3|–3|(-3)|{-3}|-3.|\underline{-3}",
    "g*m": r"mg|gm|m\cdot g|g \times m",
    "B": r"B|\text{(B)}|\text{B) } 12|\text{Option B}",
    "(3, 4)": r"(3,4)|(x,y)=(3,4)|x=3, y=4",
}


@each("value", VOTES)
def test_votes_count_values_and_not_spellings(value):
    for spelling in VOTES[value].split("|"):
        assert MATH.answer(rf"\boxed{{{spelling}}}") == value, spelling


# ---- Finding the answer ----

SAYS_7 = r"""
\boxed{7}|\boxed{1} or $\boxed{7}$.|\boxed 7|\boxed {7}|\fbox{7}|$\boxed 7$|\boxed{\boxed{7}}
\boxed{7} \boxed{5|\boxed{7} in \boxed{}.|\boxed{7}, Answer: 5|Answer: \boxed{7}
**Answer**: 7|Final answer: 7|**Answer:** $7$.|Answer:#7|## Answer: #\[#7#\]|The answer is: 7
Answer: 1#Answer: 7|<think>\boxed{1}</think> \boxed{7}|\boxed{1}</think>Answer: 7
"""
SAYS_NOTHING = (
    r"<think>\boxed{7}|Answer: |7|<think>\boxed{1}</think> so 7|\boxed{}|\boxed{ $ }|}{||"
)


@each("text", SAYS_7.strip().replace("\n", "|").split("|"))
def test_the_last_box_is_the_answer_else_the_answer_line(text):
    assert MATH.answer(text.replace("#", "\n")) == "7"


@each("text", SAYS_NOTHING.split("|"))
def test_a_text_without_an_answer_is_worth_nothing(text):
    assert MATH.answer(text) is None
    assert MATH.reward({"answer": "7"}, text) == 0.0


def test_a_box_that_is_too_long_is_none():
    too_long = "9" * (MAX_ANSWER + 1)
    assert MATH.answer(rf"\boxed{{4}} \boxed{{{too_long}}}") == "4"


# ---- Rows ----

ROW = {"problem": "What is 1+1?", "answer": "2"}


def test_rows_are_read_and_the_first_of_equal_problems_counts(tmp_path):
    first = "\ufeff" + json.dumps({**ROW, "id": 7})
    second = {"problem": "b", "answer": 10, "split": "test"}
    again = {**ROW, "answer": "3"}
    with_a_float = '{"problem": "d", "answer": 0.50}'
    path = jsonl(tmp_path / "p.jsonl", first, "", second, again, with_a_float)
    task = math_task.Math(path)
    assert [row["answer"] for row in task.rows.values()] == ["2", "10", "0.50"]
    assert task.rows["b"] in task.problems("test", 9, 0)
    prompt = task.prompt(task.rows["b"])
    assert prompt.startswith("b\n")
    assert r"\boxed{}" in prompt
    assert task.answer(prompt) is None


SOLUTION = r"There are 3 bags with 4 apples.\nSo 12, which is $\boxed{12}$ in all."
GOLDS = [
    ("#### 18", "18"),
    ("She makes 9 * 2 = <<9*2=18>>18 a day.\n#### 18", "18"),
    ("#### 1,200", "1,200"),
    ("Answer: 18", "18"),
    ("The answer is: 18", "18"),
    ("**Final Answer:** $18$", "18"),
    ('["18"]', "18"),
    ("['18']", "18"),
    (["18"], "18"),
    ([18], "18"),
    (r'["\\frac{1}{2}"]', r"\frac{1}{2}"),
    (r"\boxed{18}", "18"),
    (r"Answer: \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
    (SOLUTION, "12"),
    ("[1, 2]", "[1, 2]"),
    ("(1,2)", "(1,2)"),
]


@each("gold, expected", GOLDS, ids=range(len(GOLDS)))
def test_golds_are_read_as_data_sets_have_them(gold, expected, tmp_path):
    task = math_task.Math(jsonl(tmp_path / "p.jsonl", {**ROW, "answer": gold}))
    assert task.rows[ROW["problem"]]["answer"] == expected


REFUSED_GOLDS = [
    (None, "null"),
    (True, "true"),
    (False, "false"),
    ({}, "text or a number"),
    ("", "1 to 200 characters"),
    (" ", "1 to 200 characters"),
    ("$$", "1 to 200 characters"),
    ("9" * 201, "1 to 200 characters"),
    ([], "lists 0 answers"),
    (["1", "2"], "lists 2 answers"),
    ('["1", "2"]', "lists 2 answers"),
    ("['18'", "no list"),
    ("['18'] + 1", "no list"),
    (r"It is \boxed{3}, or \boxed{4}.", "2 different boxes"),
    ("Each of the four boxes has three apples in it, and so she has twelve in all", "solution"),
    ("First add.\nThen multiply.", "solution"),
]


@each("gold, reason", REFUSED_GOLDS, ids=range(len(REFUSED_GOLDS)))
def test_a_gold_that_is_not_one_answer_is_refused_by_line_and_reason(gold, reason, tmp_path):
    path = jsonl(tmp_path / "p.jsonl", ROW, "", {"problem": "a", "answer": gold})
    with pytest.raises(ValueError, match=f"line 3: .*{reason}") as error:
        math_task.Math(path)
    message = str(error.value)
    assert path in message
    assert len(message.splitlines()) == 1


BAD_ROWS = ["{", "3", "[" * 10**5, '{"problem": "\udcff"}']
BAD_ROWS += ['{"problem": "a", "answer": NaN}', '{"problem": "a", "answer": %s}' % ("9" * 5000)]
BAD_ROWS += [{"problem": "a"}, {"answer": "2"}]
BAD_ROWS += [{**ROW, "problem": value} for value in ({}, "", " \n", None, "a" * 20_001, "\ud800")]
BAD_ROWS += [{**ROW, "split": value} for value in ("dev", None, ["train"])]


@each("bad", BAD_ROWS, ids=range(len(BAD_ROWS)))
def test_malformed_rows_are_named_by_file_and_line(bad, tmp_path):
    path = jsonl(tmp_path / "p.jsonl", ROW, "", bad, ROW)
    with pytest.raises(ValueError, match="line 3: ") as error:
        math_task.Math(path)
    assert path in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_splits_are_made_by_checksum_and_share_no_problem(tmp_path):
    rows = [{"problem": f"{i}+1?", "answer": i} for i in range(1000)]
    task = math_task.Math(jsonl(tmp_path / "p.jsonl", *rows))
    found = []
    for split in ("train", "validation", "test"):
        one_order = task.problems(split, 8000, seed=0)
        another = task.problems(split, 8000, seed=1)
        assert one_order != another
        assert one_order[:20] == task.problems(split, 20, seed=0)
        found += [int(row["answer"]) for row in one_order]
    assert sorted(found) == list(range(1000))


def test_a_question_without_a_gold_is_never_right():
    problem = MATH.question("What is 1+1?")
    assert MATH.reward(problem, r"\boxed{2}") == 0.0
    assert "What is 1+1?" in MATH.prompt(problem)


README_ROWS = [
    ("gsm8k", "1200", r'{"question": "How many?", "answer": "3*4=<<3*4=12>>12\n#### 1,200"}'),
    (
        "math",
        "1/2",
        r'{"problem": "Half?", "solution": "It is $\\boxed{\\frac{1}{2}}$.", "level": 1}',
    ),
    ("polaris", r"2\sqrt{3}", r'{"problem": "Root?", "answer": "2\\sqrt{3}", "difficulty": "3/8"}'),
]


def test_the_readme_converts_each_data_set(tmp_path):
    commands = re.findall("(?m)^python (-c .*)", (FOLDER / "README.md").read_text())
    for (name, answer, row), command in zip(README_ROWS, commands, strict=True):
        jsonl(tmp_path / f"{name}.jsonl", row)
        command = f"PYTHONPATH={ROOT} {sys.executable} {command}"
        subprocess.run(command, shell=True, check=True, cwd=tmp_path)
        (problem,) = math_task.Math(tmp_path / "problems.jsonl").rows.values()
        assert is_right(problem["answer"], answer)
        assert problem["problem"] in row


# ---- What the task needs ----


def test_without_math_verify_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(math_task, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install math-verify==0.9.0"):
        math_task.Math()


def test_on_windows_it_says_what_it_needs(monkeypatch):
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(ValueError, match="Linux or macOS"):
        math_task.Math()


# ---- Hostile answers ----

HOSTILE = r"99**98**97|1/(0)|×÷|nan|2²|__import__('os')|1e999|9^{9^{9^{9}}}|٣/٤|$$".split("|")
HOSTILE += [r"x_٣", r"10^{9999999}", r"\sqrt[9999999]{2}", r"10000000!", "5_{99}", r"1e-999"]
REPEATED = ["=", r"\frac", r"\a", "1,", "(1,", r"\text{", r"\pm", "0.", "{", "_", "^", "|", "'"]
HOSTILE += [text * 66 for text in REPEATED]
HOSTILE += [text * 10**5 for text in ("(", "9", "+-", "Answer: ", r"\boxed{", r"\boxed{}", "}")]
HOSTILE += ["(" * 60 + "3*7+5" + ")" * 60, "1/" + "0" * 150, "\ud800", "\0"]
HOSTILE += ["(" * 19 + "x" + ")=x" * 19, "A:(" * 19 + "x" + ")" * 19, "(B) (" * 19 + ")" * 19]
HOSTILE += ["answer" + "*" * 10**6, "Answer:" + " $" * 10**6]


@pytest.fixture(scope="module")
def impatient():
    """The worker with its true library, and less time for each question."""
    patch = pytest.MonkeyPatch()
    patch.setattr(worker_module, "SECONDS", 1)
    end_worker()
    yield
    patch.undo()
    end_worker()


@each("body", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_answers_are_worth_nothing_and_cost_little(body, impatient):
    is_right("x", "y+1")  # starts the worker, if it isn't there
    begin = time.process_time()
    for text in (body, rf"\boxed{{{body}}}", f"Answer: {body}\nAnswer: {body}"):
        assert MATH.reward({"answer": "3"}, text) == 0.0
        assert MATH.reward({"answer": "x"}, text) == 0.0
        assert len(MATH.answer(text) or "") <= 3000
    assert time.process_time() - begin < 2


def test_fuzzed_completions_get_a_reward_of_zero_or_one():
    rng, rewards = random.Random(0), set()
    pieces = r"3*7+5|26|Answer: |**|none|\frac|\text{|cm|×|٣|$|x|\le|\pm|^\circ|(B)".split("|")
    pieces += list("012569+-*/()^_={}[].,\\ ")
    for _ in range(1500):
        start = rng.choice(("", "Answer: ", r"\boxed{", "Answer: 26"))
        text = start + "".join(rng.choices(pieces, k=rng.randrange(12))) + "}"
        reward = MATH.reward({"answer": "26"}, text)
        rewards.add(reward)
        assert reward == 0.0 or MATH.answer(text)
    assert rewards == {0.0, 1.0}


UNSAFE = r"(?<![.\w])(eval|exec|compile|__import__)\(|pickle|dill|joblib|marshal|sympify"


@each("path", sorted(FOLDER.glob("*.py")), ids=lambda path: path.name)
def test_nothing_evaluates_or_unpickles(path):
    if path.name != Path(__file__).name:
        assert not re.search(UNSAFE, path.read_text())


# ---- The worker. Names with subscripts make the stand-in for math-verify misbehave. ----

STAND_IN = r"""
import mmap, os, sympy, time
from types import SimpleNamespace
x = sympy.Symbol("x")
KNOWN = {r"2*\mathrm{x}": 2 * x, r"\mathrm{x}+\mathrm{x}": x + x}
KNOWN |= {r"\frac{1}{2}+\mathrm{x}": x + 1, r"\mathrm{x}+(\frac{1}{2})": 1 + x}

def parse(latex):
    print("True\nTrue")                       # no reply
    while latex == r"\mathrm{x_1}": pass
    if latex == r"\mathrm{x_2}": 9 ** 9 ** 9  # in C, where no handler of Python's runs
    if latex == r"\mathrm{x_3}": os._exit(0)
    if latex == r"\mathrm{x_4}": raise RuntimeError
    if latex == r"\mathrm{x_5}": mmap.mmap(-1, 8 << 30)
    if latex == r"\mathrm{x_6}":              # Ctrl-C, and a late reply
        os.kill(os.getppid(), 2)
        time.sleep(0.6)
        return 2 * x
    if latex == r"\mathrm{x_7}":
        return 2 * x if sympy.sympify("().__class__.__name__.__len__()") == 5 else x
    if latex == r"\mathrm{x_8}":              # somebody kills the worker, but once only
        if os.path.exists(os.environ["KILLED"]): return 2 * x
        open(os.environ["KILLED"], "w")
        os.kill(os.getpid(), 9)
    if latex == r"\mathrm{x_9}":              # time to send it signals
        time.sleep(0.5)
        return 2 * x
    return KNOWN.get(latex, sympy.Symbol(latex))

grader, verify = SimpleNamespace(), None
parser = SimpleNamespace(parse_latex_cached=parse)
latex2sympy2 = symbols = SimpleNamespace(get_symbol=None)
"""


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """Workers started from here on import the stand-in."""
    for name in ("math_verify", "latex2sympy2_extended"):
        (tmp_path / f"{name}.py").write_text(STAND_IN)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    monkeypatch.setenv("KILLED", str(tmp_path / "killed"))
    monkeypatch.setattr(worker_module, "ROOT", str(tmp_path))
    monkeypatch.setattr(worker_module, "SECONDS", 0.5)
    (tmp_path / "math_task").symlink_to(FOLDER)
    (tmp_path / "tasks.py").symlink_to(ROOT / "tasks.py")
    end_worker()
    yield
    end_worker()


def test_the_worker_decides_on_formulas_and_evaluates_no_text(stand_in):
    assert is_right("2x", "$x+x$")
    assert not is_right("2x", "x-x")
    assert not is_right("2x", "x_7")


@each("answer", ["x_1", "x_2", "x_3", "x_4", "x_5"])
def test_time_and_memory_are_limited_and_the_next_question_works(answer, stand_in):
    rewards = ThreadPoolExecutor(1).map(is_right, ["2x"] * 2, [answer, "x+x"], timeout=60)
    assert list(rewards) == [False, True]


def test_a_worker_killed_between_questions_starts_again(stand_in):
    for _ in range(2):
        assert is_right("2x", "x+x")
        worker.process.kill()
        worker.process.wait()
        equivalent.cache_clear()


def test_a_question_is_asked_again_if_somebody_kills_the_worker(stand_in):
    assert is_right("2x", "x_8")


@each("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_to_the_whole_job_costs_no_verdict(number, stand_in):
    assert is_right("2x", "x+x")
    pid = worker.process.pid
    sender = threading.Timer(0.2, os.kill, (pid, number))
    sender.start()
    assert is_right("2x", "x_9")
    sender.join()
    assert worker.process.pid == pid


def test_the_worker_ignores_signals_from_its_first_moment(stand_in):
    process = worker_module.start()
    blocked = Path(f"/proc/{process.pid}/status")
    if blocked.exists():
        mask = int(re.search(r"SigBlk:\s*(\w+)", blocked.read_text())[1], 16)
        assert mask >> (signal.SIGTERM - 1) & 1
        assert mask >> (signal.SIGINT - 1) & 1
    process.stdin.close()
    assert process.wait(timeout=60) == 0
    process.stdout.close()


def test_an_interrupted_question_leaves_no_reply_for_the_next(stand_in):
    with pytest.raises(KeyboardInterrupt):
        is_right("2x", "x_6")
    assert not is_right("2x", "y+1")
    assert is_right("2x", "x+x")
    assert not is_right("2x", "z+1")


def test_threads_share_a_worker_and_get_their_own_replies(stand_in, monkeypatch):
    started = []
    start = worker_module.start
    monkeypatch.setattr(worker_module, "start", lambda: started.append(1) or start())
    answers = ["x+x" if i % 3 == 0 else f"y+{i}x" for i in range(90)]
    with ThreadPoolExecutor(8) as pool:
        rewards = list(pool.map(is_right, ["2x"] * 90, answers))
    assert rewards == [answer == "x+x" for answer in answers]
    assert len(started) == 1


def test_a_library_that_fails_is_named(stand_in, tmp_path):
    (tmp_path / "math_verify.py").write_text("raise ImportError")
    with pytest.raises(RuntimeError, match="math-verify"):
        is_right("2x", "x+x")


@each("busy", [False, True])
def test_the_worker_goes_when_its_parent_is_killed(busy, stand_in):
    question = "x_1" if busy else "x+x"
    code = f"""import os, threading, time
import math_task.worker
from math_task.worker import equivalent, worker
math_task.worker.SECONDS = 0.5
equivalent("2x", "x+x")
print(worker.process.pid, flush=True)
threading.Thread(target=equivalent, args=("2x", "{question}")).start()
time.sleep(0.3)
os.kill(os.getpid(), 9)"""
    folder = worker_module.ROOT
    killed = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True
    )
    pid = str(int(killed.stdout))
    for _ in range(600):
        state = subprocess.run(["ps", "-o", "stat=", "-p", pid], capture_output=True, text=True)
        if state.stdout.strip()[:1] in ("", "Z"):
            return
        time.sleep(0.1)
    raise AssertionError("the worker is still there")
