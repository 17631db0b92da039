"""The study: SPIRAL against GRPO and GRPO on both roles, at an equal budget of sampled output tokens. Raw results only; plot.py draws.

    python experiments/study.py                                  # every part, in the order of PARTS; it goes on where it stopped
    python experiments/study.py --setting long                   # the same for the other of two SETTINGS, to results/study-long/
    python experiments/study.py train evaluate cross --jobs 2    # some parts, two single-threaded processes at a time
    python experiments/study.py ablations --budget-hours 1       # starts nothing more that would take the part over 1 CPU hour
    python experiments/study.py --quick                          # everything in miniature, about 10 minutes, to runs/study-quick/

tune        each algorithm over the same learning rates (at search weight 0.05), then search weights, judged on validation problems -> tuned.json
train       the rivals, each seed, until the step that reaches the budget of sampled output tokens
evaluate    they, and SPIRAL at search weight 1, go on to each of the main budgets; there experiments 1 to 6 on test problems: counts per problem for every way
            to use a policy
cross       each rival as searcher x each as aggregator
ablations   the VARIANTS: trained at the budget of the part train, and evaluated at smaller sizes, as are the references
difficulty  countdown from easy to hard, and arithmetic
noise       experiments/gradient_noise.py of the start policy and of a trained one

A piece of work is a process: `spiral.main` until the budget, then an evaluation. A finished piece is a row in training.jsonl or
evaluation.jsonl; an unfinished one goes on from its last checkpoint. Another setting, or other start weights, is another piece.
"""

import argparse
import collections
import fcntl
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
import numpy as np  # noqa: E402
import torch  # noqa: E402

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
import spiral  # noqa: E402
import tasks  # noqa: E402
from plot import pass_curve, read  # noqa: E402

RIVALS = ("spiral", "grpo", "grpo-agg")
TASK = spiral.Config().task
PARTS = {"tune": 1.0, "train": 1.5, "evaluate": 5.0, "cross": 0.3, "ablations": 2.0, "difficulty": 2.0, "noise": 0.6}    # CPU hours each

# "short": a trace has room for one attempt, an aggregation for reading four and about two attempts of its own, so only a set searches.
# "long": a trace goes through several attempts by itself; the limits are the defaults of spiral.py. Each: options of training, and sizes.
SETTINGS = {
    "short": (["--max-trace-tokens", "24", "--max-aggregation-tokens", "48"], {"main_tokens": [1_000_000, 2_000_000], "trace_tokens": 24, "aggregation_tokens": 48}),
    "long": ([], {"tokens": 500_000, "main_tokens": [500_000], "large": {"problems": 50, "traces": 128, "tree": 16, "rsa": 8}})}

# Each ablation: options added to SPIRAL's, tuned, but at search weight 1, the exact joint gradient; and a patch of spiral.py (a function
# below). In the order in which they are run
VARIANTS = {
    "aggregation term only": (["--search-weight", "0"], ""),
    "grpo-agg, search weight 1": (["--algo", "grpo-agg", "--search-weight", "1"], ""),
    "search weight 0.05": (["--search-weight", "0.05"], ""),
    "search term only": ([], "search_only"),
    "N1=8 K=8 N2=2": (["--num-sets", "8", "--num-aggregations", "2"], ""),
    "published estimator": (["--estimator", "published", "--no-balanced", "--search-weight", "1"], ""),
    "conclusions only": ([], "conclusions_only"),
    "order not shuffled": ([], "unshuffled"),
    "random sets": (["--no-balanced"], ""),
    "N1=16 K=4 N2=2": (["--num-traces", "16", "--num-aggregations", "2"], ""),
    "all 70 sets": (["--num-sets", "70", "--num-aggregations", "2", "--no-balanced", "--problems", "3"], ""),    # 148 completions a problem
    "L_target 32": (["--target-length", "32"], ""),
}

