"""The tests of tasks.py: tokenizer, generated tasks, verifiers, files of problems, the worker."""

import ast
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import tasks

HERE = Path(__file__).resolve().parent
COUNTDOWN, ARITHMETIC, MATH = tasks.Countdown(), tasks.Arithmetic(), tasks.Math()
REACH_26 = {"numbers": [3, 7, 5], "target": 26}
REACH_24 = {"numbers": [4, 7, 1], "target": 24}
IS_26 = {"value": 26}
EVERY_TASK = ["countdown", "arithmetic", "countdown:numbers=4,high=50", "arithmetic:operations=5"]
MEGABYTE = 10**6


def is_right(gold, answer):
    return MATH.reward({"problem": "?", "answer": gold}, rf"\boxed{{{answer}}}") == 1.0


def test_tiny_tokenizer_round_trips_any_text_and_keeps_integers_whole():
    tokenizer, rng = tasks.TinyTokenizer(), random.Random(0)
    assert all(len(tokenizer.encode(word)) == 1 for word in (*map(str, range(1000)), *tasks.WORDS))
    assert tokenizer.encode("12 345: yes\n1234") == [268, 32, 601, 262, 379, 52]
    assert (tokenizer.size, tokenizer.eos_id) == (1275, 1274)
    pieces = [*tasks.WORDS, *tokenizer.markers, *("<end>", "007", "1234567", "é", "🙂", "\0")]
    for _ in range(300):
        text = "".join(rng.choices(pieces, k=20))
        tokens = tokenizer.encode(text)
        assert tokenizer.decode(tokens) == text and max(tokens) < tokenizer.eos_id - 18
    assert len(tokenizer.chat("<candidate 1>\n" + tasks.AGGREGATE)) == 2


# ---- Generated tasks ----


@pytest.mark.parametrize("name", EVERY_TASK)
def test_problems_are_solvable_distinct_reproducible_and_splits_disjoint(name):
    task, seen = tasks.make_task(name), Counter()
    for split in ("train", "validation", "test"):
        zero, one = (task.problems(split, 200, seed) for seed in (0, 1))
        keys = {task.key(problem) for problem in zero}
        assert len(keys) == 200 and zero != one and task.problems(split, 20, 0) == zero[:20]
        seen.update(keys | {task.key(problem) for problem in one})
        for problem in zero:
            solution = problem.get("solution") or str(problem["value"])
            right = problem.get("target", problem.get("value"))
            assert task.reward(problem, f"Answer: {solution}") == 1.0
            assert eval(problem.get("solution") or problem["expression"]) == right
    assert max(seen.values()) <= 2  # of two seeds of one split


def test_a_task_gives_all_it_has_when_it_has_fewer_and_raises_when_it_has_none():
    small = tasks.make_task("countdown: numbers = 2, high=5")
    assert 10 < len(small.problems("train", 8000, 0)) < 100
    with pytest.raises(ValueError, match="no problem in the split 'test'"):
        tasks.Countdown(2, 2, 10).problems("test", 20, 0)


@pytest.mark.parametrize("name", ["chess", "countdown:colour=3", "countdown:numbers=99"])
def test_unknown_tasks_and_options_are_refused_in_a_line(name):
    with pytest.raises(ValueError, match=name.split(":")[0]):
        tasks.make_task(name)


def test_questions_become_problems():
    assert COUNTDOWN.question("Numbers: 3, 7 and 5. Target: 26") == REACH_26
    assert ARITHMETIC.reward(ARITHMETIC.question("3 * (4+5)"), "Answer: 27") == 1.0
    assert MATH.reward(MATH.question("What is 1+1?"), r"\boxed{2}") == 0.0
    for task, text in ((COUNTDOWN, "3 26"), (ARITHMETIC, "2**9"), (ARITHMETIC, "what?")):
        with pytest.raises(ValueError):
            task.question(text)


RIGHT_24 = r"""
4*(7-1)|4*(7−1)|4 \times (7-1)|4 \cdot (7-1)|4·(7-1)|4 x (7-1)|\(4*(7-1)\)|$4*(7-1)$|4*[7-1]
\boxed{4*(7-1)}|[4*(7-1)]|<4*(7-1)>|24 = 4*(7-1)|4*(7-1),|4*(7-1);|4*(7-1) ✓|(4)*((7)-(1))
**4 × (7 – 1) = 24.**|4*(7-1) = 4*6 = 24|$\boxed{4\times\left(7-1\right)=24}$
"""
WRONG_24 = r"""
4*(7-1)=24 or 1+2|4*(7-1)=25|24|4*7-1|4*(7-1)*1|-4*(1-7)|4*(7-1)**1|4(7-1)|4*(7-1)//1|none
4*(7-1) 1|4*(7-1);0|1+2 = 4*(7-1)|(4*(7-1)|4*(7-1)+|4*(7-1)/(1-1)|٤*(7-1)|4.0*(7-1)|4*6
"""


