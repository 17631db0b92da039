"""The table and the training curves of one or several runs, from their files alone (also while they go on).

    python experiments/plot.py runs/spiral-countdown-0 runs/grpo-countdown-0 --out curves.png
"""

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

CURVES = (("answer_reward", "reward of the final answer"), ("trace_reward", "reward of the traces"), ("search_entropy", "entropy of search (nats a token)"),
          ("search_length", "length of a trace (tokens)"), ("useful", "problems with an advantage"), ("grad_norm", "gradient norm"))


def read(path):
    """Rows of a JSONL file; a last line that is still being written is left out."""
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def smooth(values, window=5):
    return [sum(values[max(0, i - window + 1):i + 1]) / len(values[max(0, i - window + 1):i + 1]) for i in range(len(values))]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--out", default="curves.png")
    args = parser.parse_args()
    figure, axes = plt.subplots(2, 3, figsize=(12, 6), layout="constrained")
    for run in args.runs:
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
    figure.savefig(args.out, dpi=130)
    print(f"drawn to {args.out}")


if __name__ == "__main__":
    main()