# CPU seconds on one thread of a 2-core machine whose other core is as busy, for 100 000 sampled tokens of spiral and grpo-agg, and of grpo:
# 29 and 19 (short), 34 and 21 (long); about 90 for a "large" evaluation, 40 for a "small" one; 5 to start a process
FULL = {"seeds": 5, "tokens": 300_000, "tune_tokens": 300_000, "ablation_seeds": 3, "difficulty_seeds": 3, "save_every": 10,
        "lrs": [5e-5, 1e-4, 2e-4], "weights": [0.2, 1.0],
        "tasks": ["countdown:high=20,max_target=60", TASK, "countdown:numbers=4,max_target=100", "arithmetic"],
        # problems; traces for pass@k; of these, traces for votes and trees (a power of 4); steps of recursive self-aggregation
        "large": {"problems": 60, "traces": 256, "tree": 64, "rsa": 10}, "small": {"problems": 60, "traces": 32, "tree": 16, "rsa": 4}}
QUICK = {"seeds": 2, "tokens": 18_000, "main_tokens": [24_000], "tune_tokens": 9_000, "ablation_seeds": 1, "difficulty_seeds": 1, "lrs": [3e-4], "weights": [0.1], "save_every": 1,
         "tasks": FULL["tasks"][:2], "large": {"problems": 10, "traces": 32, "tree": 16, "rsa": 3}, "small": {"problems": 10, "traces": 16, "tree": 4, "rsa": 2}}
FIRST_WEIGHT = "0.05"                                        # of the search term, where a piece's options don't name another
LIMITS = (8, 12, 16, 20, 24, 32, 48, 64, 96, 128)            # token limits of one trace (experiment 4); the last is that of evaluation in "long"
CURVES = ("answer_reward", "trace_reward", "search_entropy", "aggregation_entropy", "search_length", "aggregation_length", "search_truncated",
          "grad_norm", "distinct_traces", "distinct_right", "sampled_tokens", "useful_problems", "drawn_problems")


# ---- Patches of spiral.py, in the process of one run ----------------------------------------------------------------


def search_only():
    """Aggregations have no advantage: the aggregator learns nothing but what it shares with the searcher."""
    spiral.aggregation_advantages = lambda rewards, estimator="": torch.zeros_like(rewards)


def unshuffled():
    """Candidates in the order of their sampling."""
    plain = spiral.draw_sets
    spiral.draw_sets = lambda *args, **kwargs: plain(*args, **kwargs).sort(1).values


def conclusions_only():
    """The aggregator reads the answer line of each trace, in training and evaluation."""
    plain = spiral.aggregate

    def aggregate(policy, task, problems, sets, *args):
        return plain(policy, task, problems, [[f"{tasks.ANSWER}{task.answer(text) or 'none'}" for text in texts] for texts in sets], *args)
    spiral.aggregate = aggregate


PATCHES = {"": lambda: None, **{f.__name__: f for f in (search_only, unshuffled, conclusions_only)}}


# ---- A piece of work: a dict {part, run, seed, task, tokens, options, patch, evaluation, split}, in a process of its own ----


def make_piece(part, run, seed, tokens, options=(), patch="", task=TASK, evaluation=None, split="test"):
    """`run` is what figures call it; tokens 0: the start policy. "name" names the training, "id" the piece."""
    training = {"seed": seed, "task": task, "tokens": tokens, "options": list(options), "patch": patch}
    crc = zlib.crc32((json.dumps(training) + hashlib.sha256((spiral.TINY / "model.safetensors").read_bytes()).hexdigest()).encode())
    name = f"{run.replace(' ', '_')}-{seed}-{crc:08x}"
    return {"part": part, "run": run, **training, "evaluation": evaluation, "split": split, "name": name,
            "id": f"{part}: {name} {split} {zlib.crc32(json.dumps(evaluation).encode()):08x}" if evaluation else name}


