"""Three harnesses that take too long for the unit tests.

    python experiments/robustness.py kill --kills 100     # SIGKILL a run at random moments, resume, compare every byte
    python experiments/robustness.py fuzz --count 100000  # hostile completions through each verifier: exceptions, slowest
    python experiments/robustness.py save                 # ten default steps: the share of the time that goes into the checkpoint

Each writes experiments/results/robustness_{kill,fuzz,save}.json. `kill` is imported by the tests for a short version. `fuzz` tries Math
without its library, whose worker has a time limit of its own (the tests try that).
"""

import argparse
import json
import os
import platform
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import spiral  # noqa: E402
import tasks  # noqa: E402

RUN = ["--task", "arithmetic:operations=1", "--steps", "4", "--problems", "2", "--max-draws", "1", "--num-traces", "4", "--set-size", "2",
       "--num-sets", "2", "--num-aggregations", "2", "--save-every", "1", "--eval-problems", "0", "--train-problems", "40",
       "--max-trace-tokens", "16", "--max-aggregation-tokens", "16", "--search-weight", "1"]
SPOTS = [(os, "fsync"), (os, "replace"), (spiral.safetensors.torch, "save_file"), (shutil, "rmtree"), (json, "dumps"), (spiral, "update")]


def run(out, die_in=None, die_after=None):
    """The run in a forked child (sparing the imports). It kills itself in the n-th call of one of SPOTS (die_in), or is
    killed after some seconds (die_after). Returns True when it came to its end."""
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        log = os.open(f"{out}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        if die_in:
            (module, name), left = die_in[0], [die_in[1]]
            real = getattr(module, name)

            def deadly(*args, **kwargs):
                left[0] -= 1
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*args, **kwargs)
            setattr(module, name, deadly)
        code = 1
        try:
            code = spiral.main([*RUN, "--out", str(out)])
        finally:
            os._exit(code)
    if die_after is not None:
        time.sleep(die_after)
        os.kill(pid, signal.SIGKILL)
    return os.waitpid(pid, 0)[1] == 0


def result(out):
    """The bytes that must not depend on kills: every metrics row and the final weights and optimizer state."""
    last = spiral.checkpoints(out)[0]
    return [(Path(out) / "metrics.jsonl").read_bytes(), (last / "model.safetensors").read_bytes(), (last / "optimizer.safetensors").read_bytes()]


def kill(kills, folder, seed=0, log=print):
    """Kill runs `kills` times in all; a run that has ended starts afresh. Returns (runs compared, runs identical, kills by kind)."""
    torch.set_num_threads(1)                     # before any parallel work, so that forked children may compute
    rng, folder, kinds = random.Random(seed), Path(folder), {}
    began = time.time()
    assert run(folder / "undisturbed"), (folder / "undisturbed.log").read_text()
    length, expected = time.time() - began, result(folder / "undisturbed")
    done = compared = identical = 0
    while done < kills or compared == 0:
        out = folder / f"run-{compared}"
        for _ in range(rng.randint(3, 8)):
            if done == kills:
                break
            spot = (rng.choice(SPOTS), rng.randint(1, 12)) if rng.random() < 0.5 else None
            ended = run(out, die_in=spot) if spot else run(out, die_after=rng.random() * length)
            if not ended:
                done += 1
                kind = f"in {spot[0][1]}" if spot else "any moment"
                kinds[kind] = kinds.get(kind, 0) + 1
        if not run(out):
            log(f"{out} could not be resumed: {Path(f'{out}.log').read_text()[-500:]}")
        compared += 1
        identical += result(out) == expected
        log(f"{done}/{kills} kills, {identical} of {compared} runs identical to the undisturbed one")
    return compared, identical, kinds


