"""What takes too long for the unit tests; writes results/robustness_kill.json and ..._fuzz.json.

    python experiments/robustness.py kill --count 100     # SIGKILL at random moments, then resume
    python experiments/robustness.py fuzz --count 100000  # hostile completions for each verifier

kill: each run ends with the bytes of an undisturbed one: metrics, weights and optimizer.
fuzz: no exception, and the time that the slowest completion took.
"""

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import spiral  # noqa: E402
import tasks  # noqa: E402

RUN = """--task=arithmetic:operations=1 --steps=4 --problems=2 --max_draws=1 --num_traces=4
    --set_size=2 --num_sets=2 --num_aggregations=2 --save_every=1 --eval_problems=0
    --train_problems=40 --max_trace_tokens=16 --max_aggregation_tokens=16 --rows=16
    --max_prompt_tokens=256""".split()
FILES = ["metrics.jsonl", "step-00004/model.safetensors", "step-00004/optimizer.pt"]
PIECES = r"Answer: @\boxed{@\frac@{@}@(@)@9@23@**@+@-@*@/@=@^@_@1/0@$@%@\@,000@.@٣@²@none@x@ @"
PIECES = [*PIECES.split("@"), "\n", "\0"]


def run(out, seconds=None):
    """A run in a forked child, which spares the imports; killed after `seconds`."""
    child = os.fork()
    if child == 0:
        sys.stdout = sys.stderr = open(f"{out}.log", "a")
        os._exit(spiral.main([*RUN, f"--out={out}"]))
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1] == 0


def kill(count):
    torch.set_num_threads(1)  # forked children may compute
    rng, runs, same, kills = random.Random(0), 0, 0, 0
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / "whole"
        began = time.time()
        assert run(whole), Path(f"{whole}.log").read_text()
        length = time.time() - began
        while kills < count:
            out = Path(folder) / str(runs)
            for _ in range(rng.randint(1, 5)):
                kills += not run(out, rng.random() * length)
            assert run(out)
            equal = [(out / name).read_bytes() == (whole / name).read_bytes() for name in FILES]
            runs, same = runs + 1, same + all(equal)
            print(f"{kills} kills, {same} of {runs} runs as the undisturbed one", flush=True)
    return {"kills": kills, "runs": runs, "same": same}


def fuzz(count):
    found = {}
    for task in (tasks.Countdown(), tasks.Arithmetic(), tasks.Math()):
        rng, slowest, failed = random.Random(0), 0.0, 0
        problem = task.question("1+2" if type(task) is tasks.Arithmetic else "1 2 3")
        problem["answer"] = r"\frac{1}{2}"  # of Math
        for _ in range(count):
            few = rng.sample(PIECES, rng.choice((1, 2, 4, 16)))
            text = "".join(rng.choices(few, k=rng.choice((3, 30, 300, 1500))))
            began = time.process_time()
            try:
                task.reward(problem, rng.choice(("", "Answer: ", r"\boxed{")) + text)
            except Exception as error:
                failed += 1
                print(f"{type(error).__name__} on {text[:80]!r}", flush=True)
            slowest = max(slowest, time.process_time() - began)
        found[type(task).__name__] = {"exceptions": failed, "slowest_ms": 1000 * slowest}
    return {"completions": count, **found}


def main(arguments=None):
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=("kill", "fuzz"))
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--out", type=Path, default=HERE / "results")
    args = parser.parse_args(arguments)
    found = {"kill": kill, "fuzz": fuzz}[args.what](args.count)
    (args.out / f"robustness_{args.what}.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
