"""Every figure and table, from raw files alone.

    python experiments/plot.py                          # the study's figures, from experiments/results/study/*.jsonl
    python experiments/plot.py --table                  # the README's table of results; --ablations: that of the ablations
    python experiments/plot.py --results experiments/results/study-long                          # the same for the other setting
    python experiments/plot.py runs/spiral-countdown-0 runs/grpo-countdown-0 --out curves.png    # training curves, also of runs that go on

Intervals are 95%: over seeds, by Student's t, for "±" and for bands; over problems, by the bootstrap, where it says so. Differences
are paired by seed (same training problems) and by problem.
"""

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402

RESULTS = Path(__file__).resolve().parent / "results" / "study"
CURVES = (("answer_reward", "reward of the final answer"), ("trace_reward", "reward of the traces"), ("search_entropy", "entropy of search (nats a token)"),
          ("search_length", "length of a trace (tokens)"), ("useful", "problems with an advantage"), ("grad_norm", "gradient norm"))
RIVALS = {"base": "0.55", "grpo": "tab:orange", "grpo-agg": "tab:green", "spiral": "tab:blue"}
T975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)               # of Student's t, by degrees of freedom


def read(path):
    """Rows of a JSONL file; a last line that is still being written is left out."""
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def smooth(values, window=5):
    return [sum(values[max(0, i - window + 1):i + 1]) / len(values[max(0, i - window + 1):i + 1]) for i in range(len(values))]


# ---- What the rows of the study say ---------------------------------------------------------------------------------


def interval(values):
    """Mean over the first axis (seeds), and half its 95% interval (nan of one seed)."""
    values = np.asarray(values, float)
    count = len(values)
    return values.mean(0), T975[min(count - 2, 8)] * values.std(0, ddof=1) / count ** 0.5 if count > 1 else np.full(values.shape[1:], np.nan)


def bootstrap(statistic, arrays, draws=1000):
    """95% interval of statistic(*arrays) over problems, the first axis of each array [P, ...]."""
    rng, count = np.random.default_rng(0), len(arrays[0])
    picks = [rng.integers(count, size=count) for _ in range(draws)]
    return np.percentile([statistic(*(array[pick] for array in arrays)) for pick in picks], [2.5, 97.5])


def pass_curve(row):
    """Unbiased pass@k of each problem, k = 1..S: [P, S]. pass@k = 1 - prod_{i<k} (S - c - i) / (S - i)."""
    total, i = row["evaluation"]["traces"], np.arange(row["evaluation"]["traces"])
    wrong = total - np.array(row["counts"]["right"])[:, None]                             # [P, 1]
    return 1 - np.cumprod(np.clip((wrong - i) / (total - i), 0, 1), axis=1)


