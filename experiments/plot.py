"""One command makes every figure and every table of the pages, from the raw rows in results/.

    python experiments/plot.py                                  # all figures, all pages
    python experiments/plot.py --table levels short 1000000     # prints one table (tables.py)
    python experiments/plot.py --fill experiments/STUDY.md      # only the tables of this page
    python experiments/plot.py --version 2 --table levels short 2000000     # of newer rows
    python experiments/plot.py runs/A runs/B                    # curves of any runs, to curves.png

The figures are made for a page 700 pixels wide. Shaded bands and error bars are 95% intervals.
"""

import argparse
from pathlib import Path

import matplotlib
import rows as raw
import tables

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402

HERE = Path(__file__).resolve().parent
FIGURES = HERE / "figures"
PAGES = [HERE.parent / "README.md", *sorted(HERE.glob("*.md")), raw.RESULTS / "README.md"]

# The lines of a figure: name of the run, its label there, its colour.
LINES = (
    ("base", "untrained", "#777777"),
    ("grpo", "GRPO", "#d95f02"),
    ("trace", "GRPO on both roles", "#1b9e77"),
    ("set", "SPIRAL", "#1f4fbf"),
)
STYLE = {
    "font.size": 13,
    "axes.titlesize": 14,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "figure.constrained_layout.use": True,
    "savefig.dpi": 150,
}


def save(figure, name):
    FIGURES.mkdir(exist_ok=True)
    figure.savefig(FIGURES / name, metadata={"Software": None})
    plt.close(figure)


def spread(heights, gap):
    """Heights of labels, pushed apart until no two are nearer to each other than `gap`."""
    order = np.argsort(heights)
    spread_out = np.array(heights, float)
    for _ in range(100):
        for lower, upper in zip(order[:-1], order[1:], strict=True):
            overlap = gap - (spread_out[upper] - spread_out[lower])
            if overlap > 0:
                spread_out[lower] -= overlap / 2
                spread_out[upper] += overlap / 2
    return spread_out


def draw_lines(axis, measure, label_gap):
    """One line for each run of LINES over measure(row), labelled at its right end."""
    runs = raw.load_runs()
    ends = []
    for name, _, colour in LINES:
        (values,) = raw.paired(runs, names=[name], measure=measure)
        mean, half = raw.interval(values)
        steps = np.arange(len(mean))
        axis.plot(steps, mean, color=colour, linewidth=2.5)
        axis.fill_between(steps, mean - half, mean + half, color=colour, alpha=0.12, linewidth=0)
        ends.append(mean[-1])

    heights = spread(ends, label_gap)
    for (_, label, colour), height in zip(LINES, heights, strict=True):
        axis.annotate(
            label,
            xy=(len(steps) - 1, height),
            xytext=(8, 0),
            textcoords="offset points",
            color=colour,
            verticalalignment="center",
            annotation_clip=False,
        )
    return steps


def draw_pass_at_k():
    """How many problems have a right trace among k of them."""
    figure, axis = plt.subplots(figsize=(7, 4.4))
    steps = draw_lines(axis, measure=raw.pass_curve, label_gap=0.05)
    axis.set_xticks(steps, 2**steps)
    axis.set_xlabel("k, the number of traces of a problem")
    axis.set_ylabel("problems with a right trace")
    axis.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1, decimals=0))
    axis.set_title("Is one of k traces right? (pass@k)")
    save(figure, "pass_at_k.png")


def draw_vote():
    """The vote of a population of 8 answers, after each step of aggregation."""
    figure, axis = plt.subplots(figsize=(7, 4.4))
    steps = draw_lines(axis, measure=raw.vote_curve, label_gap=0.03)
    axis.set_xticks(steps)
    axis.set_xlabel("steps of aggregation (0: a vote of 8 traces)")
    axis.set_ylabel("problems where the vote is right")
    axis.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1, decimals=0))
    axis.set_title("A vote of 8 answers, after aggregating them again and again")
    save(figure, "vote.png")


NOISE_BARS = {
    "set, K=4 N2=4": "set credit (the paper's)",
    "set, K=8 N2=2": "set credit, more sets",
    "pass@4": "pass credit",
    "trace": "trace credit",
    "curve": "curve credit",
}