def split(table):
    return table.strip().replace("\n", "|").split("|")


def test_countdown_answers():
    for answer in split(RIGHT_24):
        assert COUNTDOWN.reward(REACH_24, f"7-1=6\n**Answer**: {answer}\n") == 1.0, answer
    for answer in ["", *split(WRONG_24)]:
        assert COUNTDOWN.reward(REACH_24, f"Answer: 4*(7-1)\nAnswer: {answer}") == 0.0, answer
    spellings = ("3*7+5", "3 * 7 + 5", "3*7+5 = 26", "3×7+5", r"$(3 \times 7) + 5$", "26=3*7+5")
    assert {COUNTDOWN.answer("Answer: " + text) for text in spellings} == {"3*7+5"}
    assert COUNTDOWN.reward({"numbers": [4, 4, 8], "target": 16}, "Answer: 8*4-4*4") == 0.0
    assert COUNTDOWN.reward({"numbers": [1, 3, 3], "target": 1}, "Answer: 1/3*3") == 1.0


RIGHT_1021 = r"""
Answer: 1,021|Answer: = 1021|Answer: 1 021.|**Answer:** **1021**|Answer: 1000+21 = 1021|Answer:#1021
Answer: \(1021\)|Final answer: 1{,}021|So it is 1,021.|1000 + 21 = 1021|<think>Answer: 5</think>1021
"""
WRONG_1021 = r"""
Answer: -1021|Answer: 1021.5|−1021|It is 1021.5|Answer: 1021 or 1022|Answer: 1020+1|10,21|1021x1
<think>1021|<think>Answer: 1021|1021 Answer:|1021, no 7|1021 = 1022|Answer: 10 21|Answer: ١٠٢١
"""


def test_arithmetic_answers():
    for text in split(RIGHT_1021):
        assert ARITHMETIC.answer(text.replace("#", "\n")) == "1021", text
    for text in split(WRONG_1021):
        assert ARITHMETIC.reward({"value": 1021}, text) == 0.0, text


HOSTILE = r"99**98**97|1/(0)|×÷|nan|2²|__import__('os')|1e999|9^{9^{9^{9}}}|٣/٤|$$".split("|")
HOSTILE += [text * 66 for text in ("=", r"\frac", r"\a", "1,", "(1,", 'a="', r"\pm", "0.", "{")]
HOSTILE += [text * 10**5 for text in ("(", "9", "+-", "Answer: ", r"\boxed{", r"\boxed{}", "}")]
HOSTILE += ["(" * 60 + "3*7+5" + ")" * 60, "1/" + "0" * 150, "\ud800", "\0"]
HOSTILE += ["answer" + "*" * 10**6, "Answer:" + " $" * 10**6]


