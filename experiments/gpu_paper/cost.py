"""Kernels, bytes and modelled milliseconds of a decoding step of models of real sizes on two cards.

    python experiments/gpu_paper/cost.py                # the rows of GPU.md
    python experiments/gpu_paper/cost.py --kernels      # and which kernels these are

Nothing runs: kernels and bytes are counted on fake tensors. A kernel then takes as long as its
bytes at 85% of the card's bandwidth, its products at two thirds to three quarters of the card's
peak, or 2 microseconds, whichever is longest. What fits twice into the card's L2 cache is read at
60% of the cache's bandwidth; the slower number leaves that out. Trust ratios more than times.

The bandwidth floor of a step is the time to read all weights, and the keys and values of the tokens
that are there, once, at all of the card's bandwidth."""

import sys
from collections import Counter, namedtuple
from functools import cache

from fakecuda import Meter, fake, make_policy, settings_of, size, spiral, torch

Card = namedtuple("Card", "bandwidth bf16 fp32 share cache cache_bandwidth")
CARDS = {
    "4090": Card(1.008e12, 165e12, 82e12, 0.75, 72e6, 4.5e12),
    "H200": Card(4.8e12, 990e12, 67e12, 0.65, 50e6, 10e12),
}
LAUNCH = 2e-6  # seconds that the smallest kernel of a graph takes

# prompt_tokens, new_tokens: of each prompt and row, as the graph sees them (rounded)
Step = namedtuple("Step", "model lora rows prompts prompt_tokens new_tokens num_samples")
STEPS = {
    "Qwen3-4B, aggregations": Step("qwen3-4b", 32, 24, 8, 4096, 512, 4),
    "Qwen3-4B, traces": Step("qwen3-4b", 32, 24, 4, 256, 512, 8),
    "Qwen2.5-1.5B": Step("qwen2.5-1.5b", 64, 64, 32, 512, 256, 8),
    "Qwen2.5-0.5B": Step("qwen2.5-0.5b", 0, 128, 16, 256, 512, 8),
    "tiny (fp32)": Step("tiny", 0, 512, 64, 256, 64, 8),
}


def seconds(kernel, card, cached=True):
    moved = kernel.read + kernel.written
    bandwidth = 0.85 * card.bandwidth
    if cached and 2 * moved < card.cache:
        bandwidth = 0.6 * card.cache_bandwidth
    peak = card.bf16 if "bfloat16" in kernel.dtype else card.fp32
    return max(moved / bandwidth, kernel.flops / (peak * card.share), LAUNCH)


@cache
def policy_of(model, layers, lora, dtype):
    with fake:
        settings = settings_of(model, num_hidden_layers=layers)
        return make_policy(settings, dtype, lora, gigabytes=0.001)


@cache
def kernels_of(step):
    """Counter of the kernels of a decoding step: measured with one layer and two, the rest is
    multiplication. And bytes of the floor."""
    dtype = torch.float32 if step.model == "tiny" else torch.bfloat16
    layers = settings_of(step.model).num_hidden_layers
    found, weights = [], []
    for number in (1, 2):
        policy = policy_of(step.model, number, step.lora, dtype)
        with fake, torch.no_grad():
            heads, width = policy.memory.shape[2:]
            with torch.device("cuda"):
                prompts = number, 2, step.prompts, heads, step.prompt_tokens, width
                rows = number, 2, step.rows, heads, step.new_tokens, width
                cache = spiral.Cache(
                    torch.empty(prompts, dtype=dtype),
                    torch.empty(rows, dtype=dtype),
                    step.num_samples,
                )
                integers = [torch.empty(step.rows, dtype=torch.long) for _ in range(4)]
                codes = torch.empty(step.rows, dtype=torch.float64)
            with Meter() as meter:
                spiral.decode_step(policy.model, cache, 1.0, *integers, codes)
            found.append(Counter(meter.kernels))
            weights.append(sum(size(parameter) for parameter in policy.model.parameters()))
    once, layer = found[0] - (found[1] - found[0]), found[1] - found[0]
    kernels = once.copy()
    for kernel, number in layer.items():
        kernels[kernel] += number * layers
    tokens = step.prompts * step.prompt_tokens + step.rows * step.new_tokens
    per_token = 2 * heads * width * dtype.itemsize * layers
    floor = weights[0] + (weights[1] - weights[0]) * (layers - 1) + tokens * per_token
    return kernels, floor


def step_seconds(kernels, card, cached=True):
    return sum(number * seconds(kernel, card, cached) for kernel, number in kernels.items())


def main():
    print("| a step of | kernels | GB | GB, floor | 4090 ms | of floor | H200 ms | of floor |")
    print("|---|---|---|---|---|---|---|---|")
    for name, step in STEPS.items():
        kernels, floor = kernels_of(step)
        moved = sum(number * (k.read + k.written) for k, number in kernels.items())
        cells = [name, sum(kernels.values()), f"{moved / 1e9:.1f}", f"{floor / 1e9:.1f}"]
        for card in CARDS.values():
            times = [step_seconds(kernels, card, cached) for cached in (False, True)]
            shares = [f"{floor / card.bandwidth / time:.0%}" for time in times]
            cells += ["-".join(f"{1e3 * time:.1f}" for time in times), "-".join(shares)]
        print("|", " | ".join(map(str, cells)), "|")
        if "--kernels" in sys.argv:
            show(kernels)


def show(kernels):
    """The kinds of kernels, by bytes."""
    kinds = Counter()
    for kernel, number in kernels.items():
        kinds[kernel.name] += number * (kernel.read + kernel.written)
    for kind, moved in kinds.most_common(20):
        number = sum(n for kernel, n in kernels.items() if kernel.name == kind)
        print(f"    {kind:20} {number:6} {moved / 1e9:8.2f} GB")


if __name__ == "__main__":
    main()