def draw_noise():
    """Tokens until a credit's signal equals its noise, before and after training."""
    found = raw.noise_of_credits()
    figure, axis = plt.subplots(figsize=(7, 4.4))
    height = 0.38
    policies = {"start": ("untrained", "#1f4fbf"), "after training": ("trained", "#9db8ef")}
    for number, (policy, (label, colour)) in enumerate(policies.items()):
        for position, credit in enumerate(NOISE_BARS):
            measured = found[policy, credit]
            value, low, high = measured["thousand tokens"]
            cosine = measured["cosine with the true gradient"][0]
            axis.barh(
                position + (number - 0.5) * height,
                value,
                height=height,
                color=colour,
                xerr=[[value - low], [high - value]],
                error_kw={"ecolor": "#444444", "elinewidth": 1, "capsize": 2},
                label=label if position == 0 else None,
            )
            axis.annotate(
                f"{value:.0f}   cosine {cosine:.2f}",
                xy=(high, position + (number - 0.5) * height),
                xytext=(6, 0),
                textcoords="offset points",
                verticalalignment="center",
                fontsize=11,
            )
    axis.set_yticks(range(len(NOISE_BARS)), NOISE_BARS.values())
    axis.invert_yaxis()
    axis.grid(axis="y", visible=False)
    axis.set_xlim(0, 122)
    axis.set_xlabel("thousand sampled tokens")
    title = "Tokens until a credit's signal equals its noise"
    figure.suptitle(title, x=0.01, horizontalalignment="left")
    axis.legend(loc="lower right", title="measured on the policy", frameon=False)
    save(figure, "noise.png")


REAL_MODEL_LABELS = {
    "base": "untrained",
    "grpo": "GRPO",
    "none": "SPIRAL, no search credit",
    "trace": "SPIRAL, trace credit",
    "set": "SPIRAL, set credit",
    "pass": "SPIRAL, pass credit",
    "curve": "SPIRAL, curve credit",
}


def draw_real_model():
    """For every seed a pair of dots: one trace, and one answer that has read four."""
    scores = tables.real_model_scores()
    figure, axis = plt.subplots(figsize=(7, 4.4))
    names = [name for name in REAL_MODEL_LABELS if name in scores]
    for position, name in enumerate(names):
        for number, seed in enumerate(scores[name]):
            height = position + 0.2 * (number - 1)
            pair = seed["pass@1"], seed["aggregate@4"]
            axis.plot(pair, (height, height), color="#999999", linewidth=1, zorder=1)
            first = position == 0 and number == 0
            labels = ("one trace", "one aggregation of four traces") if first else (None, None)
            for value, colour, label in zip(pair, ("#d95f02", "#1f4fbf"), labels, strict=True):
                axis.scatter(value, height, color=colour, s=36, zorder=2, label=label)
    axis.set_yticks(range(len(names)), [REAL_MODEL_LABELS[name] for name in names])
    axis.invert_yaxis()
    axis.set_xlim(0, 0.75)
    axis.xaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1, decimals=0))
    axis.set_xlabel("right answers, one pair of dots for each seed")
    figure.suptitle("SmolLM2-135M learns arithmetic", x=0.01, horizontalalignment="left")
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    save(figure, "real_model.png")


# ---- Curves of any runs --------------------------------------------------------------------------

CURVES = {
    "reward of traces": ("search", "reward"),
    "entropy of traces": ("search", "entropy"),
    "tokens a trace": ("search", "length"),
    "reward of aggregations": ("aggregation", "reward"),
    "gradient norm": ("grad_norm",),
    "aggregations cut off": ("aggregation", "truncated"),
}


def draw_curves(folders, path):
    """metrics.jsonl of any runs, as running means over five steps."""
    figure, axes = plt.subplots(2, 3, figsize=(14, 7))
    for axis, (title, keys) in zip(axes.flat, CURVES.items(), strict=True):
        axis.set_title(title)
        axis.set_xlabel("step")
        for number, folder in enumerate(folders):
            values = []
            for row in raw.read_rows(folder / "metrics.jsonl"):
                value = row
                for key in keys:
                    value = value[key]
                values.append(value)
            means = [np.mean(values[max(0, i - 4) : i + 1], axis=0) for i in range(len(values))]
            lines = axis.plot(means, color=f"C{number}")
            lines[0].set_label(folder.name)
    axes.flat[0].legend(fontsize=9)
    figure.savefig(path)
    plt.close(figure)


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="*", type=Path, help="folders of runs, for their curves")
    parser.add_argument("--table", nargs="+", metavar="WORD", help="print this table")
    parser.add_argument("--fill", nargs="+", type=Path, default=[], metavar="PAGE")
    parser.add_argument("--version", type=int, help="of rows; default: that of the pages")
    parser.add_argument("--split", default=raw.SHOWN_SPLIT, help="of the problems: validation")
    args = parser.parse_args(arguments)
    if args.version:
        raw.SHOWN_VERSION = args.version
    raw.SHOWN_SPLIT = args.split
    plt.rcParams.update(STYLE)
    if args.table:
        print(tables.table(args.table))
    elif args.runs:
        draw_curves(args.runs, "curves.png")
    else:
        if not args.fill:
            draw_pass_at_k()
            draw_vote()
            draw_noise()
            draw_real_model()
        for page in args.fill or PAGES:
            page.write_text(tables.fill(page.read_text()))


if __name__ == "__main__":
    main()
