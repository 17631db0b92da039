"""The study: what should a search trace earn? This trains and evaluates; plot.py shows the results.

    python experiments/study.py main                         # every rival, 5 seeds
    python experiments/study.py main --seeds 2 --tokens 1000000 --rivals grpo,none,set
    python experiments/study.py main --rivals none,set=0.05 --tokens 10000000 --every 2000000
    python experiments/study.py --quick                      # everything in miniature, minutes

Compared are the untrained policy (base), GRPO, and SPIRAL with each search credit and with none, at
an equal budget of sampled tokens. STUDY.md says what is planned, with the exact commands.

tune   every rival with every learning rate and search weight, judged on validation problems
main   the rivals, trained and evaluated on test problems. set=0.05 is set credit at this weight;
       where no weight is named, tuning chooses, or the only one of --weights is taken

A piece of work is a process: it trains until a budget is spent, evaluates, appends a row to
evaluation.jsonl.gz, and goes on to the next budget. Seeds are the outermost loop, so a study that
is cut off at any moment (Ctrl-C, or `timeout`) holds whole comparisons. The same command goes on,
and more seeds or tokens build on what is there. Rows and runs of another raw.VERSION don't count.

rows.py says what the rows of every version hold. These hold more, for each of P problems, where an
answer is a small number of the problem's own, and -1 is no answer:

    right_answers   which answers are right
    traces          the answers of the traces, [P][traces]; trace_tokens: their tokens, [P]
    pipelines       {population: {"answers": [steps + 1][P][population], "tokens": [steps + 1][P]}}:
                    recursive self-aggregation, from other traces
    response        how many first aggregations were right, and all, by how many candidates were
"""

import argparse
import fcntl
import itertools
import json
import os
import shlex
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
from experiments import credits  # noqa: E402

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
POPULATION = 8  # of the pipeline that the tables show
EVALUATION_FILE = "evaluation.jsonl.gz"
TRAINING_FILE = "training.jsonl.gz"
TUNING_FILE = "tuning.jsonl.gz"
PARTS = ("tune", "main")
FULL = {
    "seeds": 5,
    "tokens": 2_000_000,  # sampled in training, by each run
    "tune_tokens": 300_000,
    "lrs": "5e-5,1e-4",
    "weights": "0.05,0.2",  # of the search term
    "problems": 300,  # held out
    "skip": 300,  # the first ones of the test split, which the rows of version 1 have used
    "traces": 64,  # of each, for pass@k
    "populations": "4:3,8:10,16:3",  # of self-aggregation, each with its steps
}
QUICK = {
    "seeds": 1,
    "tokens": 20_000,
    "tune_tokens": 10_000,
    "lrs": "1e-4",
    "weights": "0.2,1",
    "problems": 6,
    "skip": 4,
    "traces": 64,
    "populations": "4:1,8:2",
}


# ---- A piece of work: a dict that is handed to a process of its own ------------------------------


def make_piece(args, part, run, seed, options=(), budgets=(0,), splits=("test",)):
    """`folder` is named after the training alone: evaluations and larger budgets share it."""
    options = [*SETTINGS[args.setting], *options]
    checksum = zlib.crc32(json.dumps([raw.VERSION, options]).encode())
    evaluation = {
        "problems": args.problems,
        "skip": args.skip,
        "traces": args.traces,
        "populations": args.populations,
    }
    if part == "tune":
        evaluation["traces"] = 16
    return {
        "version": raw.VERSION,
        "part": part,
        "setting": args.setting,
        "run": run,
        "seed": seed,
        "options": options,
        "budgets": list(budgets),
        "splits": list(splits),
        "folder": f"{args.setting}-{run.replace(' ', '-')}-{seed}-{checksum:08x}",
        "evaluation": evaluation,
    }


