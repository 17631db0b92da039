"""Kills runs at random moments (SIGKILL), and resumes them.

    python experiments/robustness.py 100     # so many kills; writes results/robustness.json

Each run has to end as an undisturbed one: with the bytes of its weights and optimizer, and with its
metrics, but for what a clock says.
"""

import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import spiral  # noqa: E402

OPTIONS = [
    "--task=arithmetic:operations=1",
    "--steps=4",
    "--problems=2",
    "--max-draws=1",
    "--num-traces=4",
    "--set-size=2",
    "--num-sets=2",
    "--num-aggregations=2",
    "--save-every=1",
    "--eval-problems=0",
    "--train-problems=40",
    "--max-trace-tokens=16",
    "--max-aggregation-tokens=16",
    "--sampler-memory=0.05",
    "--max-prompt-tokens=256",
]
COMPARED_FILES = ["step-00004/model.safetensors", "step-00004/optimizer.pt"]
CLOCK = ("seconds", "tokens_per_second")  # in the rows of metrics.jsonl


def run_as_child(out):
    """What the forked process does: it runs spiral.py and exits, whatever happens."""
    exit_code = 1
    try:
        # A lock of its own: a child that is killed would keep a shared one for ever.
        spiral.tqdm.set_lock(threading.RLock())
        sys.stdout = sys.stderr = open(f"{out}.log", "a")
        exit_code = spiral.main([*OPTIONS, f"--out={out}"])
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(exit_code)


def run_in_child(out, kill_after=None):
    """Runs spiral.py in a forked child, which spares the imports, and kills it after so many
    seconds. Returns whether it finished."""
    child = os.fork()
    if child == 0:
        run_as_child(out)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return status == 0


def metrics(run):
    """The rows of its metrics.jsonl without what a clock says."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: row[name] for name in row if name not in CLOCK} for row in rows]


def differences(run, undisturbed):
    """The files that aren't equal."""
    found = []
    for name in COMPARED_FILES:
        if (run / name).read_bytes() != (undisturbed / name).read_bytes():
            found.append(name)
    if metrics(run) != metrics(undisturbed):
        found.append("metrics.jsonl")
    return found


def kill_runs(num_kills):
    """Kills runs until there were so many kills. Returns the counts."""
    torch.set_num_threads(1)  # forked children may then compute
    rng = random.Random(0)
    kills = 0
    runs = 0
    same = 0
    with tempfile.TemporaryDirectory() as folder:
        undisturbed = Path(folder) / "undisturbed"
        began = time.time()
        if not run_in_child(undisturbed):
            raise RuntimeError(Path(f"{undisturbed}.log").read_text())
        seconds = time.time() - began

        while kills < num_kills:
            run = Path(folder) / str(runs)
            for _ in range(rng.randint(1, 5)):
                finished = run_in_child(run, kill_after=rng.random() * seconds)
                if not finished:
                    kills += 1
            if not run_in_child(run):
                raise RuntimeError(Path(f"{run}.log").read_text())
            runs += 1
            different = differences(run, undisturbed)
            if different:
                print(f"run {runs} differs in {', '.join(different)}:")
                print(Path(f"{run}.log").read_text())
            else:
                same += 1
            print(f"{kills} kills, {same} of {runs} runs as the undisturbed one")
    return {"kills": kills, "runs": runs, "same": same}


def main():
    counts = kill_runs(int(sys.argv[1]))
    (HERE / "results/robustness.json").write_text(json.dumps(counts) + "\n")


if __name__ == "__main__":
    main()
