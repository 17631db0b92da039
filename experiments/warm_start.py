"""Make the tiny policy's warm start: imitate noisy, machine-written traces and aggregations.

    python experiments/warm_start.py --out tiny

remakes the shipped weights in about an hour of one idle core. The demonstrations are skilful first,
to teach arithmetic, search and audit; in the last quarter of the steps they are as clumsy as the
start that reinforcement learning wants, with room to improve in both roles.
"""

import argparse
import math
import random
import sys
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import spiral  # noqa: E402
import tasks  # noqa: E402

TINY = Path(__file__).resolve().parents[1] / "tiny"  # its config.json describes the model
MIX = {"countdown:max_target=100": 75, "countdown:numbers=4,max_target=100": 10, "arithmetic": 15}
SKILL, NOISE = (0.6, 0.3), (0.05, 0.15)  # before, at the end: of attempts, and of wrong verdicts


def countdown_trace(task, problem, rng, skill):
    """Up to 3 attempts, each checked. `skill`: chance that an attempt is a solution. One in ten of
    the wrong ones is bent to fit (its last result, or the numbers) and believed."""
    text, target = "", problem["target"]
    for _ in range(rng.randint(1, 3)):
        steps, expression, value = problem["steps"], problem["solution"], target
        if rng.random() >= skill:
            numbers, bent = list(problem["numbers"]), rng.random() < 0.1
            if bent and rng.random() < 0.5:
                numbers[rng.randrange(len(numbers))] = rng.choice(numbers)
            steps, expression, value = task.attempt(numbers, rng)
            if bent:
                steps = [*steps[:-1], f"{steps[-1].split('=')[0]}={target}"]
                value = target
        text += ", ".join(steps) + (tasks.YES if value == target else tasks.NO)
        if value == target:
            return text + tasks.ANSWER + expression
    return text + tasks.ANSWER + "none"


def arithmetic_trace(task, problem, rng, slip):
    """Work through the steps, each wrong with probability `slip`, until two attempts agree."""
    text, results = "", []
    for _ in range(rng.randint(1, 3)):
        steps, believed = [], {}  # what this attempt believes each true result to be
        for a, operator, b in problem["steps"]:
            true = tasks.apply(a, operator, b, task.max_value)
            x, y = believed.get(a, a), believed.get(b, b)
            value = tasks.apply(x, operator, y, 999)
            value = true if value is None else value
            if rng.random() < slip:
                value = max(0, value + rng.choice((-10, -2, -1, 1, 2, 10)))
            steps.append(f"{x}{operator}{y}={value}")
            believed[true] = value
        agrees = value in results
        verdict = tasks.YES if agrees else tasks.NO if results else "\n"
        text += ", ".join(steps) + verdict
        results.append(value)
        if agrees:
            break
    return text + tasks.ANSWER + str(value)


def trace(task, problem, rng, skill=0.3, slip=0.25):
    if isinstance(task, tasks.Countdown):
        return countdown_trace(task, problem, rng, skill)
    return arithmetic_trace(task, problem, rng, slip)


def aggregation(task, problem, traces, rng, noise=0.1):
    """Audit the candidates one by one (each verdict is wrong with probability `noise`), then repeat
    the end of one that passed, or try again: the next aggregation reads this work."""
    audit, good = "", []
    for i, candidate in enumerate(traces, 1):
        passed = (task.reward(problem, candidate) > 0) != (rng.random() < noise)
        audit += f"{i}{tasks.YES if passed else tasks.NO}"
        if passed and task.answer(candidate):
            good.append(candidate)
    if good:
        return audit + "\n".join(rng.choice(good).split("\n")[-2:])
    return audit + trace(task, problem, rng)


def candidates(task, problem, rng, skill, noise):
    level, count = rng.random(), rng.choice((4, 4, 4, 4, 2, 3, 6))
    recursive = rng.random() < 0.4  # candidates that are aggregations themselves
    texts = []
    for _ in range(count):
        read = [
            trace(task, problem, rng, level * skill, level / 2)
            for _ in range(4 if recursive else 1)
        ]
        texts.append(aggregation(task, problem, read, rng, noise) if recursive else read[0])
    return texts


def document(task, problem, tokenizer, rng, role, skill, noise):
    """One demonstration: (tokens, weight of each in the loss): 0 of the problem, 0.3 of what is
    read beside it, 1 of what the role writes."""
    prompt = task.prompt(problem)
    start = read = tokenizer.chat(prompt)
    if role == "search":
        text = trace(task, problem, rng, skill)
    else:
        texts = candidates(task, problem, rng, skill, noise)
        text = aggregation(task, problem, texts, rng, noise)
        read = spiral.aggregation_prompt(tokenizer, prompt, texts)
    written = [*tokenizer.encode(text), *tokenizer.eos_ids]
    known = min(len(start) + 1, len(read))  # a search trace must not begin like a candidate
    weights = [0.0] * known + [0.3] * (len(read) - known) + [1.0] * len(written)
    return torch.tensor(read + written), torch.tensor(weights)


def loss_of(model, documents):
    tokens, weights = zip(*documents, strict=True)
    tokens = pad_sequence(tokens, batch_first=True)
    weights = pad_sequence(weights, batch_first=True)[:, 1:]
    logits = model(tokens, use_cache=False).logits[:, :-1]  # right padding needs no mask
    losses = cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    return (losses * weights.flatten()).sum()


def train_step(model, optimizer, documents):
    documents.sort(key=lambda document: len(document[0]))
    total = sum(weights.sum().item() for _, weights in documents)
    loss = 0.0
    for part in (documents[:48], documents[48:72], documents[72:]):
        value = loss_of(model, part) / total
        value.backward()
        loss += value.item()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return loss


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=2200)
    parser.add_argument("--out", default="runs/tiny")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    tokenizer, rng = tasks.TinyTokenizer(), random.Random(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(TINY), dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.01)
    pools = {task: task.problems("train", 20000, 0) for task in map(tasks.make_task, MIX)}
    for step in range(1, args.steps + 1):
        late = step > 0.75 * args.steps
        documents = []
        for role, count in (("search", 64), ("aggregation", 24)):
            for task in rng.choices(list(pools), list(MIX.values()), k=count):
                options = rng, role, SKILL[late], NOISE[late]
                documents.append(document(task, rng.choice(pools[task]), tokenizer, *options))
        cosine = 0.05 + 0.95 * (1 + math.cos(math.pi * step / args.steps)) / 2
        optimizer.param_groups[0]["lr"] = 2e-3 * min(1, step / 100) * cosine
        loss = train_step(model, optimizer, documents)
        if step % 50 == 0:
            print(f"step {step}/{args.steps}  loss {loss:.4f}")
        if step % 250 == 0 or step == args.steps:
            half = AutoModelForCausalLM.from_config(model.config, dtype=torch.float16)  # 2 MB
            half.load_state_dict(model.state_dict())
            half.save_pretrained(args.out)


if __name__ == "__main__":
    main()
