"""Every table and figure, from raw files alone.

    python experiments/plot.py                       # the study's figures
    python experiments/plot.py --table main          # one of TABLES, at a million tokens
    python experiments/plot.py --table main short 2000000     # another setting or budget
    python experiments/plot.py --table experiments/results/default/seed-*       # before and after
    python experiments/plot.py --fill README.md      # all tables between their markers anew
    python experiments/plot.py runs/A runs/B         # curves of any runs, to curves.png

Intervals are 95%, one a number: seeds and problems are both samples (see `interval`). Differences
are paired by seed and by problem.
"""

import argparse
import functools
import json
import re
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402

RESULTS = Path(__file__).resolve().parent / "results" / "study"
NOISE = RESULTS.with_name("gradient_noise.json")
RIVALS = ("base", "grpo", "trace", "set", "pass", "curve")
# Columns: runs, and differences of two. A table of differences alone has the traces needed, too
TABLES = {
    "main": (RIVALS, ()),
    "credits": ((), [(a, b) for b in ("grpo", "trace") for a in ("set", "pass", "curve")]),
    "lattice": ((), [(f"{run} (lattice)", run) for run in RIVALS]),
    "more": ((), [(run, "curve") for run in ("depth 2", "curve trained with lattices")]),
}
NEEDED = "thousands of sampled tokens until signal = noise"
METRICS = ("aggregation reward", "search reward", "search entropy", "search length")
METRICS += ("grad_norm", "curve")


def read(path):
    """Rows of a JSONL file; a last line that is still being written is left out."""
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


# ---- Statistics ----------------------------------------------------------------------------------


def interval(values):
    """Mean of values [seeds, problems, ...] over both, and half of its 95% interval.

    Seeds and problems are crossed, value = mean + a_seed + b_problem + rest, so the mean's variance
    is var(a) / S + var(b) / P + var(rest) / (S P). The variance of the seeds' means over S holds
    the first and the last of these, that of the problems' means over P the last two. Degrees of
    freedom after Satterthwaite, Student's t after Wallace. One seed: problems alone.
    """
    values = np.asarray(values, float)
    problems, more = values.shape[1], max(1, len(values) - 1)  # seeds - 1
    mean, by_problem = values.mean((0, 1)), values.mean(0).var(0, ddof=1) / problems
    by_seed = values.mean(1).var(0) / more
    rest = values - values.mean(0) - values.mean(1)[:, None] + mean
    rest = (rest**2).mean((0, 1)) / (more * (problems - 1))
    variance = np.maximum(by_seed + by_problem - rest, np.maximum(by_seed, by_problem)) + 1e-12
    freedom = variance**2 / (by_seed**2 / more + by_problem**2 / (problems - 1) + 1e-24)
    z = 1.96 * (8 * freedom + 3) / (8 * freedom + 1)
    return mean, np.sqrt(variance * freedom * np.expm1(z**2 / freedom))


def pass_curve(row):
    """pass@k of each problem for k = 1, 2, 4 ... S: [P, log2 S + 1].
    pass@k = 1 - prod_{i<k} (S - c - i) / (S - i); with lattices: of whole lattices of k."""
    count = row["evaluation"]["traces"]
    sizes = 2 ** np.arange(count.bit_length())
    if row["lattice"]:
        return np.transpose([*row["hits"].values()]) * sizes / count
    wrong, i = count - np.array(row["right"])[:, None], np.arange(count)
    return 1 - np.cumprod(np.clip((wrong - i) / (count - i), 0, 1), axis=1)[:, sizes - 1]


def factor(ours, theirs, k):
    """How many times more traces they need for their pass@k, and its interval, as text; curves
    [seeds, problems, log2 S + 1]. With k' traces we have as much, on straight lines over log k; the
    error of log k' is that of the difference of the two pass rates over the slope of ours."""
    theirs, curve = theirs[..., k.bit_length() - 1], ours.mean((0, 1))
    i = int(np.argmax(curve >= theirs.mean()))  # k' is between 2^(i - 1) and 2^i
    if i == 0:
        return "-"
    slope = curve[i] - curve[i - 1]
    weight = (theirs.mean() - curve[i - 1]) / slope
    level = (1 - weight) * ours[..., i - 1] + weight * ours[..., i]  # ours at k'
    log, half = np.log2(k) - (i - 1 + weight), interval(level - theirs)[1] / slope
    return "{:.2f} ({:.2f} to {:.2f})".format(*np.exp2([log, log - half, log + half]))