def rows_of_piece(piece):
    """The beginnings of its rows: one for each budget and split. On validation problems, which only
    decide between rivals, two steps of one population will do."""
    shared = dict(piece)
    budgets = shared.pop("budgets")
    splits = shared.pop("splits")
    for tokens, split in itertools.product(budgets, splits):
        evaluation = dict(piece["evaluation"])
        if split == "validation":
            evaluation["populations"] = f"{POPULATION}:2"
        name = json.dumps([piece["folder"], piece["seed"], tokens, split, evaluation])
        row = {"tokens": tokens, "split": split, "evaluation": evaluation}
        yield shared | row | {"lattice": False, "id": name}


def rows_done(results):
    """The ids of all rows there are."""
    done = set()
    for file in (EVALUATION_FILE, TUNING_FILE):
        done |= {row["id"] for row in raw.read_rows(results / file)}
    return done


# ---- Training ------------------------------------------------------------------------------------


def sampled_tokens(steps):
    """Of both roles. GRPO has one role, which stands twice in its rows."""
    total = 0
    for step in steps:
        total += step["search"]["tokens"]
        if step["aggregation"] != step["search"]:
            total += step["aggregation"]["tokens"]
    return total


def train(piece, tokens, folder):
    """Runs spiral.main, with a SIGTERM in the step that spends the budget, so that it saves."""
    plain_step = spiral.train_step

    def step_within_budget(*arguments):
        stats, groups = plain_step(*arguments)
        steps = raw.read_rows(folder / "metrics.jsonl")
        if sampled_tokens([*steps, stats]) >= tokens:
            os.kill(os.getpid(), signal.SIGTERM)
        return stats, groups

    spiral.train_step = step_within_budget
    options = ["--seed", str(piece["seed"]), "--out", str(folder)]
    options += ["--steps", "1000000", "--eval-problems", "0"]
    exit_code = spiral.main([*options, *piece["options"]])
    spiral.train_step = plain_step
    return exit_code


def find_checkpoint(tokens, folder):
    """What to evaluate: the untrained policy, the one at its budget, or None before that."""
    if tokens == 0:
        return spiral.TINY
    steps = raw.read_rows(folder / "metrics.jsonl")
    if sampled_tokens(steps[:-1]) >= tokens:
        raise ValueError(f"{folder} has trained for longer than {tokens} tokens")
    checkpoint = folder / f"step-{len(steps):05d}"
    spent = sampled_tokens(steps) >= tokens
    return checkpoint if spent and (checkpoint / "state.json").exists() else None


# ---- Evaluation ----------------------------------------------------------------------------------


class Answers:
    """Gives each answer to a problem a small number."""

    def __init__(self, num_problems):
        self.numbers = [{} for _ in range(num_problems)]  # of each problem: {answer: number}
        self.right = [[] for _ in range(num_problems)]  # numbers of the right ones

    def number(self, problem, answer, reward):
        if answer is None:
            return -1
        numbers = self.numbers[problem]
        if answer not in numbers:
            numbers[answer] = len(numbers)
            if reward:
                self.right[problem].append(numbers[answer])
        return numbers[answer]

    def of_groups(self, task, groups):
        """[P][completions] numbers."""
        found = []
        for problem, group in enumerate(groups):
            completions = group.completions
            numbers = [self.number(problem, task.answer(c.text), c.reward) for c in completions]
            found.append(numbers)
        return found


def tokens_of(groups):
    return [spiral.statistics([group])["tokens"] for group in groups]


def evaluation_seeds(row, part, num_problems):
    """One for each problem: all runs of a seed share them."""
    first = (1 + part) * 10**9 + row["seed"] * 10**6
    return range(first, first + num_problems)


def run_pipelines(policy, task, problems, config, row, answers):
    """Self-aggregation of every population: what a row holds of it."""
    results = {"pipelines": {}, "population": POPULATION}
    for part, pair in enumerate(row["evaluation"]["populations"].split(","), start=1):
        population, steps = map(int, pair.split(":"))
        config = replace(config, eval_traces=population, rsa_steps=steps)
        seeds = evaluation_seeds(row, part, len(problems))
        history = spiral.recursive_self_aggregation(policy, task, problems, config, seeds)
        results["pipelines"][population] = {
            "answers": [answers.of_groups(task, groups) for groups in history],
            "tokens": [tokens_of(groups) for groups in history],
        }
        if population == POPULATION:
            votes = []
            right = []
            for groups in history:
                votes.append([int(spiral.vote_reward(task, group)) for group in groups])
                right.append(spiral.rewards_of(groups).sum(1).int().tolist())
            results["votes"] = [votes]
            results["rsa"] = [right]
            counts = [credits.response_counts(group, config.set_size) for group in history[0]]
            results["response"] = sum(counts).int().tolist()
    return results