def procedures(row):
    """Ways to get one answer: {name: (output tokens a problem, accuracy of each problem [P])}. A vote or tree is averaged over the disjoint
    blocks of traces it was tried on; "rsa s" answers with one member of the population of step s, so needs one aggregation in step s."""
    counts, length, tree = {k: np.array(v) for k, v in row["counts"].items()}, row["lengths"], row["evaluation"]["tree"]
    n, trace, found = row["set_size"], row["lengths"]["trace"], {}
    for i, limit in enumerate(row["limits"]):
        found[f"one trace of {limit} tokens"] = counts["tokens_within"][:, i].mean() / row["evaluation"]["traces"], counts["right_within"][:, i] / row["evaluation"]["traces"]
    for name, right in counts.items():
        kind, _, m = name.rpartition(" ")
        m, right = int(m) if m.isdigit() else 0, right.astype(float)
        if kind == "vote":
            found[name] = m * trace, right / (tree // m)
        elif kind == "tree":
            levels = [n ** i for i in range(1, 9) if n ** i <= m]
            found[name] = m * trace + sum(m // level * length[f"tree {level}"] for level in levels), right / (tree // m)
        elif kind == "aggregate, vote":
            found[name] = m * trace + m // n * length[f"tree {n}"], right / (tree // m)
        elif kind.startswith("rsa"):
            before, size = sum(length[f"rsa {i}"] for i in range(m)), row["population"]
            found[name] = (size * before + length[f"rsa {m}"], right / size) if kind == "rsa" else (size * (before + length[f"rsa {m}"]), right)
    return found


def factor(theirs, ours, k):
    """How many times more traces they need for their pass@k than we do: curves [S] -> k_theirs / k_ours at equal pass rate, with k_ours
    interpolated in log k. When we never reach it, k_theirs at our largest pass rate, over S: a factor below 1."""
    logs = np.log(np.arange(1, len(ours) + 1))
    if ours[-1] >= theirs[k - 1]:
        return k / np.exp(np.interp(theirs[k - 1], ours, logs))
    return min(1.0, np.exp(np.interp(ours[-1], theirs, logs)) / len(ours))


def load(folder, part, tokens=0):
    """{run: rows in order of their seeds} of a part of the study, at a budget of sampled tokens (0: the largest); of repeated pieces the last."""
    rows = [row for row in read(folder / "evaluation.jsonl") if row["part"] == part]
    tokens = tokens or max((row["tokens"] for row in rows), default=0)
    rows = {(row["run"], row["seed"], row["task"], row.get("pair_seed")): row for row in rows if row["tokens"] in (0, tokens)}
    runs = {}
    for key in sorted(rows, key=lambda key: (key[1], key[3] or 0)):
        runs.setdefault(key[0], []).append(rows[key])
    return runs


def measures(row):
    """The rows of the table: {name: [P]}; a difference of them is one of means over problems."""
    curve, ways, counts, n = pass_curve(row), procedures(row), row["counts"], row["set_size"]
    total, tree, last = curve.shape[1], row["evaluation"]["tree"], row["evaluation"]["rsa"]
    found = {f"pass@{k}": curve[:, k - 1] for k in (1, 4, 16, 64, 256) if k <= total}
    found |= {f"majority of {tree} traces": ways[f"vote {tree}"][1], f"aggregate {n} traces": ways[f"tree {n}"][1], f"aggregate {tree} traces, {n} at a time": ways[f"tree {tree}"][1]}
    found |= {f"recursive self-aggregation, step {i}": ways[f"rsa {i}"][1] for i in sorted({0, 1, 2, 4, last}) if i <= last}
    found[f"the same, step {last}, then a vote"] = ways[f"rsa, vote {last}"][1]
    hopeless = max(1, sum(counts["hopeless"]))
    found[f"right answer from {n} wrong traces"] = np.array(counts["emergent"]) * len(counts["right"]) / hopeless
    return found


def table(folder=RESULTS, tokens=0):
    """The README's table, in markdown."""
    runs, signed = load(folder, "evaluate", tokens), lambda pair: f"{pair[0]:+.3f} ± {pair[1]:.3f}"  # noqa: E731
    names = [run for run in RIVALS if run in runs]
    pairs = [("spiral", other) for other in ("grpo", "grpo-agg") if other in runs and "spiral" in runs]
    found = {run: [measures(row) for row in runs[run]] for run in names}
    seeds = {run: {row["seed"]: i for i, row in enumerate(runs[run])} for run in names}
    lines = ["| | " + " | ".join([*names, *(f"{a} − {b}" for a, b in pairs)]) + " |", "|---" * (1 + len(names) + len(pairs)) + "|"]
    for name in found[names[0]][0]:
        cells = []
        for run in names:
            mean, half = interval([row[name].mean() for row in found[run]])
            cells.append(f"{mean:.3f}" + (f" ± {half:.3f}" if len(found[run]) > 1 else ""))
        for a, b in pairs:
            both = sorted(seeds[a].keys() & seeds[b].keys())
            gaps = np.array([found[a][seeds[a][s]][name] - found[b][seeds[b][s]][name] for s in both])           # [seeds, P]
            low, high = bootstrap(np.mean, [gaps.mean(0)])
            cells.append(f"{signed(interval(gaps.mean(1)))} ({low:+.3f} to {high:+.3f})")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    for key, text, form in (("trace", "tokens in a trace", "{:.1f}"), ("nats", "entropy of a trace, nats a token", "{:.3f}")):
        values = {run: [row["lengths"]["trace"] if key == "trace" else np.mean(row["counts"]["nats"]) / row["evaluation"]["traces"] / row["lengths"]["trace"]
                        for row in runs[run]] for run in names}
        lines.append(f"| {text} | " + " | ".join(form.format(np.mean(values[run])) for run in names) + " | " * len(pairs) + "|")
    for k in (16, 64, 256):
        cells = [" "] * len(names)
        for a, b in pairs:
            both = sorted(seeds[a].keys() & seeds[b].keys())
            ours, theirs = (np.array([pass_curve(runs[run][seeds[run][s]]) for s in both]) for run in (a, b))     # [seeds, P, S]
            if k > ours.shape[2]:
                break
            mean, half = interval([np.log(factor(t.mean(0), o.mean(0), k)) for t, o in zip(theirs, ours)])
            low, high = bootstrap(lambda t, o: factor(t.mean(0), o.mean(0), k), [theirs.mean(0), ours.mean(0)])
            cells.append(f"{np.exp(mean):.2f}x, {np.exp(mean - half):.2f} to {np.exp(mean + half):.2f} ({low:.2f} to {high:.2f})")
        else:
            lines.append(f"| traces they need for pass@{k}, over SPIRAL's | " + " | ".join(cells) + " |")
    return "\n".join(lines)


# ---- Figures of the study -------------------------------------------------------------------------------------------


def band(axis, x, rows, label, style="-"):
    """Mean of rows [seeds, X] and its 95% interval."""
    mean, half = interval(rows)
    axis.plot(x, mean, style, color=RIVALS.get(label.split(":")[0]), label=label, linewidth=1.8)
    axis.fill_between(x, mean - half, mean + half, color=RIVALS.get(label.split(":")[0]), alpha=0.18, linewidth=0)


def finish(figure, path, legends=()):
    for axis in legends:
        axis.legend(fontsize=9, frameon=False)
    for axis in figure.axes:
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
        if axis.get_ylabel().startswith(("accuracy", "pass")):                            # bands of few seeds go beyond
            axis.set_ylim(max(0, axis.get_ylim()[0]), min(1.02, axis.get_ylim()[1]))
    figure.savefig(path, dpi=110)
    plt.close(figure)
    print(f"drawn to {path}")


def axes_of(columns, *titles, height=4.0, rows=1):
    figure, axes = plt.subplots(rows, columns, figsize=(9.0, height * rows), layout="constrained", squeeze=False)
    for axis, (title, x, y) in zip(axes.flat, titles):
        axis.set(title=title, xlabel=x, ylabel=y)
        axis.title.set_fontsize(11)
    return figure, list(axes.flat)


def draw_main(folder):
    """Experiments 1 to 5."""
    runs = {run: rows for run, rows in load(folder, "evaluate").items() if run in RIVALS}
    runs = {run: runs[run] for run in RIVALS if run in runs}
    if not runs:
        return
    ways = {run: [procedures(row) for row in rows] for run, rows in runs.items()}
    accuracy = lambda run, name: [way[name][1].mean() for way in ways[run]]               # noqa: E731
    numbers = lambda kind: sorted(int(name[len(kind) + 1:]) for name in next(iter(ways.values()))[0] if name.rpartition(" ")[0] == kind)    # noqa: E731

    figure, (left, right) = axes_of(2, ("a right trace among k", "k traces", "pass@k"), ("traces needed, over SPIRAL's, at equal pass@k", "k traces of the rival", "factor"))
    curves = {run: np.array([pass_curve(row).mean(0) for row in rows]) for run, rows in runs.items()}            # [seeds, S]
    k = np.arange(1, next(iter(curves.values())).shape[1] + 1)
    for run in runs:
        band(left, k, curves[run], run)
        if run != "spiral" and "spiral" in runs:
            pairs = [(t, o) for t, o in zip(curves[run] if run != "base" else np.repeat(curves[run][:1], len(curves["spiral"]), 0), curves["spiral"])]
            mean, half = interval([[np.log(factor(t, o, i)) for i in k] for t, o in pairs])
            right.plot(k, np.exp(mean), color=RIVALS[run], label=run)
            right.fill_between(k, np.exp(mean - half), np.exp(mean + half), color=RIVALS[run], alpha=0.18, linewidth=0)
    if {"spiral", "grpo"} <= curves.keys():
        print(f"  spiral is ahead of grpo from k = {int(np.argmax(curves['spiral'].mean(0) > curves['grpo'].mean(0))) + 1}")
    right.axhline(1, color="black", linewidth=0.8)
    right.set_yscale("log", base=2)
    left.set_xscale("log", base=2), right.set_xscale("log", base=2)
    finish(figure, folder / "pass_at_k.png", [left, right])

    steps = numbers("rsa")
    figure, (left, right) = axes_of(2, ("recursive self-aggregation", "step", "accuracy of a member"), ("... then a majority vote", "step", "accuracy of the vote"))
    for run in runs:
        band(left, steps, np.transpose([accuracy(run, f"rsa {i}") for i in steps]), run)
        band(right, steps, np.transpose([accuracy(run, f"rsa, vote {i}") for i in steps]), run)
    finish(figure, folder / "rsa.png", [left])

    figure, axes = axes_of(len(runs), *((run, "traces", "accuracy") for run in runs), height=3.6)
    for axis, run in zip(axes, runs):
        for kind, text, style in (("vote", "majority vote", ":"), ("aggregate, vote", "aggregate fours, then vote", "--"), ("tree", "aggregate in a tree", "-")):
            mean, half = interval(np.transpose([accuracy(run, f"{kind} {m}") for m in numbers(kind)]))
            axis.errorbar(numbers(kind), mean, half if len(runs[run]) > 1 else None, fmt="o" + style, color=RIVALS[run], label=text, markersize=3, capsize=2)
        axis.set_xscale("log", base=2)
        axis.set_ylim(0, 1)
        axis.legend(fontsize=7, frameon=False, loc="lower center")
    finish(figure, folder / "votes.png")

    limits, budgets = next(iter(runs.values()))[0]["limits"], np.geomspace(16, 3000, 40)
    figure, (left, right) = axes_of(2, ("one trace, growing token limit", "token limit", "accuracy"), ("best way to spend a budget", "output tokens a problem", "accuracy"))
    for run in runs:
        band(left, limits, np.transpose([accuracy(run, f"one trace of {limit} tokens") for limit in limits]), run)
        band(right, budgets, np.array([[spend(ways[run], seed, budget)[0] for budget in budgets] for seed in range(len(ways[run]))]), run)
        for budget in (64, 128, 256, 512, 1024, 2048):
            print(f"  {run:<9} best for {budget:>4} tokens: {np.mean([spend(ways[run], seed, budget)[0] for seed in range(len(ways[run]))]):.3f}, "
                  f"{' / '.join(spend(ways[run], 0, budget)[1])}")
    left.set_xscale("log", base=2), right.set_xscale("log", base=2)
    finish(figure, folder / "budget.png", [left])
    every = load(folder, "evaluate")                         # those too that the figures leave out
    for run in [run for run in every if run not in ("base", "grpo") and "grpo" in every]:
        theirs, ours = {row["seed"]: pass_curve(row).mean(0) for row in every["grpo"]}, {row["seed"]: pass_curve(row).mean(0) for row in every[run]}
        for k in [k for k in (16, 64, 256) if k <= len(next(iter(ours.values())))]:
            mean, half = interval([np.log(factor(theirs[seed], ours[seed], k)) for seed in sorted(theirs.keys() & ours.keys())])
            print(f"  traces that grpo needs for its pass@{k}, over those of {run}: {np.exp(mean):.2f} ({np.exp(mean - half):.2f} to {np.exp(mean + half):.2f})")


def spend(ways, seed, budget):
    """Accuracy of one seed under the best procedure within the budget, and its names: chosen on one half of the problems (over all
    seeds), scored on the other, both ways round."""
    names = [name for name in ways[0] if np.mean([way[name][0] for way in ways]) <= budget]
    score = lambda name, half: np.mean([way[name][1][half::2].mean() for way in ways])    # noqa: E731
    best = [max(names, key=lambda name: score(name, half)) for half in (0, 1)] if names else []
    return (np.mean([ways[seed][best[half]][1][1 - half::2].mean() for half in (0, 1)]) if names else 0.0), best


def draw_training(folder):
    """Experiment 6."""
    rows = {row["name"]: row for row in read(folder / "training.jsonl")}
    runs = {run: [rows[row["name"]] for row in main if row["name"] in rows] for run, main in load(folder, "evaluate").items()}
    titles = (("search_entropy", "entropy of search, nats a token"), ("distinct_traces", "distinct traces of 8"), ("distinct_right", "distinct right answers of 8"),
              ("trace_reward", "reward of a trace"), ("grad_norm", "gradient norm"), ("useful", "problems with an advantage"))
    figure, axes = axes_of(3, *((title, "sampled tokens, thousands", "") for _, title in titles), rows=2, height=2.8)
    for run in [run for run in RIVALS if runs.get(run)]:
        top = min(sum(row["curves"]["sampled_tokens"]) for row in runs[run])
        grid = np.linspace(top / 30, top, 30)
        for axis, (key, _) in zip(axes, titles):
            lines = []
            for row in runs[run]:
                curves = row["curves"]
                values = np.divide(curves["useful_problems"], curves["drawn_problems"]) if key == "useful" else curves[key]
                lines.append(np.interp(grid, np.cumsum(curves["sampled_tokens"]), smooth(values)))
            band(axis, grid / 1000, lines, run)
    finish(figure, folder / "training.png", [axes[0]])


def ablations(folder, part="ablations", tokens=0):
    """(names of the scores, scores of SPIRAL's seeds [S, scores], {run: differences from SPIRAL of the same seed [S', scores]})."""
    runs = load(folder, part, tokens)
    if "spiral" not in runs:
        return (), [], {}

    def scores(row):
        ways, curve = procedures(row), pass_curve(row).mean(0)
        return [curve[0], curve[min(16, len(curve)) - 1], *([curve[63]] if len(curve) > 63 else []), ways[f"tree {row['set_size']}"][1].mean(), ways[f"rsa {row['evaluation']['rsa']}"][1].mean()]
    first = runs["spiral"][0]
    names = ("pass@1", "pass@16", *(["pass@64"] if first["evaluation"]["traces"] > 63 else []), f"aggregate {first['set_size']} traces", f"RSA, step {first['evaluation']['rsa']}")
    reference = {row["seed"]: scores(row) for row in runs["spiral"]}
    order = [run for run in dict.fromkeys(row["run"] for row in read(folder / "evaluation.jsonl") if row["part"] == part) if run in runs]
    gaps = {run: [np.subtract(scores(row), reference[row["seed"]]) for row in runs[run] if row["seed"] in reference] for run in order if run not in ("spiral", "base")}
    return names, list(reference.values()), gaps


def ablation_table(folder, part="ablations", tokens=0):
    """In markdown: SPIRAL's scores, and what each ablation changes; of the part evaluate: SPIRAL as tuned, and all else."""
    names, reference, gaps = ablations(folder, part, tokens)
    lines = [f"| {len(reference)} seeds, minus SPIRAL of the same seeds | " + " | ".join(names) + " |", "|---" * (1 + len(names)) + "|",
             f"| SPIRAL, {'search weight 1' if part == 'ablations' else 'as tuned'} | " + " | ".join(f"{value:.3f}" for value in np.mean(reference, 0)) + " |"]
    for run, gap in gaps.items():
        seeds = f" ({len(gap)} seed{'s' * (len(gap) > 1)})" if len(gap) != len(reference) else ""
        lines.append(f"| {run}{seeds} | " + " | ".join(f"{mean:+.3f}" + (f" ± {half:.3f}" if len(gap) > 1 else "") for mean, half in zip(*interval(gap))) + " |")
    return "\n".join(lines)


def draw_ablations(folder):
    """Differences from SPIRAL of the same seeds, trained at the same budget."""
    names, reference, gaps = ablations(folder)
    if not gaps:
        return
    names, reference, gaps, others = names[1:], np.array(reference)[:, 1:], {run: [g[1:] for g in gap] for run, gap in gaps.items()}, list(gaps)
    figure, axes = axes_of(3, *((f"{name}\n(SPIRAL: {reference.mean(0)[i]:.3f})", "difference", "") for i, name in enumerate(names)),
                           height=1.4 + 0.28 * len(others))
    for i, axis in enumerate(axes):
        mean, half = np.transpose([interval([gap[i] for gap in gaps[run]]) for run in others])
        axis.barh(range(len(others)), mean, xerr=np.nan_to_num(half), color=["tab:green" if value > 0 else "tab:red" for value in mean], alpha=0.6, capsize=2)
        for y, run in enumerate(others):
            axis.plot([gap[i] for gap in gaps[run]], [y] * len(gaps[run]), "k.", markersize=4)
        axis.set_yticks(range(len(others)), others if i == 0 else [""] * len(others), fontsize=9)
        axis.axvline(0, color="black", linewidth=0.8)
        axis.invert_yaxis()
    finish(figure, folder / "ablations.png")


def draw_cross(folder):
    """Accuracy of each aggregator on the traces of each searcher, means over seeds."""
    runs, order = load(folder, "cross"), list(RIVALS)
    if not all(run in runs for run in order):
        return
    grid = [[np.array([np.mean(row["counts"][searcher]) / row["sets"] for row in runs[aggregator]]) for aggregator in order] for searcher in order]
    figure, axis = plt.subplots(figsize=(5.5, 4.2), layout="constrained")
    image = axis.imshow([[cell.mean() for cell in row] for row in grid], cmap="viridis")
    for y, row in enumerate(grid):
        for x, cell in enumerate(row):
            mean, half = interval(cell)
            axis.text(x, y, f"{mean:.3f}" + (f"\n± {half:.3f}" if len(cell) > 1 else ""), ha="center", va="center", fontsize=9,
                      color="black" if image.norm(mean) > 0.5 else "white")
    axis.set(xticks=range(4), yticks=range(4), xticklabels=order, yticklabels=order, xlabel="aggregator", ylabel="searcher", title="accuracy of one aggregation of 4 traces")
    for x, aggregator in enumerate(order):
        for other in ("base", "grpo", "grpo-agg"):
            mean, half = interval(grid[-1][x] - grid[order.index(other)][x])
            print(f"  {aggregator:<9} on the traces of spiral minus those of {other:<9} {mean:+.3f} ± {half:.3f}")
    for y, searcher in enumerate(order):
        for x, other in enumerate(order[:-1]):
            mean, half = interval(grid[y][-1] - grid[y][x])
            print(f"  spiral's aggregator minus that of {other:<9} on the traces of {searcher:<9} {mean:+.3f} ± {half:.3f}")
    figure.savefig(folder / "cross.png", dpi=110)
    plt.close(figure)
    print(f"drawn to {folder / 'cross.png'}")


def difficulty_table(folder):
    """In markdown: means over the seeds that there are."""
    runs, names = load(folder, "difficulty"), ("pass@16", "aggregate 4 traces", "recursive self-aggregation, step 4")
    runs = {run: runs[run] for run in RIVALS if run in runs}
    others = [run for run in runs if run not in ("base", "spiral")]
    lines = ["| pass@16 / aggregate 4 / RSA, step 4 | " + " | ".join([*runs, *(f"spiral − {run}" for run in others)]) + " |", "|---" * (1 + len(runs) + len(others)) + "|"]
    for task in dict.fromkeys(row["task"] for row in runs["spiral"]):
        found = {run: {row["seed"]: [measures(row)[name].mean() for name in names] for row in rows if row["task"] == task} for run, rows in runs.items()}       # by seed
        cells = [" / ".join(f"{mean:.2f}" for mean in np.mean([*seeds.values()], 0)) for seeds in found.values()]
        for run in others:                                   # of the same seeds
            differences = np.array([np.subtract(found["spiral"][seed], theirs) for seed, theirs in found[run].items() if seed in found["spiral"]])
            cells.append(" / ".join("{:+.2f} ± {:.2f}".format(*interval(column)) if len(differences) > 1 else f"{column[0]:+.2f}" for column in differences.T))
        lines.append(f"| {task} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw_difficulty(folder):
    runs = load(folder, "difficulty")
    if "base" not in runs:
        return
    order = list(dict.fromkeys(row["task"] for row in runs.get("spiral", runs["base"])))
    title = lambda task: task.replace(":", "\n").replace(",", "\n")          # noqa: E731
    scores = {"pass@16 of traces": lambda row: pass_curve(row)[:, min(16, row["evaluation"]["traces"]) - 1], "aggregate of 4 traces": lambda row: measures(row)["aggregate 4 traces"],
              "RSA, last step": lambda row: measures(row)[f"recursive self-aggregation, step {row['evaluation']['rsa']}"]}
    figure, axes = axes_of(3, *((name, "", "") for name in scores))
    for i, run in enumerate(run for run in RIVALS if run in runs):
        for axis, score in zip(axes, scores.values()):
            seeds = [[score(row).mean() for row in runs[run] if row["task"] == task] for task in order]
            mean, half = zip(*map(interval, seeds))
            axis.bar(np.arange(len(order)) + 0.2 * i, mean, 0.18, yerr=np.nan_to_num(half), color=RIVALS[run], label=run)
            axis.set_xticks(np.arange(len(order)) + 0.3, [title(task) for task in order], fontsize=7)
    finish(figure, folder / "difficulty.png", [axes[2]])


def draw_study(folder):
    for draw in (draw_main, draw_training, draw_ablations, draw_cross, draw_difficulty):
        draw(folder)
    every = read(folder / "training.jsonl")
    for part, run, tokens in dict.fromkeys((row["part"], row["run"], row["tokens"]) for row in every):
        rows = [row for row in every if (row["part"], row["run"], row["tokens"]) == (part, run, tokens)]
        mean = lambda key: np.mean([row[key] for row in rows])                            # noqa: E731, B023
        print(f"  {part:<10} {run:<40} {len(rows)} runs of {mean('steps'):.0f} steps: {mean('sampled_tokens'):,.0f} sampled, "
              f"{mean('prefill_tokens'):,.0f} prefill, {mean('trained_tokens'):,.0f} trained tokens; {mean('cpu_s'):.0f} s CPU, {mean('wall_s'):.0f} s")


# ---- Curves of any runs ---------------------------------------------------------------------------------------------


def runs_table(runs):
    """Before and after of several runs of one command, seeds apart, in markdown: mean, and the range over seeds."""
    before, after = ([[row for row in read(Path(run) / "evaluation.jsonl") if row["policy"] == name][-1] for run in runs] for name in ("before", "after"))
    lines = ["| held-out | before | after | change | " + " | ".join(Path(run).name for run in runs) + " |", "|---" * (4 + len(runs)) + "|"]
    for key in [key for key in before[0] if key not in ("policy", "step", "split")]:
        old, new = [row[key] for row in before], [row[key] for row in after]
        cells = [f"{np.mean(old):.3f}", f"{np.mean(new):.3f}", f"{np.mean(new) - np.mean(old):+.3f}", *(f"{b - a:+.3f}" for a, b in zip(old, new))]
        lines.append(f"| {key} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw_runs(runs, out):
    figure, axes = plt.subplots(2, 3, figsize=(12, 6), layout="constrained")
    for run in runs:
        rows = read(run / "metrics.jsonl")
        if not rows:
            raise SystemExit(f"{run} has no metrics.jsonl with a row in it")
        for row in rows:
            row["useful"] = row["useful_problems"] / row["drawn_problems"]
        for axis, (key, title) in zip(axes.flat, CURVES):
            points = [(row["step"], row[key]) for row in rows if key in row]
            axis.plot([x for x, _ in points], smooth([y for _, y in points]), label=run.name)
            axis.set_title(title, fontsize=10)
            axis.set_xlabel("step", fontsize=9)
        first, last = rows[:5], rows[-5:]
        mean = lambda rows, key: sum(row[key] for row in rows) / len(rows)                # noqa: E731
        print(f"{run.name}: {len(rows)} steps, {sum(row['sampled_tokens'] for row in rows):,} sampled tokens (means of the first and last 5 steps)")
        for key, title in CURVES:
            print(f"  {title:<34}{mean(first, key):9.3f}{mean(last, key):9.3f}")
        for row in read(run / "evaluation.jsonl"):
            print(f"  {row['policy']:<7}" + "  ".join(f"{k} {v:.3f}" for k, v in row.items() if k.startswith(("pass@", "aggregate", "majority", "rsa"))))
    axes.flat[0].legend(fontsize=8)
    for axis in axes.flat:
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle("means over 5 steps", fontsize=9)
    figure.savefig(out, dpi=130)
    print(f"drawn to {out}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path, help="folders of runs; none: the study")
    parser.add_argument("--out", default="curves.png")
    parser.add_argument("--results", type=Path, default=RESULTS, help="raw files of the study, and its figures")
    parser.add_argument("--ablations", action="store_true", help="print their table in markdown")
    parser.add_argument("--difficulty", action="store_true", help="print its table in markdown")
    parser.add_argument("--part", default="ablations", choices=("ablations", "evaluate"), help="of --ablations: evaluate is the main comparison")
    parser.add_argument("--tokens", type=int, default=0, help="the budget, of several in the part evaluate; 0: the largest")
    parser.add_argument("--table", action="store_true", help="print it in markdown, instead of drawing")
    args = parser.parse_args()
    if args.runs:
        return print(runs_table(args.runs)) if args.table else draw_runs(args.runs, args.out)
    if not (args.results / "evaluation.jsonl").exists():
        raise SystemExit(f"{args.results} holds no evaluation.jsonl: run experiments/study.py first, or name folders of runs")
    if args.difficulty:
        return print(difficulty_table(args.results))
    if args.table or args.ablations:
        return print(table(args.results, args.tokens) if args.table else ablation_table(args.results, args.part, args.tokens))
    draw_study(args.results)


if __name__ == "__main__":
    main()
