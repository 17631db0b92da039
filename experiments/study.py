"""The study: what credit should search get? Raw results only; plot.py makes the tables and figures.

    python experiments/study.py                              # the full plan, about 18 CPU hours
    python experiments/study.py main --seeds 2 --tokens 1000000 --generators 1        # less of it
    python experiments/study.py main --setting long --seeds 3 --rivals grpo,trace,pass,curve
    python experiments/study.py --quick                      # everything in miniature, 5 minutes

Rivals: the start policy, GRPO, and SPIRAL with each search credit, at an equal budget of sampled
tokens, each with what the same grid of learning rates and search weights chose for it.

tune     every rival over the grid, judged on validation problems
main     the rivals, trained and evaluated on test problems: counts per problem
depth    an aggregator that trains on sets of aggregations too, with the credit --best
lattice  training with lattices; and the policies of main evaluated with lattices of traces

A piece of work is a process: training until the budget, then an evaluation, then a row in
evaluation.jsonl. Seeds are outermost, so a study cut off at any moment (Ctrl-C, or `timeout`) holds
whole comparisons; the same command goes on, and more seeds or tokens build on what is there.
"""

import argparse
import fcntl
import itertools
import json
import os
import signal
import subprocess
import sys
import time
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
from plot import pass_curve, read  # noqa: E402

import spiral  # noqa: E402
import tasks  # noqa: E402

# How much room a trace has. short: one attempt, so that only a set searches; long: several
SETTINGS = {
    "short": ["--max-trace-tokens", "24", "--max-aggregation-tokens", "48"],
    "long": ["--max-trace-tokens", "80", "--max-aggregation-tokens", "96"],
    "hard": "--task countdown:numbers=4 --max-trace-tokens 40 --max-aggregation-tokens 80".split(),
}
RIVALS = {
    "grpo": ["--algo", "grpo"],
    "trace": ["--search-credit", "trace"],
    "set": ["--search-credit", "set"],
    "curve": ["--search-credit", "curve"],
    "pass": ["--search-credit", "pass"],
}
POPULATION = 8  # of recursion
FILES = ("evaluation.jsonl", "tuning.jsonl")
PARTS = ("tune", "main", "depth", "lattice")
FULL = {
    "seeds": 5,
    "tokens": 2_000_000,  # sampled in training, by each run
    "tune_tokens": 300_000,
    "lrs": "5e-5,1e-4",
    "weights": "0.05,0.2",  # of the search term
    "problems": 300,  # held out
    "traces": 64,  # of each, for pass@k
    "rsa_steps": 10,
    "generators": 2,  # times that recursion runs, from other traces
}
QUICK = {
    "seeds": 1,
    "tokens": 20_000,
    "tune_tokens": 10_000,
    "lrs": "1e-4",
    "weights": "0.2,1",
    "problems": 10,
    "traces": 16,
    "rsa_steps": 2,
    "generators": 2,
}


# ---- An ablation, as a patch of spiral.py in the process of its run ------------------------------


def second_level():
    """Sets of the first level's aggregations are aggregated too, for rewards of their own."""
    rollout, counts, transcript = spiral.rollout, spiral.response_counts, spiral.transcript

    def two_levels(policy, task, problems, config, generators, curve):
        records = rollout(policy, task, problems, config, generators, curve)
        many, groups, sets = config.num_aggregations, [], []
        for record, generator in zip(records, generators, strict=True):
            completions = [c for group in record.aggregations for c in group.completions]
            groups.append(spiral.Group([], completions))
            sizes = len(completions), config.set_size, config.num_sets
            sets.append(spiral.draw_sets(*sizes, generator))
        answers = spiral.aggregate(policy, task, problems, groups, sets, config, many, generators)
        rewards = torch.stack([*map(spiral.rewards_of, answers)])
        advantages = spiral.aggregation_advantages(rewards)
        spiral.assign_advantages(sum(answers, []), advantages, config.target_length)
        for record, more in zip(records, answers, strict=True):
            record.aggregations += more
        return records

    def first_level(record):
        return replace(record, aggregations=record.aggregations[: len(record.sets)])

    spiral.rollout = two_levels
    spiral.response_counts = lambda records, n: counts([*map(first_level, records)], n)
    spiral.transcript = lambda task, record: transcript(task, first_level(record))


# ---- A piece of work: a dict, done by a process of its own ---------------------------------------


def make_piece(args, part, run, seed, options=(), tokens=0, split="test", lattice=False, patch=""):
    """`folder` is named after the training alone: evaluations and larger budgets share it."""
    evaluation = {name: getattr(args, name) for name in ("problems", "rsa_steps")}
    few = part == "tune"  # scouts: pass@16, and one recursion
    evaluation["traces"] = min(16, args.traces) if few else args.traces
    evaluation["generators"] = 1 if few else args.generators
    options = [*SETTINGS[args.setting], *options]
    code = zlib.crc32(json.dumps([options, patch]).encode())
    folder = f"{args.setting}-{run.replace(' ', '-')}-{seed}-{code:08x}"
    run += " (lattice)" * lattice
    piece = {"part": part, "setting": args.setting, "run": run, "seed": seed, "tokens": tokens}
    piece |= {"options": options, "patch": patch, "split": split, "lattice": lattice}
    name = json.dumps([folder, tokens, split, lattice, evaluation])
    file = FILES[part == "tune"]
    return piece | {"folder": folder, "evaluation": evaluation, "id": name, "file": file}