def append(path, row):
    """One write, so that processes can share the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    os.write(descriptor, (json.dumps(row, separators=(",", ":")) + "\n").encode())
    os.close(descriptor)


def has(path, name):
    return any(row["id"] == name for row in read(path))


def trained(folder, tokens):
    """Whole checkpoint of a training that has reached its budget, or None."""
    checkpoint, state = spiral.newest_checkpoint(folder)
    rows = read(folder / "metrics.jsonl")[:state["step"] if state else 0]
    return checkpoint if sum(row["sampled_tokens"] for row in rows) >= tokens else None


def train_piece(piece, folder, save_every):
    """spiral.main, stopped by a SIGTERM to itself in the step that reaches the budget: it ends the step and saves. More in metrics.jsonl:
    distinct traces and right answers among the first 8 traces, and time."""
    plain, clock = spiral.statistics, [time.process_time(), time.time()]

    def statistics(task, records, useful, config):
        stats = plain(task, records, useful, config)
        first = [record["traces"][:8] for record in records]
        right = [{task.answer(text) for text in texts if task.reward(record["problem"], text)} for record, texts in zip(records, first)]
        now = [time.process_time(), time.time()]
        stats |= {"distinct_traces": float(np.mean([len(set(texts)) for texts in first])), "distinct_right": float(np.mean([len(r) for r in right])),
                  "cpu_s": now[0] - clock[0], "wall_s": now[1] - clock[1]}               # from one step's rollout to the next one's
        clock[:] = now
        if sum(row["sampled_tokens"] for row in read(folder / "metrics.jsonl")) + stats["sampled_tokens"] >= piece["tokens"]:
            os.kill(os.getpid(), signal.SIGTERM)
        return stats

    spiral.statistics = statistics
    return spiral.main(["--task", piece["task"], "--seed", str(piece["seed"]), "--out", str(folder), "--steps", "100000", "--eval-problems", "0",
                        "--transcript-every", "0", "--save-every", str(save_every), "--search-weight", FIRST_WEIGHT, *piece["options"]])


def training_row(piece, folder):
    rows = read(folder / "metrics.jsonl")
    curves = {key: [float(f"{row[key]:.4g}") for row in rows] for key in CURVES if key in rows[0]}
    total = lambda key: round(sum(row[key] for row in rows), 1)                           # noqa: E731
    return {**piece, "steps": len(rows), **{key: total(key) for key in ("sampled_tokens", "prefill_tokens", "trained_tokens", "cpu_s", "wall_s")}, "curves": curves}


@torch.no_grad()
def evaluate_piece(piece, checkpoint, folder):
    """Counts per problem: how many traces, votes, aggregations are right. Every number of experiments 1 to 6 follows from them."""
    began, sizes = (time.process_time(), time.time()), piece["evaluation"]
    config = spiral.Config(task=piece["task"], model=str(checkpoint), max_trace_tokens=LIMITS[-1], max_aggregation_tokens=sizes.get("aggregation_tokens", LIMITS[-1]))
    policy, task, n, limits = spiral.load_policy(config), tasks.make_task(config.task), config.set_size, torch.tensor(LIMITS)
    problems, generator = task.problems(piece["split"], sizes["problems"], 0), torch.Generator().manual_seed(1)
    counts, lengths, kept = collections.defaultdict(list), collections.defaultdict(list), []        # lengths: output tokens of a completion
    size_of = lambda samples: samples.mask.sum(-1).tolist()                               # noqa: E731
    cut = sizes.get("trace_tokens", LIMITS[-1])              # traces beyond it are for experiment 4 only

    def right(problem, texts):
        return int(sum(task.reward(problem, text) for text in texts))

    def right_votes(problem, texts, m):
        """Right majority votes, one for each block of m texts. Who answers "none" abstains."""
        answers = [task.answer(text) for text in texts]
        return right(problem, [f"{tasks.ANSWER}{spiral.majority_vote(answers[i:i + m])}" for i in range(0, len(texts), m)])

    for start in range(0, len(problems), 25):
        chunk = problems[start:start + 25]
        _, samples, traces = spiral.search(policy, task, chunk, config, sizes["traces"], generator)
        rewards, length = spiral.rewards_of(task, chunk, traces), samples.mask.sum(-1).view(len(chunk), -1)                # [P, S] both
        ends = (length[:, :, None] <= limits) & ~samples.truncated.view(length.shape)[:, :, None]                          # [P, S, limits]
        counts["right_within"] += (rewards[:, :, None] * ends).sum(1).int().tolist()
        counts["tokens_within"] += torch.minimum(length[:, :, None], limits).sum(1).tolist()
        samples.mask, samples.logprobs = samples.mask[:, :cut], samples.logprobs[:, :cut]
        texts = [policy.tokenizer.decode(row[:k]) for row, k in zip(samples.tokens.tolist(), size_of(samples))]
        traces = [texts[i:i + sizes["traces"]] for i in range(0, len(texts), sizes["traces"])]
        rewards = spiral.rewards_of(task, chunk, traces)
        lengths["trace"] += size_of(samples)
        counts["right"] += rewards.sum(1).int().tolist()
        counts["nats"] += (-samples.logprobs.sum(-1).view(length.shape).sum(1)).round(decimals=1).tolist()
        counts["distinct_traces"] += [len(set(texts)) for texts in traces]
        counts["distinct_right"] += [len({task.answer(t) for t, r in zip(texts, row) if r}) for texts, row in zip(traces, rewards)]
        level, m = [texts[:sizes["tree"]] for texts in traces], 1                        # each level aggregates sets of n of the one before
        kept += [texts[:16] for texts in traces]
        for size in (2 ** i for i in range(sizes["tree"].bit_length())):
            counts[f"vote {size}"] += [right_votes(x, texts, size) for x, texts in zip(chunk, level)]
        while m * n <= sizes["tree"]:
            sets = [texts[i:i + n] for texts in level for i in range(0, len(texts), n)]
            owners = [x for x, texts in zip(chunk, level) for _ in range(len(texts) // n)]
            _, samples, texts = spiral.aggregate(policy, task, owners, sets, config, 1, generator)
            each, m = len(level[0]) // n, m * n
            lengths[f"tree {m}"] += size_of(samples)
            level = [[t for (t,) in texts[i:i + each]] for i in range(0, len(texts), each)]
            counts[f"tree {m}"] += [right(x, texts) for x, texts in zip(chunk, level)]
            if m == n:
                hopeless = [not right(x, texts) for x, texts in zip(owners, sets)]
                emergent = [h and task.reward(x, t) > 0 for h, x, (t,) in zip(hopeless, owners, texts)]
                for name, flags in (("hopeless", hopeless), ("emergent", emergent)):
                    counts[name] += [sum(flags[i:i + each]) for i in range(0, len(flags), each)]
                for size in (2 ** i for i in range(each.bit_length())):                  # a vote over aggregations of sets of n
                    counts[f"aggregate, vote {size * n}"] += [right_votes(x, texts, size) for x, texts in zip(chunk, level)]
        history = spiral.recursive_self_aggregation(policy, task, chunk, config, [texts[:config.population] for texts in traces], sizes["rsa"], generator)
        for step, population in enumerate(history):
            counts[f"rsa {step}"] += [right(x, texts) for x, texts in zip(chunk, population)]
            counts[f"rsa, vote {step}"] += [right_votes(x, texts, config.population) for x, texts in zip(chunk, population)]
            lengths[f"rsa {step}"] += [len(policy.tokenizer.encode(text)) + 1 for texts in population for text in texts]
        print(f"evaluated {start + len(chunk)}/{len(problems)} problems  {time.time() - began[1]:.0f}s", flush=True)
    if piece["part"] == "evaluate":                          # for the part "cross"
        (folder / "traces.json").write_text(json.dumps(kept))
    return {**piece, "population": config.population, "set_size": n, "limits": LIMITS, "lengths": {k: round(float(np.mean(v)), 2) for k, v in lengths.items()},
            "cpu_s": round(time.process_time() - began[0], 1), "wall_s": round(time.time() - began[1], 1), "counts": counts}


def cross_piece(piece, checkpoint, runs):
    """This policy as aggregator of the first 16 traces of every rival of the same seed, in 4 sets of 4: right aggregations per problem."""
    began = time.process_time(), time.time()
    config = spiral.Config(task=piece["task"], model=str(checkpoint), max_aggregation_tokens=piece["evaluation"].get("aggregation_tokens", LIMITS[-1]))
    policy, task, generator = spiral.load_policy(config), tasks.make_task(config.task), torch.Generator().manual_seed(1)
    problems, n, counts = task.problems(piece["split"], piece["evaluation"]["problems"], 0), config.set_size, {}
    for searcher, name in piece["evaluation"]["searchers"].items():
        traces = json.loads((runs / name / "traces.json").read_text())
        sets, each = [texts[i:i + n] for texts in traces for i in range(0, len(texts), n)], len(traces[0]) // n
        owners = [x for x in problems for _ in range(each)]
        _, _, texts = spiral.aggregate(policy, task, owners, sets, config, 1, generator)
        counts[searcher] = spiral.rewards_of(task, owners, texts).view(len(problems), each).sum(1).int().tolist()
        print(f"aggregated the traces of {searcher}  {time.time() - began[1]:.0f}s", flush=True)
    return {**piece, "sets": each, "cpu_s": round(time.process_time() - began[0], 1), "wall_s": round(time.time() - began[1], 1), "counts": counts}


def work(piece, runs, results, save_every):
    """Does what the piece lacks. Returns the exit code; 3: interrupted, or what it builds on isn't there."""
    torch.set_num_threads(1)
    folder, checkpoint = runs / piece["name"], spiral.TINY
    folder.mkdir(parents=True, exist_ok=True)
    lock = (folder / "lock").open("w")
    fcntl.flock(lock, fcntl.LOCK_EX)                         # an orphan of a killed study finishes first
    earlier = runs / piece.get("goes_on_from", "-")
    if (earlier / "metrics.jsonl").exists() and not (folder / "metrics.jsonl").exists():
        shutil.copytree(earlier, folder, dirs_exist_ok=True, ignore=lambda *_: ["lock", "log.txt", "traces.json"])
    PATCHES[piece["patch"]]()
    if piece["tokens"]:
        checkpoint = trained(folder, piece["tokens"])
        if not checkpoint and piece["part"] == "cross":
            print("not trained yet: run the part evaluate first", flush=True)
            return 3
        if not checkpoint:
            code = train_piece(piece, folder, save_every)
            checkpoint = trained(folder, piece["tokens"])
            if not checkpoint:
                return code or 3
        if not has(results / "training.jsonl", piece["name"]):
            append(results / "training.jsonl", {**training_row(piece, folder), "id": piece["name"]})
    if piece["evaluation"] and not has(results / "evaluation.jsonl", piece["id"]):
        row = cross_piece(piece, checkpoint, runs) if piece["part"] == "cross" else evaluate_piece(piece, checkpoint, folder)
        append(results / "evaluation.jsonl", row)
    return 0