@pytest.mark.parametrize("body", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_answers_are_worth_nothing_at_once(body, no_library):
    is_right("x", "y+1")  # whatever starts the worker has done so
    begin = time.perf_counter()
    for text in (body, rf"\boxed{{{body}}}", f"Answer: {body}\nAnswer: {body}"):
        assert COUNTDOWN.reward(REACH_26, text) == ARITHMETIC.reward(IS_26, text) == 0.0
        assert not MATH.reward({"answer": "3"}, text) and not MATH.reward({"answer": "x"}, text)
        assert len(MATH.answer(text) or "") <= 1000
    assert COUNTDOWN.reward(REACH_26, body + "\nAnswer: 3*7+5") == 1.0
    assert time.perf_counter() - begin < 3


def test_fuzzed_completions_get_a_reward_of_zero_or_one(no_library):
    rng, rewards = random.Random(0), Counter()
    pieces = (
        r"3*7+5|26|Answer: |**|none|\frac|×|٣| |$|0 1 2 3 5 6 7 9 + - * / ( ) ^ _ = { } [ ] . \\"
    )
    pieces = [*pieces.split("|"), *pieces]
    starts, tasked = ("", "Answer: ", r"\boxed{", "Answer: 26"), (COUNTDOWN, ARITHMETIC, MATH)
    for _ in range(5000):
        text = rng.choice(starts) + "".join(rng.choices(pieces, k=rng.randrange(25))) + "}"
        for task in tasked:
            reward = task.reward({**REACH_26, **IS_26, "answer": "26"}, text)
            rewards[reward] += 1
            assert reward == 0.0 or task.answer(text)
    assert set(rewards) == {0.0, 1.0}


def test_expressions_have_the_value_that_python_gives_them():
    rng, valid = random.Random(0), 0
    for _ in range(2000):
        text = "".join(rng.choice("0123456789+-*/()") for _ in range(rng.choice((3, 5, 7))))
        try:
            value, integers, spelling = tasks.evaluate(text)
        except ValueError:
            continue
        valid += 1
        assert float(value) == pytest.approx(eval(text)) == pytest.approx(eval(spelling))
        assert integers == [int(digits) for digits in re.findall("[0-9]+", text)]
    assert valid > 30


@pytest.mark.parametrize("module", ["spiral.py", "tasks.py"])
def test_nothing_evaluates_or_unpickles(module):
    banned = {
        "eval",
        "exec",
        "compile",
        "__import__",
        "np.load",
        "pickle",
        "dill",
        "joblib",
        "marshal",
    }
    for node in ast.walk(ast.parse((HERE / module).read_text())):
        if isinstance(node, (ast.Name, ast.Attribute, ast.alias)):
            assert ast.unparse(node) not in banned, node.lineno
        for keyword in getattr(node, "keywords", []):
            safe = {"trust_remote_code": "False", "weights_only": "True"}.get(keyword.arg)
            assert safe in (None, ast.unparse(keyword.value)), node.lineno


# ---- Math ----


@pytest.fixture
def library(tmp_path, monkeypatch):
    """install(source): what `import math_verify` finds in workers started from here on."""

    def install(source):
        tasks.equivalent.cache_clear()
        if tasks.worker:
            tasks.worker.kill()
            tasks.worker.communicate()
        tasks.worker = None
        (tmp_path / "math_verify.py").write_text(source)

    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    yield install
    install("")


STAND_IN = r"""
import mmap, os, sympy, time
from types import SimpleNamespace
grader, parser = SimpleNamespace(), SimpleNamespace(parse_latex_cached=str)
def verify(right, answer, timeout_seconds):
    assert timeout_seconds is None          # its own limit works in the main thread only
    print("1\n1")                           # no reply
    if answer == "x-1": time.sleep(60)
    if answer == "x-2": 9 ** 9 ** 9         # in C, where no handler of Python's runs
    if answer == "x-3": os._exit(0)
    if answer == "x-4": raise RuntimeError
    if answer == "x-5": return bool(mmap.mmap(-1, 8 << 30))
    if answer == "x-6": time.sleep(0.6); return True
    if answer == "x-7": return sympy.sympify("().__class__.__name__.__len__()") == 5
    if answer == "x-8": return sympy.Number("12") == 12 and sympy.Number("0.5") == sympy.S.Half
    return [right, answer] in ([r"\frac{1}{2}+x", "x+0.5"], ["2x", "x+x"])
"""


@pytest.fixture
def stand_in(library):
    library(STAND_IN)


@pytest.fixture
def no_library(library):
    library("raise ImportError")


@pytest.mark.parametrize("with_library", [False, True])
def test_pairs_of_every_kind(with_library, library, monkeypatch):
    if with_library:
        pytest.importorskip("math_verify")
        monkeypatch.delenv("PYTHONPATH")
    library("raise ImportError")
    pairs = map(
        json.loads, (HERE / "experiments" / "verifier_pairs.jsonl").read_text().splitlines()
    )
    missed = []
    for pair in pairs:
        rewarded = is_right(pair["gold"], pair["answer"])
        assert pair["right"] or not rewarded, pair
        missed += [pair] * (pair["right"] and not rewarded)
    assert len(missed) <= (8 if with_library else 60), missed


VOTES = {
    "1/2": r"0.5|\frac{1}{2}|\dfrac12|2/4|.5|+0.50|$0.5$|½|x = 0.5|\frac{1}{2}\text{ cm}",
    "5/2": r"2 1/2|2.5|2\frac{1}{2}|2½|25e-1",
    "1234567": r"1,234,567|1{,}234{,}567|1\,234\,567|1 234 567|\$1,234,567.00",
    "{1, 2}": r"\{2,1\}|1, 2|2 \text{ and } 1|x=1, x=2",
    "yes": r"Yes|\text{yes}|\mathrm{YES}",
    "-3": r"-3|–3|(-3)|{-3}|-3.|\underline{-3}",
}


def test_votes_count_values_and_not_spellings():
    for value, spellings in VOTES.items():
        assert {MATH.answer(rf"\boxed{{{text}}}") for text in spellings.split("|")} == {value}


SAYS_7 = r"""
\boxed{7}|\boxed{1} or $\boxed{7}$.|\boxed 7|\boxed {7}|\fbox{7}|$\boxed 7$|\boxed{\boxed{7}}
\boxed{7} \boxed{5|\boxed{7}, Answer: 5|Answer: \boxed{7}|**Answer**: 7|Final answer: 7
**Answer:** $7$.|Answer:#7|## Answer: #\[#7#\]|The answer is: 7|Answer: 1#Answer: 7
<think>\boxed{1}</think> \boxed{7}|\boxed{1}</think>Answer: 7
"""
SAYS_NOTHING = (
    r"""<think>\boxed{7}|Answer: |7|<think>\boxed{1}</think> so 7|\boxed{}|\boxed{ $ }|}{||"""
)


def test_the_last_box_is_the_answer_else_the_answer_line_and_thoughts_are_none():
    for text in split(SAYS_7):
        assert MATH.answer(text.replace("#", "\n")) == "7", text
    for text in SAYS_NOTHING.split("|"):
        assert MATH.answer(text) is None, text
    assert MATH.answer(r"\boxed{4} \boxed{" + "9" * 201 + "}") == "4"


def jsonl(path, *rows):
    texts = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(texts) + "\n")
    return str(path)