def append(path, row):
    """One write, so that processes can share the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab", buffering=0) as file:
        file.write((json.dumps(row, separators=(",", ":")) + "\n").encode())


def sampled_tokens(rows):
    """Of both roles; those of GRPO, which has one, stand twice in its rows."""
    roles = [[row["search"], row["aggregation"]] for row in rows]
    return sum(a["tokens"] + (a != b) * b["tokens"] for a, b in roles)


def train_piece(piece, folder):
    """spiral.main, with a SIGTERM to itself in the step that spends the budget, which is saved."""
    plain = spiral.train_step

    def train_step(*arguments):
        stats, *more = plain(*arguments)
        if sampled_tokens([*read(folder / "metrics.jsonl"), stats]) >= piece["tokens"]:
            os.kill(os.getpid(), signal.SIGTERM)
        return stats, *more

    spiral.train_step = train_step
    arguments = ["--seed", str(piece["seed"]), "--out", str(folder), "--steps", "1000000"]
    arguments += ["--eval-problems", "0"]
    code = spiral.main([*arguments, *piece["options"]])
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # ends the evaluation at once
    return code


def checkpoint_of(piece, folder):
    """What to evaluate: the start policy, the training at its budget, or None before that."""
    if not piece["tokens"]:
        return spiral.TINY
    rows = read(folder / "metrics.jsonl")
    whole = folder / f"step-{len(rows):05d}" / "state.json"
    assert sampled_tokens(rows[:-1]) < piece["tokens"], f"{folder} has trained for longer"
    return whole.parent if whole.exists() and sampled_tokens(rows) >= piece["tokens"] else None


def evaluate_piece(piece, checkpoint):
    """Right answers per problem: of the traces, of each population of recursion, and of its vote.

    Lattices: every (S/k)-th trace of a lattice of S, in the order of the codes (which is that of
    the token ids), is a lattice of k. So one lattice holds all smaller ones that divide it.
    """
    sizes, began = piece["evaluation"], time.process_time()
    count = sizes["traces"]
    config = spiral.parse_config([*piece["options"], "--model", str(checkpoint)])
    policy, task = spiral.load_policy(config), tasks.make_task(config.task)
    problems = task.problems(piece["split"], sizes["problems"], 0)
    generator = torch.Generator().manual_seed(1)
    lattice = count if piece["lattice"] else 1
    traces = spiral.search(policy, task, problems, config, count, generator, lattice)
    for group in traces if piece["lattice"] else []:
        group.completions.sort(key=lambda c: c.tokens)
    rewards = spiral.rewards_of(traces)  # [P, S]
    hits = {}  # of the S/k subsets of k traces, those with a right one
    for k in (2**i for i in range(count.bit_length())):
        subsets = rewards.view(len(problems), k, count // k)
        hits[k] = subsets.amax(1).sum(1).int().tolist()
    rsa, votes, stride = [], [], count // POPULATION
    for number in range(sizes["generators"]):
        first = number * stride // sizes["generators"]
        start = [spiral.Group([], group.completions[first::stride]) for group in traces]
        how = config, start, sizes["rsa_steps"], torch.Generator().manual_seed(2 + number)
        history = spiral.recursive_self_aggregation(policy, task, problems, *how)
        rsa.append([spiral.rewards_of(step).sum(1).int().tolist() for step in history])
        votes.append([])
        for step in history:
            right = [spiral.vote_reward(task, group.completions) for group in step]
            votes[-1].append([int(reward) for reward in right])
    completions = [c for group in traces for c in group.completions]
    tokens = sum(len(c.tokens) for c in completions)
    return piece | {
        "right": rewards.sum(1).int().tolist(),
        "hits": hits,
        "rsa": rsa,  # [generators][steps + 1][P], of `population`
        "votes": votes,  # the same, 0 or 1
        "population": POPULATION,
        "trace_length": tokens / len(completions),
        "trace_entropy": -sum(sum(c.logprobs) for c in completions) / tokens,
        "cpu_s": round(time.process_time() - began, 1),
    }


def work(piece, runs, results):
    """Does what the piece lacks. Returns the exit code."""
    torch.set_num_threads(1)
    folder = runs / piece["folder"]
    wait = (folder / "piece.lock").open("w")
    fcntl.flock(wait, fcntl.LOCK_EX)  # another piece may need the same training
    if piece["patch"]:
        globals()[piece["patch"]]()
    if checkpoint_of(piece, folder) is None:
        began = time.process_time()
        code = train_piece(piece, folder)
        if checkpoint_of(piece, folder) is None:
            return code or 1
        piece["train_cpu_s"] = round(time.process_time() - began, 1)

        kept = results / piece["folder"] / "metrics.jsonl"
        kept.unlink(missing_ok=True)  # of a smaller budget
        for row in read(folder / "metrics.jsonl"):
            append(kept, row)
    append(results / piece["file"], evaluate_piece(piece, checkpoint_of(piece, folder)))
    return 0


# ---- The pieces of each part, and the processes that do them -------------------------------------


def grid(args, run):
    """Options to choose from: learning rates, and search weights where there are two roles."""
    weights = ["1"] if run == "grpo" else args.weights.split(",")
    pairs = itertools.product(args.lrs.split(","), weights)
    return [["--lr", lr, "--search-weight", weight, *RIVALS[run]] for lr, weight in pairs]


def score(row):
    """What tuning goes by: the mean of pass@16 and of the last step of recursion."""
    recursion = np.mean(row["rsa"], (0, 2))[-1] / row["population"]
    return (pass_curve(row)[:, 4].mean() + recursion) / 2


def tuned(args, run, results):
    """The rival's best options of the part tune, if the grid leaves a choice; untried settings
    take those of short."""
    rows = [row for row in read(results / "tuning.jsonl") if row["run"].split()[0] == run]
    rows = [row for row in rows if row["setting"] == args.setting] or rows
    choices = grid(args, run)
    if not rows or len(choices) == 1:
        return choices[0]
    best = max(rows, key=score)
    return best["options"][len(SETTINGS[best["setting"]]) :]


def pieces_of(args, part, results):
    runs = args.rivals.split(",")
    if part == "tune":
        for run in runs:
            for options in grid(args, run):
                name = f"{run} {' '.join(options[1:4:2])}"
                yield make_piece(args, part, name, 100, options, args.tune_tokens, "validation")
        return
    best = tuned(args, args.best, results)
    if part == "depth":
        options = [*best, "--num-aggregations", "2"]
        for seed in range(args.seeds):
            yield make_piece(
                args, part, "depth 2", seed, options, args.tokens, patch="second_level"
            )
        return
    lattice = part == "lattice"
    yield make_piece(args, part, "base", 0, lattice=lattice)
    for seed in range(args.seeds):
        for run in runs:
            options = tuned(args, run, results)
            yield make_piece(args, part, run, seed, options, args.tokens, lattice=lattice)
        if lattice:
            options = [*best, "--lattice"]
            for each in (False, True):
                name = f"{args.best} trained with lattices"
                yield make_piece(args, part, name, seed, options, args.tokens, lattice=each)


def run_pieces(pieces, args, runs, results):
    """At most args.jobs processes at a time, in order. Their output goes to log.txt."""
    done = {row["id"] for name in FILES for row in read(results / name)}
    waiting = [piece for piece in pieces if piece["id"] not in done]
    print(f"{len(pieces)} pieces, {len(pieces) - len(waiting)} done before")
    running = []
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    try:
        while waiting or running:
            while waiting and len(running) < args.jobs:
                piece = waiting.pop(0)
                (runs / piece["folder"]).mkdir(parents=True, exist_ok=True)
                log = (runs / piece["folder"] / "log.txt").open("a")
                words = [sys.executable, __file__, "--piece", json.dumps(piece)]
                words += ["--quick"] if args.quick else []
                process = subprocess.Popen(words, stdout=log, stderr=log, env=environment)
                running.append((process, piece, time.time()))
            time.sleep(0.5)
            for entry in [entry for entry in running if entry[0].poll() is not None]:
                running.remove(entry)
                process, piece, began = entry
                state = "done" if process.returncode == 0 else "FAILED, see its log.txt:"
                seconds = time.time() - began
                print(f"{state} {piece['part']} {piece['folder']}  {seconds:.0f}s", flush=True)
    finally:
        for process, _, _ in running:
            process.terminate()  # training ends its step and saves
        for process, _, _ in running:
            process.wait()


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--setting", default="short", choices=SETTINGS)
    parser.add_argument("--rivals", default=",".join(RIVALS))
    parser.add_argument("--best", default="curve", help="credit of the parts depth and lattice")
    parser.add_argument("--jobs", type=int, default=2, help="single-threaded processes at a time")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--piece", help=argparse.SUPPRESS)
    sizes = QUICK if "--quick" in sys.argv else FULL
    for name, value in sizes.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    args = parser.parse_args()
    name = "study-quick" if args.quick else "study"
    runs = HERE.parent / "runs" / name
    results = runs / "results" if args.quick else HERE / "results" / name
    if args.piece:
        return work(json.loads(args.piece), runs, results)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    assert {*args.parts} <= {*PARTS}, args.parts
    for part in args.parts or PARTS:
        run_pieces([*pieces_of(args, part, results)], args, runs, results)


if __name__ == "__main__":
    sys.exit(main())