def evaluate(row, checkpoint):
    """The row, completed."""
    began = time.process_time()
    sizes = row["evaluation"]
    config = spiral.parse_config([*row["options"], "--model", str(checkpoint)])
    policy = spiral.load_policy(config)
    task = tasks.make_task(config.task)
    problems = task.problems(row["split"], sizes["skip"] + sizes["problems"], 0)[sizes["skip"] :]
    seeds = evaluation_seeds(row, 0, len(problems))
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    traces = spiral.search(policy, task, problems, config, sizes["traces"], generators)
    stats = spiral.statistics(traces)
    answers = Answers(len(problems))
    results = {
        "right": spiral.rewards_of(traces).sum(1).int().tolist(),
        "traces": answers.of_groups(task, traces),
        "trace_tokens": tokens_of(traces),
        "trace_length": stats["length"],
        "trace_entropy": stats["entropy"],
        **run_pipelines(policy, task, problems, config, row, answers),
        "right_answers": answers.right,
        "cpu_s": round(time.process_time() - began, 1),
    }
    return row | results


def commit():
    """Which state of the repository makes the rows."""
    command = ["git", "describe", "--always", "--dirty"]
    return subprocess.run(command, cwd=HERE, capture_output=True, text=True).stdout.strip()


def append_training(name, tokens, folder, results):
    """The row of a training up to a budget, unless it is there."""
    rows = raw.read_rows(results / TRAINING_FILE)
    if (name, tokens) in [(row["folder"], row["tokens"]) for row in rows]:
        return
    row = {"version": raw.VERSION, "folder": name, "tokens": tokens}
    row["steps"] = raw.read_rows(folder / "metrics.jsonl")
    raw.append_row(results / TRAINING_FILE, row)


def do_piece(piece, runs, results):
    """Trains and evaluates, and appends the rows that are missing. Returns the exit code."""
    torch.set_num_threads(1)
    folder = runs / piece["folder"]
    lock = (folder / "piece.lock").open("w")
    fcntl.flock(lock, fcntl.LOCK_EX)  # another piece may need the same training
    done = rows_done(results)
    for row in rows_of_piece(piece):
        if row["id"] in done:
            continue
        tokens = row["tokens"]
        checkpoint = find_checkpoint(tokens, folder)
        if checkpoint is None:
            began = time.process_time()
            exit_code = train(piece, tokens, folder)
            checkpoint = find_checkpoint(tokens, folder)
            if checkpoint is None:
                return exit_code or 1
            row["train_cpu_s"] = round(time.process_time() - began, 1)
        if tokens:
            append_training(piece["folder"], tokens, folder, results)
        row["commit"] = commit()
        file = TUNING_FILE if piece["part"] == "tune" else EVALUATION_FILE
        raw.append_row(results / file, evaluate(row, checkpoint))
    return 0


# ---- The pieces of each part, and the processes that do them -------------------------------------


def choices(args, rival):
    """{name of the trial: its options}: learning rates, and search weights unless the rival names
    one, as in "set=0.2", or has none."""
    run, _, weight = rival.partition("=")
    weight = FIXED_WEIGHTS.get(run, weight)
    weights = [weight] if weight else args.weights.split(",")
    found = {}
    for rate, weight in itertools.product(args.lrs.split(","), weights):
        options = ["--lr", rate, "--search-weight", weight, *RIVALS[run]]
        found[f"{run} {rate} {weight}"] = options
    return found


