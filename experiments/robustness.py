"""Kills runs at random moments (SIGKILL), and resumes them: results/robustness.json.

    python experiments/robustness.py 100     # so many kills

Each run ends with the bytes of an undisturbed one: metrics, weights and optimizer.
"""

import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import spiral  # noqa: E402

RUN = """--task=arithmetic:operations=1 --steps=4 --problems=2 --max_draws=1 --num_traces=4
    --set_size=2 --num_sets=2 --num_aggregations=2 --save_every=1 --eval_problems=0
    --train_problems=40 --max_trace_tokens=16 --max_aggregation_tokens=16 --rows=16
    --max_prompt_tokens=256""".split()
FILES = ["metrics.jsonl", "step-00004/model.safetensors", "step-00004/optimizer.pt"]


def run(out, seconds=None):
    """A run in a forked child, which spares the imports; killed after `seconds`."""
    child = os.fork()
    if not child:  # with a lock of its own: one that is killed would keep a shared one for ever
        spiral.tqdm.set_lock(threading.RLock())
        sys.stdout = sys.stderr = open(f"{out}.log", "a")
        os._exit(spiral.main([*RUN, f"--out={out}"]))
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    return not os.waitpid(child, 0)[1]


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
            print(f"{kills} kills, {same} of {runs} runs as the undisturbed one")
    return {"kills": kills, "runs": runs, "same": same}


def main():
    text = json.dumps(kill(int(sys.argv[1])))
    (HERE / "results/robustness.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