# ---- The pieces of each part, and the processes that do them --------------------------------------------------------


def tuned(sizes, results, algo):
    """Options of the algorithm: the setting's, and what the part tune chose, or the defaults of spiral.py."""
    chosen = json.loads((results / "tuned.json").read_text()) if (results / "tuned.json").exists() else {}
    return ["--algo", algo, *sizes["options"], *chosen.get(algo, {}).get("options", [])]


def config_of(options):
    return spiral.parse_config(["--search-weight", FIRST_WEIGHT, *options])


def at_weight_1(sizes, results):
    """Options of SPIRAL at the exact joint gradient, tuned otherwise."""
    mine = tuned(sizes, results, "spiral")
    return mine if config_of(mine).search_weight == 1 else [*mine, "--search-weight", "1"]


def train_pieces(sizes, results):
    """Seed by seed, so that a part that ends early holds whole seeds."""
    return [make_piece("train", algo, seed, sizes["tokens"], tuned(sizes, results, algo)) for seed in range(sizes["seeds"]) for algo in RIVALS]


def evaluate_pieces(sizes, results):
    """A resumed run is the undisturbed one, to the byte, so each budget goes on from the one before where that is there."""
    pieces, exact = [make_piece("evaluate", "base", 0, 0, evaluation=sizes["large"])], at_weight_1(sizes, results)
    before = train_pieces(sizes, results)
    if exact != tuned(sizes, results, "spiral"):
        before += [make_piece("evaluate", "spiral, search weight 1", seed, sizes["tokens"], exact) | {"name": make_piece("", "spiral", seed, sizes["tokens"], exact)["name"]}
                   for seed in range(sizes["ablation_seeds"])]                           # the ablations' reference
    for tokens in sizes["main_tokens"]:
        before = [{**make_piece("evaluate", old["run"], old["seed"], tokens, old["options"], evaluation=sizes["large"]), "goes_on_from": old["name"]} for old in before]
        pieces += before
    return pieces