ROW = {"problem": "What is 1+1?", "answer": "2"}


def test_math_rows_are_read_and_the_first_of_equal_problems_counts(tmp_path):
    b, d = {"problem": "b", "answer": 10, "split": "test"}, '{"problem": "d", "answer": 0.50}'
    path = jsonl(tmp_path / "p.jsonl", {**ROW, "id": 7}, "", b, {**ROW, "answer": "3"}, d)
    Path(path).write_bytes(b"\xef\xbb\xbf" + Path(path).read_bytes())
    task = tasks.make_task("math", path)
    assert [row["answer"] for row in task.rows.values()] == ["2", "10", "0.50"]
    prompt = task.prompt(task.rows["b"])
    assert prompt.startswith("b\n") and r"\boxed{}" in prompt and task.answer(prompt) is None


BAD = [
    "{",
    "3",
    '["problem", "answer"]',
    "null",
    "[" * 10**5,
    '{"problem": "a"}',
    '{"answer": "2"}',
]
BAD += ['{"problem": "a", "answer": %s}' % value for value in ("NaN", "true", "{}", "9" * 5000)]
BAD += [{**ROW, "answer": value} for value in (None, "", " ", "$$", ["2"], "9" * 201)]
BAD += [{**ROW, "problem": value} for value in (5, "", " \n", None, "a" * 20_001, "\ud800")]
BAD += [{**ROW, "split": value} for value in ("dev", None, ["train"])]


@pytest.mark.parametrize("bad", BAD, ids=range(len(BAD)))
def test_malformed_rows_are_named_by_file_and_line(bad, tmp_path):
    path = jsonl(tmp_path / "p.jsonl", ROW, "", bad, ROW)
    with pytest.raises(ValueError, match="line 3: ") as error:
        tasks.make_task("math", path)
    message = str(error.value)
    assert path in message and len(message.splitlines()) == 1 and message.count("line") == 1


def test_math_needs_its_file_and_only_math_takes_one(tmp_path):
    path = jsonl(tmp_path / "p.jsonl", ROW)
    for name, data in (("math", ""), ("countdown", path), ("arithmetic", path)):
        with pytest.raises(ValueError, match="--data"):
            tasks.make_task(name, data).problems("train", 1, 0)
    with pytest.raises(ValueError, match="line 1: "):
        (tmp_path / "p.jsonl").write_bytes(b'{"problem": "\xff", "answer": 1}\n')
        tasks.Math(path)
    with pytest.raises(OSError):
        tasks.make_task("math", str(tmp_path / "none.jsonl"))


def test_math_splits_by_checksum_or_by_the_row(tmp_path):
    rows = [{"problem": f"{i}+1?", "answer": i + 1} for i in range(1000)]
    task, found = tasks.Math(jsonl(tmp_path / "p.jsonl", *rows)), []
    for split in ("train", "validation", "test"):
        zero, one = (task.problems(split, 8000, seed) for seed in (0, 1))
        assert zero != one and zero[:20] == task.problems(split, 20, 0)
        assert {row["split"] for row in [*zero, *one]} == {split}
        found += zero
    assert sorted(row["answer"] for row in found) == sorted(str(i + 1) for i in range(1000))
    own = tasks.Math(jsonl(tmp_path / "own.jsonl", {**ROW, "split": "test"}))
    assert len(own.problems("test", 200, 0)) == 1
    with pytest.raises(ValueError, match='own.jsonl has no problem in the split "train", of 1'):
        own.problems("train", 1, 0)