# ---- Tables --------------------------------------------------------------------------------------


def load(setting="short", tokens="1000000"):
    """{run: {seed: row}} after a budget of so many tokens, with the options of the run's first."""
    runs = {}
    for row in read(RESULTS / "evaluation.jsonl"):
        if row["setting"] == setting and str(row["tokens"]) in ("0", tokens):
            alike = runs.setdefault(row["run"], {})
            if all(other["options"] == row["options"] for other in alike.values()):
                alike[row["seed"]] = row
    return runs


def recursion(row):
    """Accuracy of each problem's population, by step: [P, steps + 1]."""
    return np.mean(row["rsa"], 0).T / row["population"]


def measures(row):
    """{name: [P]} of a row."""
    steps, passed = recursion(row).T, pass_curve(row)
    found = {f"pass@{2**i}": passed[:, i] for i in (0, 4, 6)}
    found |= {"one aggregation of 4": steps[1], f"recursion, {len(steps) - 1} steps": steps[-1]}
    return found | {"the same, then a vote": np.mean(row["votes"], 0)[-1]}


def paired(runs, names, of):
    """of(row) of the seeds that all of the named runs have: an array [seeds, P, ...] for each."""
    seeds = sorted(set.intersection(*(set(runs[name]) for name in names)))
    return [np.array([of(runs[name][seed]) for seed in seeds]) for name in names]


def markdown(*rows):
    return "\n".join(
        f"| {' | '.join(row)} |" for row in (rows[0], ["---"] * len(rows[0]), *rows[1:])
    )


def study_table(name, *which):
    runs = load(*which)
    singles, pairs = TABLES[name]
    columns = []
    for names in [*((single,) for single in singles), *pairs]:
        if not runs.keys() >= set(names):
            continue
        sides = paired(runs, names, measures)
        column = {"(seeds)": f"{' − '.join(names)} ({len(sides[0])})"}
        for key in sides[0][0]:
            values = [np.array([row[key] for row in side]) for side in sides]
            mean, half = interval(values[0] - sum(values[1:]))
            column[key] = f"{mean:{'+' * len(values[1:])}.3f} ± {half:.3f}"
        for k in () if singles else (16, 64):
            text = factor(*paired(runs, names, pass_curve), k)
            column[f"traces the second needs for its pass@{k}, over the first's"] = text
        columns.append(column)
    return markdown(*([key, *(column[key] for column in columns)] for key in columns[0]))


def runs_table(folders):
    """Scores before and after, in the mean over runs of one command, and the change of each."""
    runs = [read(folder / "evaluation.jsonl")[-2:] for folder in folders]
    runs = [sorted(rows, key=lambda row: row["policy"] != "start") for rows in runs]
    lines = [["held-out", "before", "after", "change", *(folder.name for folder in folders)]]
    for key in [key for key in runs[0][0] if key not in ("policy", "step", "split", "problems")]:
        values = np.array([[row[key] for row in run] for run in runs])  # [runs, 2]
        changes = np.diff(values)[:, 0]
        lines.append([key, *(f"{mean:.3f}" for mean in values.mean(0))])
        lines[-1] += [f"{change:+.3f}" for change in (changes.mean(), *changes)]
    return markdown(*lines)