def cross_pieces(sizes, results):
    pieces = []
    for seed in range(sizes["seeds"]):
        options = {"base": (0, 0), **{algo: (seed, sizes["main_tokens"][-1], tuned(sizes, results, algo)) for algo in RIVALS}}
        policies = {run: make_piece("cross", run, *rest) for run, rest in options.items()}
        evaluation = {**sizes["large"], "searchers": {run: piece["name"] for run, piece in policies.items()}}
        for run, rest in options.items():
            piece = make_piece("cross", run, *rest, evaluation=evaluation)
            pieces.append({**piece, "pair_seed": seed})
    return pieces


def ablation_pieces(sizes, results):
    """The references, evaluated at the small sizes too; those as tuned are the policies of the part train."""
    mine, tokens, seeds = tuned(sizes, results, "spiral"), sizes["tokens"], range(sizes["ablation_seeds"])
    exact = at_weight_1(sizes, results)
    runs = [("spiral", exact, ""), *((algo, tuned(sizes, results, algo), "") for algo in ("grpo", "grpo-agg"))]
    runs += [("spiral, as tuned", mine, "")] if mine != exact else []
    runs += [(run, exact + options, patch) for run, (options, patch) in VARIANTS.items() if patch or config_of(exact + options) not in (config_of(exact), config_of(mine))]
    return [make_piece("ablations", run, seed, tokens, options, patch, evaluation=sizes["small"]) for run, options, patch in runs for seed in seeds]


