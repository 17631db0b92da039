"""The study: what should a search trace earn? This trains and evaluates; plot.py shows the results.

    python experiments/study.py                              # the full plan, about 18 CPU hours
    python experiments/study.py main --seeds 2 --tokens 1000000 --generators 1        # less of it
    python experiments/study.py main --setting long --seeds 3 --rivals grpo,none,set
    python experiments/study.py --quick                      # everything in miniature, 5 minutes

Compared are the untrained policy (base), GRPO, and SPIRAL with each search credit and with none, at
an equal budget of sampled tokens, each with the options that the same tuning chose for it.

tune     every rival with every learning rate and search weight, judged on validation problems
main     the rivals, trained and evaluated on test problems
depth    an aggregator that trains on sets of aggregations too, with the credit --best
lattice  the policies of main, evaluated with lattices of traces

A piece of work is a process: it trains until the budget is spent, evaluates, and appends a row to
evaluation.jsonl.gz (rows.py says what it holds). Seeds are the outermost loop, so a study that is
cut off at any moment (Ctrl-C, or `timeout`) holds whole comparisons. The same command goes on, and
more seeds or tokens build on what is there.
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

import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
import rows as raw  # noqa: E402
import tables  # noqa: E402

import spiral  # noqa: E402
import tasks  # noqa: E402

# How much room a trace has. short: one attempt, so that only a set searches; long: several.
SETTINGS = {
    "short": ["--max-trace-tokens", "24", "--max-aggregation-tokens", "48"],
    "long": ["--max-trace-tokens", "80", "--max-aggregation-tokens", "96"],
    "hard": [
        *("--task", "countdown:numbers=4"),
        *("--max-trace-tokens", "40", "--max-aggregation-tokens", "80"),
    ],
}
RIVALS = {
    "grpo": ["--algo", "grpo"],
    "none": ["--search-credit", "set"],  # its search weight is 0
    "trace": ["--search-credit", "trace"],
    "set": ["--search-credit", "set"],
    "curve": ["--search-credit", "curve"],
    "pass": ["--search-credit", "pass"],
}
# Rivals without a search weight to choose: GRPO has one role, and "none" is the weight 0.
FIXED_WEIGHTS = {"grpo": "1", "none": "0"}
POPULATION = 8  # of repeated aggregation
EVALUATION_FILE = "evaluation.jsonl.gz"
TRAINING_FILE = "training.jsonl.gz"
TUNING_FILE = "tuning.jsonl.gz"
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
    "generators": 2,  # times that repeated aggregation runs, from other traces
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
    plain_rollout = spiral.rollout
    plain_counts = spiral.response_counts
    plain_transcript = spiral.transcript

    def rollout_of_two_levels(policy, task, problems, config, generators, curve):
        records = plain_rollout(policy, task, problems, config, generators, curve)
        groups = []
        sets = []
        for record, generator in zip(records, generators, strict=True):
            answers = [answer for group in record.aggregations for answer in group.completions]
            groups.append(spiral.Group(prompt=[], completions=answers))
            sets.append(spiral.draw_sets(len(answers), config.set_size, config.num_sets, generator))
        new_answers = spiral.aggregate(
            policy, task, problems, groups, sets, config, config.num_aggregations, generators
        )
        rewards = torch.stack([spiral.rewards_of(answers) for answers in new_answers])
        advantages = spiral.aggregation_advantages(rewards)
        all_groups = [group for groups in new_answers for group in groups]
        spiral.assign_advantages(all_groups, advantages, config.target_length)
        for record, answers in zip(records, new_answers, strict=True):
            record.aggregations += answers
        return records

    def first_level(record):
        return replace(record, aggregations=record.aggregations[: len(record.sets)])

    def counts_of_first_level(records, set_size):
        return plain_counts([first_level(record) for record in records], set_size)

    def transcript_of_first_level(task, record):
        return plain_transcript(task, first_level(record))

    spiral.rollout = rollout_of_two_levels
    spiral.response_counts = counts_of_first_level
    spiral.transcript = transcript_of_first_level


# ---- A piece of work: a dict that is handed to a process of its own ------------------------------


def make_piece(args, part, run, seed, options=(), tokens=0, lattice=False, patch=""):
    """`folder` is named after the training alone: evaluations and larger budgets share it."""
    options = [*SETTINGS[args.setting], *options]
    checksum = zlib.crc32(json.dumps([options, patch]).encode())
    folder = f"{args.setting}-{run.replace(' ', '-')}-{seed}-{checksum:08x}"
    split = "validation" if part == "tune" else "test"
    evaluation = {
        "problems": args.problems,
        "rsa_steps": args.rsa_steps,
        "traces": args.traces,
        "generators": args.generators,
    }
    if part == "tune":  # pass@16 and one repeated aggregation will do
        evaluation["traces"] = min(16, args.traces)
        evaluation["generators"] = 1
    return {
        "part": part,
        "setting": args.setting,
        "run": f"{run} (lattice)" if lattice else run,
        "seed": seed,
        "tokens": tokens,
        "options": options,
        "patch": patch,
        "split": split,
        "lattice": lattice,
        "folder": folder,
        "evaluation": evaluation,
        "id": json.dumps([folder, tokens, split, lattice, evaluation]),
        "file": TUNING_FILE if part == "tune" else EVALUATION_FILE,
    }


def sampled_tokens(steps):
    """Of both roles. GRPO has one role, which stands twice in its rows."""
    total = 0
    for step in steps:
        total += step["search"]["tokens"]
        if step["aggregation"] != step["search"]:
            total += step["aggregation"]["tokens"]
    return total


def train_piece(piece, folder):
    """Runs spiral.main, with a SIGTERM in the step that spends the budget, so that it saves."""
    plain_step = spiral.train_step

    def step_within_budget(*arguments):
        stats, *more = plain_step(*arguments)
        steps = raw.read_rows(folder / "metrics.jsonl")
        if sampled_tokens([*steps, stats]) >= piece["tokens"]:
            os.kill(os.getpid(), signal.SIGTERM)
        return stats, *more

    spiral.train_step = step_within_budget
    exit_code = spiral.main(
        [
            *("--seed", str(piece["seed"])),
            *("--out", str(folder)),
            *("--steps", "1000000"),
            *("--eval-problems", "0"),
            *piece["options"],
        ]
    )
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # from now on a SIGTERM ends the process at once
    return exit_code


def find_checkpoint(piece, folder):
    """What to evaluate: the untrained policy, the one at its budget, or None before that."""
    if piece["tokens"] == 0:
        return spiral.TINY
    steps = raw.read_rows(folder / "metrics.jsonl")
    if sampled_tokens(steps[:-1]) >= piece["tokens"]:
        raise ValueError(f"{folder} has trained for longer than {piece['tokens']} tokens")
    checkpoint = folder / f"step-{len(steps):05d}"
    spent = sampled_tokens(steps) >= piece["tokens"]
    return checkpoint if spent and (checkpoint / "state.json").exists() else None


def subsets_with_a_right_trace(rewards):
    """{k: for each problem, how many of its S/k disjoint subsets of k traces hold a right one}.

    Rewards [P, S], for k = 1, 2, 4 .. S. Every (S/k)-th trace of a lattice of S, in the order of
    its codes, is a lattice of k: so one lattice holds all smaller ones that divide it.
    """
    num_problems, num_traces = rewards.shape
    hits = {}
    for k in (2**i for i in range(num_traces.bit_length())):
        subsets = rewards.view(num_problems, k, num_traces // k)
        hits[k] = subsets.amax(1).sum(1).int().tolist()
    return hits


def aggregate_repeatedly(policy, task, problems, config, traces, number, of, steps):
    """Right members of each problem's population after each step, and whether its vote is right:
    two lists [steps + 1][P]. The population begins as every (S / 8)-th trace."""
    stride = len(traces[0].completions) // POPULATION
    first = number * stride // of
    populations = []
    for group in traces:
        chosen = group.completions[first::stride]
        populations.append(spiral.Group(prompt=[], completions=chosen))
    generator = torch.Generator().manual_seed(2 + number)
    history = spiral.recursive_self_aggregation(
        policy, task, problems, config, populations, steps, generator
    )
    right = []
    votes = []
    for step in history:
        right.append(spiral.rewards_of(step).sum(1).int().tolist())
        votes.append([int(spiral.vote_reward(task, group.completions)) for group in step])
    return right, votes


def evaluate_piece(piece, checkpoint):
    """The piece with its results for each problem (rows.py says what they are)."""
    began = time.process_time()
    sizes = piece["evaluation"]
    num_traces = sizes["traces"]
    config = spiral.parse_config([*piece["options"], "--model", str(checkpoint)])
    policy = spiral.load_policy(config)
    task = tasks.make_task(config.task)
    problems = task.problems(piece["split"], sizes["problems"], 0)
    generator = torch.Generator().manual_seed(1)
    lattice_size = num_traces if piece["lattice"] else 1
    traces = spiral.search(policy, task, problems, config, num_traces, generator, lattice_size)
    if piece["lattice"]:
        for group in traces:  # into the order of the codes, which is that of the token ids
            group.completions.sort(key=lambda completion: completion.tokens)

    rewards = spiral.rewards_of(traces)  # [P, S]
    all_right = []
    all_votes = []
    for number in range(sizes["generators"]):
        right, votes = aggregate_repeatedly(
            policy,
            task,
            problems,
            config,
            traces,
            number=number,
            of=sizes["generators"],
            steps=sizes["rsa_steps"],
        )
        all_right.append(right)
        all_votes.append(votes)

    completions = [completion for group in traces for completion in group.completions]
    num_tokens = sum(len(completion.tokens) for completion in completions)
    logprob = sum(sum(completion.logprobs) for completion in completions)
    return {
        **piece,
        "right": rewards.sum(1).int().tolist(),
        "hits": subsets_with_a_right_trace(rewards),
        "rsa": all_right,
        "votes": all_votes,
        "population": POPULATION,
        "trace_length": num_tokens / len(completions),
        "trace_entropy": -logprob / num_tokens,
        "cpu_s": round(time.process_time() - began, 1),
    }


def do_piece(piece, runs, results):
    """Trains if the piece needs it, evaluates, and appends the rows. Returns the exit code."""
    torch.set_num_threads(1)
    folder = runs / piece["folder"]
    lock = (folder / "piece.lock").open("w")
    fcntl.flock(lock, fcntl.LOCK_EX)  # another piece may need the same training
    if piece["patch"] == "second_level":
        second_level()

    checkpoint = find_checkpoint(piece, folder)
    if checkpoint is None:
        began = time.process_time()
        exit_code = train_piece(piece, folder)
        checkpoint = find_checkpoint(piece, folder)
        if checkpoint is None:
            return exit_code or 1
        piece["train_cpu_s"] = round(time.process_time() - began, 1)
        training = {
            "folder": piece["folder"],
            "tokens": piece["tokens"],
            "steps": raw.read_rows(folder / "metrics.jsonl"),
        }
        raw.append_row(results / TRAINING_FILE, training)

    raw.append_row(results / piece["file"], evaluate_piece(piece, checkpoint))
    return 0


# ---- The pieces of each part, and the processes that do them -------------------------------------


def choices(args, run):
    """The options that tuning tries: learning rates, and search weights where there are any."""
    weights = args.weights.split(",")
    if run in FIXED_WEIGHTS:
        weights = [FIXED_WEIGHTS[run]]
    pairs = itertools.product(args.lrs.split(","), weights)
    return [["--lr", rate, "--search-weight", weight, *RIVALS[run]] for rate, weight in pairs]


def tuned_options(args, run, results):
    """The rival's best options by the part tune. Where there is one choice, tuning isn't asked.

    A setting that wasn't tuned takes the options of the setting that was.
    """
    available = choices(args, run)
    scouts = [row for row in raw.read_rows(results / TUNING_FILE) if row["run"].split()[0] == run]
    if not scouts or len(available) == 1:
        return available[0]
    of_setting = [row for row in scouts if row["setting"] == args.setting]
    best = max(of_setting or scouts, key=tables.tuning_score)
    return best["options"][len(SETTINGS[best["setting"]]) :]


def pieces_of_tuning(args):
    for run in args.rivals.split(","):
        for options in choices(args, run):
            _, rate, _, weight, *_ = options
            yield make_piece(
                args,
                part="tune",
                run=f"{run} {rate} {weight}",
                seed=100,
                options=options,
                tokens=args.tune_tokens,
            )


def pieces_of_depth(args, results):
    best = tuned_options(args, args.best, results)
    for seed in range(args.seeds):
        yield make_piece(
            args,
            part="depth",
            run="depth 2",
            seed=seed,
            options=[*best, "--num-aggregations", "2"],
            tokens=args.tokens,
            patch="second_level",
        )


def pieces_of_main(args, results, lattice=False):
    part = "lattice" if lattice else "main"
    yield make_piece(args, part=part, run="base", seed=0, lattice=lattice)
    for seed in range(args.seeds):
        for run in args.rivals.split(","):
            yield make_piece(
                args,
                part=part,
                run=run,
                seed=seed,
                options=tuned_options(args, run, results),
                tokens=args.tokens,
                lattice=lattice,
            )


def pieces_of(args, part, results):
    if part == "tune":
        return [*pieces_of_tuning(args)]
    if part == "depth":
        return [*pieces_of_depth(args, results)]
    return [*pieces_of_main(args, results, lattice=part == "lattice")]


def start_process(piece, args, runs):
    """A single-threaded process that does the piece. Its output goes to log.txt."""
    folder = runs / piece["folder"]
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, __file__, "--piece", json.dumps(piece)]
    if args.quick:
        command.append("--quick")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with (folder / "log.txt").open("a") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, env=environment)


def run_pieces(pieces, args, runs, results):
    """Does the pieces that have no row yet, in order, at most args.jobs at a time."""
    done = set()
    for file in (EVALUATION_FILE, TUNING_FILE):
        done |= {row["id"] for row in raw.read_rows(results / file)}
    waiting = [piece for piece in pieces if piece["id"] not in done]
    print(f"{len(pieces)} pieces, {len(pieces) - len(waiting)} done before")
    running = []  # of (process, piece, when it began)
    try:
        while waiting or running:
            while waiting and len(running) < args.jobs:
                piece = waiting.pop(0)
                running.append((start_process(piece, args, runs), piece, time.time()))
            time.sleep(0.5)
            for entry in list(running):
                process, piece, began = entry
                if process.poll() is None:
                    continue
                running.remove(entry)
                state = "done" if process.returncode == 0 else "FAILED, see its log.txt:"
                seconds = time.time() - began
                print(f"{state} {piece['part']} {piece['folder']}  {seconds:.0f}s", flush=True)
    finally:
        for process, _, _ in running:
            process.terminate()  # training ends its step and saves
        for process, _, _ in running:
            process.wait()


def parse_arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--setting", default="short", choices=SETTINGS)
    parser.add_argument("--rivals", default=",".join(RIVALS))
    parser.add_argument("--best", default="curve", help="credit of the part depth")
    parser.add_argument("--jobs", type=int, default=2, help="single-threaded processes at a time")
    parser.add_argument("--quick", action="store_true", help="everything in miniature")
    parser.add_argument("--piece", help=argparse.SUPPRESS)
    sizes = QUICK if "--quick" in sys.argv else FULL
    for name, value in sizes.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    args = parser.parse_args()
    unknown = set(args.parts) - set(PARTS)
    if unknown:
        parser.error(f"no part {', '.join(unknown)}: there are {', '.join(PARTS)}")
    return args


def main():
    args = parse_arguments()
    if args.quick:
        runs = HERE.parent / "runs" / "study-quick"
        results = runs / "results"
    else:
        runs = HERE.parent / "runs" / "study"
        results = raw.STUDY
    if args.piece:
        return do_piece(json.loads(args.piece), runs, results)

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    try:
        for part in args.parts or PARTS:
            run_pieces(pieces_of(args, part, results), args, runs, results)
    except KeyboardInterrupt:
        print("interrupted: the same command goes on")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
