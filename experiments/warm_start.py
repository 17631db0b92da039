"""Make the tiny policy: its tokenizer, and weights that imitate noisy, machine-written traces and
aggregations.

    python experiments/warm_start.py --out tiny

remakes the shipped tokenizer, and in about an hour of one idle core the weights. The demonstrations
are skilful first, to teach arithmetic, search and audit; in the last quarter of the steps they are
as clumsy as the start that reinforcement learning wants, with room to improve in both roles.
"""

import argparse
import json
import math
import random
import re
import sys
from pathlib import Path

import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers, processors
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import spiral  # noqa: E402
import tasks  # noqa: E402

TINY = Path(__file__).resolve().parents[1] / "tiny"  # its config.json describes the model
MIX = {"countdown:max_target=100": 75, "countdown:numbers=4,max_target=100": 10, "arithmetic": 15}
# Of attempts, and of wrong verdicts: through the first three quarters of the steps, and at the end.
SKILL = (0.6, 0.3)
NOISE = (0.05, 0.15)
END = "<end>"  # of a completion


# ---- The tokenizer -------------------------------------------------------------------------------


def write_tokenizer(folder):
    """Bytes, the phrases of the tasks and the integers from 10 to 999 are tokens. The markers of
    an aggregation's prompt are special tokens, so that no other text is encoded as one of them."""
    vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)}
    for text in [*tasks.PHRASES, *map(str, range(10, 1000))]:
        vocabulary[text] = len(vocabulary)
    backend = tokenizers.Tokenizer(
        models.BPE(vocabulary, [], byte_fallback=True, ignore_merges=True)
    )
    phrases = "|".join(map(re.escape, tasks.PHRASES))
    pieces = tokenizers.Regex(phrases + r"|[0-9]{1,3}|[\s\S]")
    backend.pre_tokenizer = pre_tokenizers.Split(pieces, "isolated")
    # It adds nothing. Without one transformers writes the same into each checkpoint
    backend.post_processor = processors.TemplateProcessing(single="$A", pair="$A $B:1")
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])

    markers = [spiral.CANDIDATE.format(number) for number in range(1, 17)]
    for text in [*markers, spiral.CANDIDATE_END, spiral.AGGREGATE, END]:
        token = tokenizers.AddedToken(text, normalized=False, special=True)
        backend.add_special_tokens([token])

    settings = {
        "clean_up_tokenization_spaces": False,
        "eos_token": END,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    (folder / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")


# ---- Demonstrations ------------------------------------------------------------------------------


def countdown_trace(task, problem, rng, skill):
    """Up to 3 attempts, each checked. `skill`: chance that an attempt is a solution. One in ten of
    the wrong ones is bent to fit (its last result, or the numbers) and believed."""
    target = problem["target"]
    text = ""
    for _ in range(rng.randint(1, 3)):
        steps = problem["steps"]
        expression = problem["solution"]
        value = target
        if rng.random() >= skill:
            numbers = list(problem["numbers"])
            bent = rng.random() < 0.1
            if bent and rng.random() < 0.5:
                numbers[rng.randrange(len(numbers))] = rng.choice(numbers)
            steps, expression, value = task.attempt(numbers, rng)
            if bent:
                left_side = steps[-1].split("=")[0]
                steps = [*steps[:-1], f"{left_side}={target}"]
                value = target
        text += ", ".join(steps)
        if value == target:
            return text + tasks.YES + tasks.ANSWER + expression
        text += tasks.NO
    return text + tasks.ANSWER + "none"


def arithmetic_trace(task, problem, rng, slip):
    """Work through the steps, each wrong with probability `slip`, until two attempts agree."""
    text = ""
    results = []
    for _ in range(rng.randint(1, 3)):
        steps = []
        believed = {}  # what this attempt takes each true result for
        for left, operator, right in problem["steps"]:
            true = tasks.apply(left, operator, right, task.max_value)
            believed_left = believed.get(left, left)
            believed_right = believed.get(right, right)
            value = tasks.apply(believed_left, operator, believed_right, 999)
            if value is None:
                value = true
            if rng.random() < slip:
                value = max(0, value + rng.choice((-10, -2, -1, 1, 2, 10)))
            steps.append(f"{believed_left}{operator}{believed_right}={value}")
            believed[true] = value
        text += ", ".join(steps)
        if value in results:
            text += tasks.YES
            break
        text += tasks.NO if results else "\n"  # the first has nothing to agree with
        results.append(value)
    return text + tasks.ANSWER + str(value)


def trace(task, problem, rng, skill=0.3, slip=0.25):
    if isinstance(task, tasks.Countdown):
        return countdown_trace(task, problem, rng, skill)
    return arithmetic_trace(task, problem, rng, slip)


def aggregation(task, problem, traces, rng, noise=0.1):
    """Audit the candidates one by one (each verdict is wrong with probability `noise`), then repeat
    the end of one that passed, or try again: the next aggregation reads this work."""
    audit = ""
    passed = []
    for number, candidate in enumerate(traces, 1):
        right = task.reward(problem, candidate) > 0
        wrong_verdict = rng.random() < noise
        verdict = tasks.YES if right != wrong_verdict else tasks.NO
        audit += f"{number}{verdict}"
        if verdict == tasks.YES and task.answer(candidate):
            passed.append(candidate)
    if not passed:
        return audit + trace(task, problem, rng)
    last_lines = rng.choice(passed).split("\n")[-2:]
    return audit + "\n".join(last_lines)


def candidates(task, problem, rng, skill, noise):
    """Texts that an aggregation reads: traces or, in two of five cases, aggregations of some."""
    level = rng.random()
    count = rng.choice((4, 4, 4, 4, 2, 3, 6))
    are_aggregations = rng.random() < 0.4
    texts = []
    for _ in range(count):
        num_traces = 4 if are_aggregations else 1
        traces = [trace(task, problem, rng, level * skill, level / 2) for _ in range(num_traces)]
        if are_aggregations:
            texts.append(aggregation(task, problem, traces, rng, noise))
        else:
            texts += traces
    return texts


def document(task, problem, tokenizer, rng, role, skill, noise):
    """One demonstration: (tokens, weight of each in the loss): 0 of the problem, 0.3 of what is
    read beside it, 1 of what the role writes."""
    prompt = task.prompt(problem)
    start = tokenizer.chat(prompt)
    read = start
    if role == "search":
        text = trace(task, problem, rng, skill)
    else:
        texts = candidates(task, problem, rng, skill, noise)
        text = aggregation(task, problem, texts, rng, noise)
        read = spiral.aggregation_prompt(tokenizer, prompt, texts, max_tokens=10**6)
    written = [*tokenizer.encode(text), *tokenizer.eos_ids]
    known = min(len(start) + 1, len(read))  # a search trace must not begin like a candidate
    weights = [0.0] * known + [0.3] * (len(read) - known) + [1.0] * len(written)
    return torch.tensor(read + written), torch.tensor(weights)


# ---- Training ------------------------------------------------------------------------------------


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
    for part in filter(None, (documents[:48], documents[48:72], documents[72:])):
        value = loss_of(model, part) / total
        value.backward()
        loss += value.item()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return loss


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=2200)
    parser.add_argument("--pool", type=int, default=20_000, help="problems of each task")
    parser.add_argument(
        "--documents",
        type=int,
        nargs=2,
        default=(64, 24),
        help="of a step: of search, of aggregation",
    )
    parser.add_argument("--out", type=Path, default=Path("runs/tiny"))
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    write_tokenizer(args.out)
    tokenizer = spiral.Tokenizer(args.out)
    rng = random.Random(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(TINY), dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.01)
    pools = {}  # problems of each task
    for name in MIX:
        task = tasks.make_task(name)
        pools[task] = task.problems("train", args.pool, 0)
    for step in range(1, args.steps + 1):
        late = step > 0.75 * args.steps
        documents = []
        for role, count in zip(("search", "aggregation"), args.documents):
            for task in rng.choices(list(pools), list(MIX.values()), k=count):
                problem = rng.choice(pools[task])
                documents.append(
                    document(task, problem, tokenizer, rng, role, SKILL[late], NOISE[late])
                )
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