def difficulty_pieces(sizes, results):
    return [make_piece("difficulty", run, seed, sizes["tune_tokens"] if run != "base" else 0, tuned(sizes, results, run) if run != "base" else (), task=task,
                       evaluation=sizes["small"]) for seed in range(sizes["difficulty_seeds"]) for task in sizes["tasks"] for run in ("base", *RIVALS)]


def tune(sizes, results, go):
    """The same learning rates for each; then, at the best of them, search weights for the two that have both terms. One seed, the short
    budget. Score: the mean of pass@16 of the traces and of the accuracy after the last step of RSA, on validation problems."""
    setting = len(sizes["options"])
    pieces = []

    def scores(trials):
        """trials: (algo, options) pairs. The best options of each algorithm so far."""
        pieces.extend(make_piece("tune", " ".join([algo, *options]), 100, sizes["tune_tokens"], ["--algo", algo, *sizes["options"], *options], evaluation=sizes["small"],
                                 split="validation") for algo, options in trials)
        go(pieces)
        ids, table = {piece["id"] for piece in pieces}, {}
        rows = {row["run"]: row for row in read(results / "evaluation.jsonl") if row["id"] in ids}
        for algo in RIVALS:
            mine = {run: row for run, row in rows.items() if row["options"][1] == algo}
            table[algo] = {run: (pass_curve(row)[:, min(16, row["evaluation"]["traces"]) - 1].mean() + np.mean(row["counts"][f"rsa {row['evaluation']['rsa']}"])
                                 / row["population"]) / 2 for run, row in mine.items()}
        best = {algo: rows[max(table[algo], key=table[algo].get)]["options"][2 + setting:] for algo in RIVALS if table[algo]}
        (results / "tuned.json").write_text(json.dumps({algo: {"options": best[algo], "score": {k: round(float(v), 4) for k, v in table[algo].items()}}
                                                        for algo in best}, indent=1) + "\n")
        return best
    results.mkdir(parents=True, exist_ok=True)
    best = scores([(algo, ["--lr", str(lr)]) for lr in sizes["lrs"] for algo in RIVALS])
    best = scores([(algo, best[algo][:2] + ["--search-weight", str(weight)]) for weight in sizes["weights"] for algo in ("spiral", "grpo-agg") if algo in best])
    print(f"tuned: {best}", flush=True)


def noise(sizes, results, runs):
    """gradient_noise.py of the start policy, and of SPIRAL at the first of the main budgets, unless their results are there."""
    first = next(piece for piece in evaluate_pieces(sizes, results) if piece["run"] == "spiral")
    policies = {"start": spiral.TINY, f"SPIRAL after {first['tokens'] / 1e6:g}M tokens": trained(runs / first["name"], first["tokens"])}
    path = HERE / "results" / "gradient_noise.json"
    for name, checkpoint in policies.items():
        if checkpoint and name not in (json.loads(path.read_text()) if path.exists() else {}):
            subprocess.run([sys.executable, str(HERE / "gradient_noise.py"), "--model", str(checkpoint), "--name", name], check=True)