def hostile(rng):
    """One completion of at most 4 KB made to break parsers."""
    length = rng.choice((0, 3, 30, 300, 4000))
    kind = rng.randrange(8)
    if kind == 0:
        return "".join(chr(rng.choice((rng.randrange(128), rng.randrange(0x3000), rng.randrange(0x20000)))) for _ in range(length // 4)).encode("utf-8", "replace").decode()
    if kind == 1:
        return "Answer: " + "(" * length
    if kind == 2:
        return "Answer: " + "9" * length + "**" + "9" * (length // 2)
    if kind == 3:
        return "Answer:" * (length // 7) + "1/0"
    if kind == 4:
        return "Answer: " + "".join(rng.choice("0123456789+-*/()= ٣²") for _ in range(length))
    if kind == 5:
        return r"\boxed{" * (length // 14) + rng.choice(["9" * length, r"\frac" * (length // 5), "{" * length, "1" + ",000" * (length // 4)]) + "}" * (length // 2)
    if kind == 6:
        return r"\boxed{" + "".join(rng.choice([r"\frac", "{", "}", "1", "23", "^", "_", r"\text{", "$", " ", ".", ",", "-", "/", "%", "\\"]) for _ in range(length // 3)) + "}"
    return "".join(rng.choice(["Answer: ", "1", "23", "+", "*", "(", ")", "\n", "/", "-", " ", "=", "none", "**"]) for _ in range(length // 3))[:4000]


def fuzz(count, log=print):
    rows = {}
    tasks.worker = False                         # Math: as where its library is not installed
    for task in (tasks.Countdown(), tasks.Arithmetic(), tasks.Math()):
        problems = [{"problem": "?", "answer": answer} for answer in ("9", r"\frac{1}{2}", "x+1", "1,000")] if isinstance(task, tasks.Math) else task.problems("test", 50, 0)
        rng, slowest, exceptions, rewarded = random.Random(0), 0.0, 0, 0
        for _ in range(count):
            problem, text = rng.choice(problems), hostile(rng)
            began = time.perf_counter()
            try:
                rewarded += task.reward(problem, text)
            except Exception as error:
                exceptions += 1
                log(f"{type(error).__name__} on {text[:80]!r}")
            spent = time.perf_counter() - began
            if spent > 1e-3:                     # once more, to tell a slow verifier from a busy machine
                again = []
                for _ in range(3):
                    began = time.perf_counter()
                    task.reward(problem, text)
                    again.append(time.perf_counter() - began)
                spent = min(again)
            slowest = max(slowest, spent)
        rows[type(task).__name__] = {"completions": count, "exceptions": exceptions, "rewarded": rewarded, "slowest_ms": 1000 * slowest}
        log(f"{type(task).__name__}: {count} completions, {exceptions} exceptions, slowest {1000 * slowest:.3f} ms")
    return rows


def save_share(steps=10):
    """Seconds of `steps` default steps, which end in a checkpoint, and of those in save_checkpoint."""
    saves, real = [], spiral.save_checkpoint

    def timed(*args):
        began = time.perf_counter()
        real(*args)
        saves.append(time.perf_counter() - began)
    spiral.save_checkpoint = timed
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        assert spiral.main(["--steps", str(steps), "--eval-problems", "0", "--transcript-every", "0", "--out", folder]) == 0
        whole = time.perf_counter() - began
    return {"steps": steps, "seconds": whole, "saves": len(saves), "save_seconds": sum(saves), "share": sum(saves) / whole}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("kill", "fuzz", "save"))
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--count", type=int, default=100_000)
    args = parser.parse_args()
    machine = f"{platform.machine()}, {os.cpu_count()} CPUs, torch {torch.__version__}"
    if args.what == "fuzz":
        found = fuzz(args.count)
    elif args.what == "save":
        found = save_share()
    else:
        with tempfile.TemporaryDirectory() as folder:
            compared, identical, kinds = kill(args.kills, folder)
        found = {"kills": args.kills, "runs": compared, "runs_identical": identical, "kills_by_kind": kinds}
    (Path(__file__).parent / "results" / f"robustness_{args.what}.json").write_text(json.dumps({"machine": machine, **found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