# ---- The worker ----


def test_the_library_decides_what_is_left(stand_in):
    assert is_right("2x", "$x+x$") and not is_right("2x", "x-x") and not is_right("x+x", "2x")
    assert is_right("2x", "x-8") and not is_right("2x", "x-7")


@pytest.mark.parametrize("answer", ["x-1", "x-2", "x-3", "x-4", "x-5"])
def test_the_time_limit_holds_from_a_thread_and_the_next_call_works(answer, stand_in):
    rewards = []

    def ask():
        rewards.extend([is_right("2x", answer), is_right("2x", "x+x")])

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(30)  # a machine under load takes seconds to start a process
    assert rewards == [False, True]


def test_a_worker_killed_by_others_starts_again(stand_in):
    for _ in range(2):
        assert is_right("2x", "x+x")
        tasks.worker.kill()
        tasks.worker.wait()
        tasks.equivalent.cache_clear()


def test_an_interrupted_question_leaves_no_reply_for_the_next(stand_in):
    def interrupt(*_):
        raise KeyboardInterrupt

    assert is_right("2x", "x+x")
    tasks.equivalent.cache_clear()
    previous = signal.signal(signal.SIGUSR1, interrupt)
    try:
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGUSR1)).start()
        with pytest.raises(KeyboardInterrupt):
            is_right("2x", "x-6")
        assert [is_right("2x", answer) for answer in ("y+1", "x+x", "z+1")] == [False, True, False]
    finally:
        signal.signal(signal.SIGUSR1, previous)


def test_threads_share_a_worker_and_get_their_own_replies(stand_in, monkeypatch):
    started, start = [], tasks.Popen

    def counted(*args, **options):
        started.append(args)
        return start(*args, **options)

    monkeypatch.setattr(tasks, "Popen", counted)
    answers = ["x+x" if i % 3 == 0 else f"x-{i}x" for i in range(300)]
    with ThreadPoolExecutor(8) as pool:
        rewards = list(pool.map(is_right, ["2x"] * 300, answers))
    assert rewards == [i % 3 == 0 for i in range(300)] and len(started) == 1


def test_without_the_library_it_says_so_once(no_library, capfd):
    assert [is_right("2x", answer) for answer in ("x+x", "2 x", "2x", "3x")] == [0, 1, 1, 0]
    assert capfd.readouterr().err.count("no math-verify") == 1 and tasks.worker is False


@pytest.mark.parametrize("busy", [False, True])
def test_the_worker_goes_when_its_parent_is_killed(busy, stand_in):
    code = f"""import os, tasks, threading, time
tasks.equivalent("2x", "x+x")
print(tasks.worker.pid, flush=True)
threading.Thread(target=tasks.equivalent, args=("2x", "{"x-1" if busy else "x+x"}")).start()
time.sleep(0.3)
os.kill(os.getpid(), 9)"""
    killed = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True)
    for _ in range(60):
        command = ["ps", "-o", "stat=", "-p", str(int(killed.stdout))]
        if subprocess.run(command, capture_output=True, text=True).stdout.strip()[:1] in ("", "Z"):
            return
        time.sleep(0.1)
    raise AssertionError("the worker is still there")


README_ROWS = r"""
{"question": "How many?", "answer": "3*4=<<3*4=12>>12\n#### 1,200"}
{"problem": "Half?", "solution": "It is $\\boxed{\\frac{1}{2}}$.", "level": "Level 1"}
{"problem": "Root?", "answer": "2\\sqrt{3}", "difficulty": "3/8"}
"""


def test_the_readme_converts_each_data_set(tmp_path):
    texts = (HERE / "README.md").read_text() + (HERE / "experiments/README.md").read_text()
    commands = [line for line in texts.splitlines() if line.startswith("python -c")]
    sets = zip(("gsm8k", "math", "polaris"), README_ROWS.strip().splitlines(), strict=True)
    answers = ("1200", "1/2", r"2\sqrt{3}")
    for (name, row), command, answer in zip(sets, commands, answers, strict=True):
        jsonl(tmp_path / f"{name}.jsonl", row)
        command = command.replace("python", f"PYTHONPATH={HERE} {sys.executable}", 1)
        subprocess.run(command, shell=True, check=True, cwd=tmp_path)
        (problem,) = tasks.Math(tmp_path / "problems.jsonl").rows.values()
        assert is_right(problem["answer"], answer) and problem["problem"] in row