def run_pieces(pieces, part, args, runs, results):
    """At most args.jobs processes at a time, in order; starts none that would take the part over its budget. Output goes to log.txt."""
    raw = [results / "training.jsonl", results / "evaluation.jsonl"]
    done = {row["id"] for path in raw for row in read(path)}
    waiting, running, began = [piece for piece in pieces if piece["id"] not in done], {}, time.time()
    budget = 3600 * (args.budget_hours or PARTS[part])
    print(f"{part}: {len(pieces)} pieces, {len(pieces) - len(waiting)} done before; budget {budget / 3600:.2f} CPU hours", flush=True)
    try:
        while waiting or running:
            rows = [row for path in raw for row in read(path) if row["part"] == part]
            spent = sum(row["cpu_s"] for row in rows)
            one = spent / max(1, len({row["name"] for row in rows}))                     # a piece costs about this
            while waiting and len(running) < args.jobs:
                if spent + (len(running) + 1) * one > budget:
                    print(f"{part}: {spent / 3600:.2f} CPU hours spent; the budget leaves {len(waiting)} pieces out", flush=True)
                    waiting = []
                    break
                piece = waiting.pop(0)
                folder = runs / piece["name"]
                folder.mkdir(parents=True, exist_ok=True)
                command = [sys.executable, str(Path(__file__).resolve()), "--setting", args.setting, "--piece", json.dumps(piece), *(["--quick"] if args.quick else [])]
                with (folder / "log.txt").open("a") as log:                              # a new session: Ctrl-C reaches this process alone
                    running[piece["id"]] = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True,
                                                            env={**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}), folder, time.time()
            time.sleep(0.5)
            for name, (process, folder, started) in list(running.items()):
                if process.poll() is not None:
                    del running[name]
                    print(f"{part}: {'done' if process.returncode == 0 else f'FAILED (exit code {process.returncode}), see {folder}/log.txt:'} {name}  "
                          f"{time.time() - started:.0f}s, {len(waiting)} waiting, {len(running)} running", flush=True)
    except KeyboardInterrupt:
        for process, _, _ in running.values():
            process.terminate()                              # training ends its step and saves
        for process, _, _ in running.values():
            process.wait()
        raise
    rows = [row for path in raw for row in read(path) if row["part"] == part]
    print(f"{part}: {sum(row['cpu_s'] for row in rows) / 60:.1f} CPU minutes in {len(rows)} rows; {(time.time() - began) / 60:.1f} minutes now", flush=True)


def interrupted(number, frame):
    raise KeyboardInterrupt


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; default all")
    parser.add_argument("--setting", default="short", choices=SETTINGS, help="how much a single trace can do")
    parser.add_argument("--quick", action="store_true", help="everything in miniature")
    parser.add_argument("--jobs", type=int, default=2, help="single-threaded processes at a time")
    parser.add_argument("--budget-hours", type=float, default=0.0, help=f"CPU hours of each part; default {PARTS}")
    parser.add_argument("--seeds", type=int, default=0, help="of the main comparison, instead of the plan's")
    parser.add_argument("--piece", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if unknown := set(args.parts) - set(PARTS):
        parser.error(f"unknown part {', '.join(sorted(unknown))}: choose from {', '.join(PARTS)}")
    name = "study" + ("-long" if args.setting == "long" else "") + ("-quick" if args.quick else "")
    options, more = SETTINGS[args.setting]
    sizes = {**FULL, **more, **(QUICK if args.quick else {}), "options": options}
    limits = {key: more[key] for key in ("trace_tokens", "aggregation_tokens") if key in more}
    sizes |= {"seeds": args.seeds or sizes["seeds"], "large": sizes["large"] | limits, "small": sizes["small"] | limits}
    runs, results = HERE.parent / "runs" / name, HERE.parent / "runs" / name / "results" if args.quick else HERE / "results" / name
    if args.piece:
        return work(json.loads(args.piece), runs, results, sizes["save_every"])
    signal.signal(signal.SIGTERM, interrupted)
    makers = {"train": train_pieces, "evaluate": evaluate_pieces, "cross": cross_pieces, "ablations": ablation_pieces, "difficulty": difficulty_pieces}
    try:
        for part in args.parts or PARTS:
            if part == "tune":
                tune(sizes, results, lambda pieces: run_pieces(pieces, "tune", args, runs, results))
            elif part == "noise":
                if not args.quick:
                    noise(sizes, results, runs)
            else:
                run_pieces(makers[part](sizes, results), part, args, runs, results)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", flush=True)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