def noise_of_credits():
    """{credit: (value, low, high) of noise, cosine, tokens / 1000}, by the bootstrap over problems.
    Moments a problem: E|g|^2, E g . E g, E g . t with the true gradient t, t . t. Noise is variance
    over signal, (sum E g . t)^2 / sum t . t: problems' gradients are blocks of one long vector.
    Problems of "start, seed 1" are more of "start"."""
    found, every = {}, {}
    for policy, entry in json.loads(NOISE.read_text()).items():
        for name, rows in entry["credits"].items():
            moments = every.setdefault(f"{policy.split(',')[0]}: {name}", [])
            moments += [[*row, entry["tokens"]] for row in rows]
    for name, moments in every.items():
        count = len(moments)
        picks = np.random.default_rng(0).integers(count, size=(2000, count))
        picks[0] = np.arange(count)  # all problems once: the value itself
        second, mean, along, true, tokens = np.moveaxis(np.array(moments)[picks].mean(1), -1, 0)
        noise = (second - mean) * true / along**2
        values = noise, along / np.sqrt(mean * true), noise * tokens / 1000
        found[name] = [(value[0], *np.percentile(value, [2.5, 97.5])) for value in values]
    return found


def noise_table():
    lines = [["credit", "noise", "cosine with the true gradient", NEEDED]]
    for name, values in noise_of_credits().items():
        lines.append([name, *("{:.3g} ({:.3g} to {:.3g})".format(*value) for value in values)])
    return markdown(*lines)


def table(words):
    """The table of that name, or of folders of runs."""
    if words == ["noise"]:
        return noise_table()
    return study_table(*words) if words[0] in TABLES else runs_table([Path(word) for word in words])


def fill(text):
    """The tables between <!-- table: WORDS --> and <!-- /table --> anew."""
    pattern = r"(<!-- table: (.*?) -->\n).*?(<!-- /table -->)"
    return re.sub(pattern, lambda m: f"{m[1]}{table(m[2].split())}\n{m[3]}", text, flags=re.S)


# ---- Figures -------------------------------------------------------------------------------------


def finish(figure, path):
    for axis in figure.axes:
        axis.grid(alpha=0.3)
    figure.axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=110)


def draw_study():
    """pass@k and recursion by step of all rivals, and the noise of each credit."""
    runs, noise = load(), noise_of_credits()
    figure, axes = plt.subplots(1, 3, figsize=(15, 4), layout="constrained")
    axes[0].set(title="pass@k of traces", xlabel="log2 k")
    axes[1].set(title="recursive self-aggregation, accuracy", xlabel="step")
    axes[2].set(title=NEEDED, xscale="log")
    for run in [run for run in RIVALS if run in runs]:
        for axis, of in zip(axes, (pass_curve, recursion), strict=False):
            mean, half = interval(*paired(runs, [run], of))
            axis.plot(mean, label=run)
            axis.fill_between(range(len(mean)), mean - half, mean + half, alpha=0.15)
    value, low, high = np.transpose([tokens for _, _, tokens in noise.values()])
    axes[2].errorbar(value, [*noise], xerr=[value - low, high - value], fmt="o")
    ticks = 3, 10, 30, 100
    axes[2].set_xticks(ticks, ticks)
    axes[2].minorticks_off()
    finish(figure, RESULTS / "study.png")


def draw_training(folders, path):
    """Means over 5 steps. The response curve is n + 1 lines: the aggregator's accuracy with 0 to n
    right candidates."""
    figure, axes = plt.subplots(2, 3, figsize=(12, 6), layout="constrained")
    for axis, metric in zip(axes.flat, METRICS, strict=True):
        axis.set_title(metric)
        for i, folder in enumerate(folders):
            rows = read(folder / "metrics.jsonl")
            values = [functools.reduce(dict.get, metric.split(), row) for row in rows]
            means = [np.mean(values[max(0, j - 4) : j + 1], 0) for j in range(len(values))]
            axis.plot(means, color=f"C{i}", label=folder.name)
    finish(figure, path)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="*", type=Path, help="folders of runs; none: the study")
    parser.add_argument("--table", nargs="+", help=f"of {', '.join(TABLES)}, noise; or folders")
    parser.add_argument("--fill", nargs="+", type=Path, default=[])
    args = parser.parse_args()
    if args.table:
        print(table(args.table))
    for path in args.fill:
        path.write_text(fill(path.read_text()))
    if args.runs:
        draw_training(args.runs, "curves.png")
    elif not args.table and not args.fill:
        draw_study()
        draw_training(sorted(RESULTS.glob("short-*-0-*")), RESULTS / "training.png")


if __name__ == "__main__":
    main()
