"""Make the tiny policy's warm start: imitate noisy, machine-written traces and aggregations (tasks.py writes them).

    python experiments/warm_start.py

remakes experiments/tiny, about an hour on one idle core. The demonstrations are skilful at first, so that the policy learns
arithmetic, search and audit; in the last quarter of --steps they are as clumsy as the starting point that reinforcement
learning wants: room to improve in both roles.
"""

import argparse
import math
import random
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, Qwen3Config

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import spiral  # noqa: E402
import tasks  # noqa: E402

MIX = {"countdown:max_target=100": 0.75, "countdown:numbers=4,max_target=100": 0.1, "arithmetic": 0.15}


def tiny_config(tokenizer):
    """1.0M parameters, Qwen3-style."""
    return Qwen3Config(vocab_size=tokenizer.size, hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4,
                       num_key_value_heads=4, head_dim=32, max_position_embeddings=2048, tie_word_embeddings=True,
                       rope_parameters={"rope_type": "default", "rope_theta": 10000.0}, spiral_tokenizer="tiny",
                       bos_token_id=None, eos_token_id=tokenizer.eos_id, pad_token_id=tokenizer.eos_id)


def document(task, pool, tokenizer, rng, role, skill, noise):
    """One demonstration: (tokens, weight of each in the loss). The problem has weight 0, candidates 0.3, what the role writes 1."""
    problem = rng.choice(pool)
    countdown = isinstance(task, tasks.Countdown)
    prompt = task.prompt(problem)
    start = tokenizer.chat(prompt)
    if role == "search":
        text, read = task.trace(problem, rng, **({"skill": skill} if countdown else {})), start
    else:
        options = {"skill": rng.random() * skill} if countdown else {"slip": rng.random() * 0.5}
        attempts = lambda count: [task.trace(problem, rng, **options) for _ in range(count)]          # noqa: E731
        count = rng.choice((4, 4, 4, 4, 2, 3, 6))
        recursive = rng.random() < 0.4                  # candidates that are aggregations themselves
        traces = [task.aggregation(problem, attempts(4), rng, noise) for _ in range(count)] if recursive else attempts(count)
        text, read = task.aggregation(problem, traces, rng, noise), spiral.aggregation_prompt(tokenizer, prompt, traces)
    written = tokenizer.encode(text) + [tokenizer.eos_id]
    known = min(len(start) + 1, len(read))              # the first candidate's marker too: a search trace must not begin with it
    return read + written, [0.0] * known + [0.3] * (len(read) - known) + [1.0] * len(written)


def loss_of(model, documents, total):
    length = max(len(tokens) for tokens, _ in documents)
    tokens = torch.tensor([t + [0] * (length - len(t)) for t, _ in documents])
    weights = torch.tensor([w + [0.0] * (length - len(w)) for _, w in documents])[:, 1:]
    logits = model(tokens, use_cache=False).logits[:, :-1]    # right padding needs no mask under causal attention
    losses = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    return (losses * weights.flatten()).sum() / total


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2200)
    parser.add_argument("--start", type=int, default=0, help="go on at this step, from the weights in --out")
    parser.add_argument("--stop", type=int, default=0, help="end after this step of the schedule; 0: at its end")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--skill", type=float, nargs=2, default=(0.6, 0.3), help="share of attempts that are solutions: before, at the end")
    parser.add_argument("--noise", type=float, nargs=2, default=(0.05, 0.15), help="share of wrong verdicts in audits: before, at the end")
    parser.add_argument("--out", default=str(Path(__file__).parent / "tiny"))
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    tokenizer, rng = spiral.TinyTokenizer(), random.Random(args.start)
    if args.start:
        model = AutoModelForCausalLM.from_pretrained(args.out, dtype=torch.float32)
    else:
        model = AutoModelForCausalLM.from_config(tiny_config(tokenizer), dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.01)
    pools = {tasks.make_task(name): tasks.make_task(name).problems("train", 20000, 0) for name in MIX}
    began, running = time.time(), None
    for step in range(args.start + 1, args.steps + 1):
        late = step > 0.75 * args.steps
        documents = []
        for role, count in (("search", 64), ("aggregation", 24)):
            for task in rng.choices(list(pools), list(MIX.values()), k=count):
                documents.append(document(task, pools[task], tokenizer, rng, role, args.skill[late], args.noise[late]))
        documents.sort(key=lambda d: len(d[0]))
        total = sum(sum(weights) for _, weights in documents)
        lr = args.lr * min(1, (step - args.start) / 100) * (0.05 + 0.95 * (1 + math.cos(math.pi * step / args.steps)) / 2)
        for group in optimizer.param_groups:
            group["lr"] = lr
        loss = 0.0
        for part in (documents[:48], documents[48:72], documents[72:]):
            value = loss_of(model, part, total)
            value.backward()
            loss += value.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        running = loss if running is None else 0.98 * running + 0.02 * loss
        if step % 50 == 0 or step == args.steps:
            print(f"step {step}/{args.steps}  loss {running:.4f}  lr {lr:.1e}  {time.time() - began:.0f}s", flush=True)
        if step % 250 == 0 or step in (args.steps, args.stop):
            half = AutoModelForCausalLM.from_config(model.config, dtype=torch.float16)      # 2 MB
            half.load_state_dict(model.state_dict())
            half.save_pretrained(args.out)
        if step == args.stop:
            break


if __name__ == "__main__":
    main()
