"""What the presets take on a card, counted on fake tensors: weights, masters and Adam, the block of
keys and values, a decoding step, a prefill and an update pass of --micro-batch-tokens, whose
activations are those that autograd keeps. torch itself (about 0.6 GB), graphs (20 MB each) and
what lies unused between live tensors come on top: 10% and 2 GB are a fair reserve.

    python experiments/gpu_paper/memory.py
"""

import sys
from pathlib import Path

from fakecuda import Meter, fake, make_policy, settings_of, size, spiral, torch

PRESETS = Path(__file__).resolve().parent.parent.parent / "presets"
NAMES = {"Qwen2.5-0.5B": "qwen2.5-0.5b", "Qwen2.5-1.5B": "qwen2.5-1.5b", "Qwen3-4B": "qwen3-4b"}


def config_of(path):
    """Of a preset, without its comments, whether or not spiral.py reads past these."""
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    return spiral.parse_config(lines)


def update_bytes(policy, optimizer, prompt, lengths):
    """The most that a forward and backward pass of one prompt and its completions needs."""
    for master in optimizer.param_groups[0]["params"]:
        master.grad = torch.zeros_like(master)
    completions = []
    for length in lengths:
        completion = spiral.Completion(tokens=[5] * length, advantage=0.5)
        completion.logprobs = [-1.0] * length
        completions.append(completion)
    with Meter(memory=True) as meter:
        batch = [spiral.Group([3] * prompt, completions)]
        logprobs, old, advantages = spiral.completion_logprobs(policy.model, batch, 1.0)
        spiral.policy_loss(logprobs, old, advantages, 0.2).backward()
    return meter.peak


def decode_bytes(policy, rows):
    with torch.device("cuda"), torch.no_grad():
        cache = policy.memory.cut(512, 512, 8)
        rows = min(rows, cache.completions.shape[2])
        part = spiral.Cache(cache.prompts, cache.completions[:, :, :rows], 8)
        integers = [torch.empty(rows, dtype=torch.long) for _ in range(4)]
        codes = torch.empty(rows, dtype=torch.float64)
        with Meter(memory=True) as meter:
            spiral.decode_step(policy.model, part, 1.0, *integers, codes)
    return meter.peak


def prefill_bytes(policy, longest):
    number = 1 + 16_384 // longest
    with torch.no_grad(), torch.device("cuda"):
        cache = policy.memory.cut(longest, 64, 4)
        number = min(number, cache.prompts.shape[2])
        with Meter(memory=True) as meter:
            spiral.prefill(policy, [[1] * longest] * number, cache.prompts)
    return meter.peak


def main():
    paths = [Path(word) for word in sys.argv[1:]] or sorted(PRESETS.glob("qwen*.args"))
    names = "weights|masters, gradients, Adam|keys, values|decoding|prefill|update|most at once"
    print("| preset |", names.replace("|", " | "), "|")
    print("|---|---|---|---|---|---|---|---|")
    for path in paths:
        config = config_of(path)
        name = next(short for long, short in NAMES.items() if long in config.model)
        with fake:
            policy = make_policy(
                settings_of(name),
                getattr(torch, config.dtype),
                config.lora_rank,
                config.gradient_checkpointing,
                config.sampler_memory,
            )
            parameters = list(policy.model.parameters())
            weights = sum(map(size, parameters))
            trained = sum(p.numel() for p in parameters if p.requires_grad)
            masters = 16 * trained  # fp32: master, gradient, and Adam's two
            block = size(policy.memory.block)
            decoding = decode_bytes(policy, 512)
            prefill = prefill_bytes(policy, config.max_prompt_tokens)
            completion = config.max_aggregation_tokens
            budget = max(config.micro_batch_tokens, config.max_prompt_tokens + completion)
            rest = budget - config.max_prompt_tokens
            lengths = [completion] * max(1, rest // completion)
            optimizer = spiral.make_optimizer(policy.model, config.lr)
            update = update_bytes(policy, optimizer, config.max_prompt_tokens, lengths)
            traces = [config.max_trace_tokens] * (budget // config.max_trace_tokens)
            update = max(update, update_bytes(policy, optimizer, 120, traces))
        most = weights + masters + block + max(decoding, prefill, update)
        cells = [weights, masters, block, decoding, prefill, update, most]
        print(f"| {path.stem} |", " | ".join(f"{number / 1e9:.1f}" for number in cells), "|")


if __name__ == "__main__":
    main()