def tuned_options(args, rival, results):
    """The rival's best options by the part tune. Where there is one choice, tuning isn't asked.

    A setting that wasn't tuned takes the options of the setting that was. Raises ValueError where
    nothing was tuned.
    """
    available = choices(args, rival)
    if len(available) == 1:
        return next(iter(available.values()))
    scouts = raw.of_version(raw.read_rows(results / TUNING_FILE), raw.VERSION)
    scouts = [row for row in scouts if row["run"] in available]
    if not scouts:
        raise ValueError(f"{rival} wasn't tuned: give one of --lrs and one of --weights")
    of_setting = [row for row in scouts if row["setting"] == args.setting]
    best = max(of_setting or scouts, key=tables.tuning_score)
    return available[best["run"]]


def pieces_of_tuning(args):
    for rival in args.rivals.split(","):
        trials = choices(args, rival)
        if len(trials) == 1:  # there is nothing to choose
            continue
        for name, options in trials.items():
            yield make_piece(
                args,
                part="tune",
                run=name,
                seed=100,
                options=options,
                budgets=[args.tune_tokens],
                splits=["validation"],
            )


def pieces_of_main(args, results):
    budgets = range(args.every, args.tokens + 1, args.every)
    splits = args.splits.split(",")
    for seed in range(args.seeds):
        if args.base:
            yield make_piece(args, part="main", run="base", seed=seed, splits=splits)
        for rival in args.rivals.split(","):
            options = tuned_options(args, rival, results)
            yield make_piece(
                args,
                part="main",
                run=rival.partition("=")[0] + args.suffix,
                seed=seed,
                options=[*options, *shlex.split(args.options)],
                budgets=budgets,
                splits=splits,
            )


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
    """Does the pieces that lack a row, in order, at most args.jobs at a time. Returns how many
    failed."""
    done = rows_done(results)
    waiting = [
        piece for piece in pieces if any(row["id"] not in done for row in rows_of_piece(piece))
    ]
    print(f"{len(pieces)} pieces, {len(pieces) - len(waiting)} done before")
    failed = 0
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
                failed += process.returncode != 0
                state = "done" if process.returncode == 0 else "FAILED, see its log.txt:"
                seconds = time.time() - began
                print(f"{state} {piece['part']} {piece['folder']}  {seconds:.0f}s", flush=True)
    finally:
        for process, _, _ in running:
            process.terminate()  # training ends its step and saves
        for process, _, _ in running:
            process.wait()
    return failed


def parse_arguments(arguments):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--setting", default="short", choices=SETTINGS)
    parser.add_argument("--rivals", default=",".join(RIVALS))
    parser.add_argument("--no-base", dest="base", action="store_false", help="nor evaluate it")
    parser.add_argument("--every", type=int, default=0, help="evaluate whenever so many are spent")
    parser.add_argument("--splits", default="test", help="test, or test,validation")
    parser.add_argument("--options", default="", help="more options of spiral.py, for all rivals")
    parser.add_argument("--suffix", default="", help="of the rivals' names, if they have options")
    parser.add_argument("--jobs", type=int, default=2, help="single-threaded processes at a time")
    parser.add_argument("--quick", action="store_true", help="everything in miniature")
    parser.add_argument("--piece", help=argparse.SUPPRESS)
    sizes = QUICK if "--quick" in arguments else FULL
    for name, value in sizes.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    args = parser.parse_args(arguments)
    args.every = args.every or args.tokens
    if args.tokens % args.every:
        parser.error("--tokens must be a multiple of --every")
    unknown = set(args.parts) - set(PARTS)
    if unknown:
        parser.error(f"no part {', '.join(unknown)}: there are {', '.join(PARTS)}")
    return args


def main(arguments):
    args = parse_arguments(arguments)
    runs = HERE.parent / "runs" / ("study-quick" if args.quick else "study")
    results = runs / "results" if args.quick else raw.STUDY
    if args.piece:
        return do_piece(json.loads(args.piece), runs, results)

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    try:
        for part in args.parts or PARTS:
            pieces = pieces_of_tuning(args) if part == "tune" else pieces_of_main(args, results)
            if run_pieces([*pieces], args, runs, results):
                return 1
    except KeyboardInterrupt:
        print("interrupted: the same command goes on")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
