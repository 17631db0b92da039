"""One whole SPIRAL step on a model of a given shape with random weights: seconds, tokens/s and peak memory of each phase.

    python experiments/whole_step.py                                   # with a GPU: Qwen3-0.6B and 4B at the paper's sizes; else a toy
    python experiments/whole_step.py --shape 4B --problems 8 --tokens 2048 --lora-rank 32

Nothing is downloaded: shapes are those of the public configs. Completions end by a bias on EOS, so that lengths are geometric, and are
cut at --tokens; the reward is a coin. Writes experiments/results/whole_step_{cpu,cuda}.json with the machine's name.
"""

import argparse
import json
import os
import platform
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]
import bench  # noqa: E402
import spiral  # noqa: E402

SHAPES = {"tiny": bench.TINY, **bench.QWEN}


class Letters:
    """A tokenizer of a character for each token of any vocabulary, so that a trace of n tokens is n tokens in an aggregation prompt."""
    markers = ()

    def __init__(self, eos_id):
        self.eos_id, self.eos_ids = eos_id, [eos_id]

    def encode(self, text):
        return [(ord(c) - 0xE000) % self.eos_id if ord(c) >= 0xE000 else ord(c) % self.eos_id for c in text]

    chat = encode

    def decode(self, tokens):
        return "".join(chr(t + 0xE000) for t in tokens if t != self.eos_id)


class Coin:
    """Problems of 200 tokens, rewards by a coin."""

    def prompt(self, problem):
        return chr(0xE000 + problem % 200) * 200

    def answer(self, text):
        return text[-1:] or None

    def reward(self, problem, text):
        return float(sum(map(ord, text[-3:])) % 2)


def measure(shape, config, device, dtype):
    """{phase: {"seconds", "peak_GiB", ...}} of the second of two steps; the first compiles, captures and allocates."""
    policy = bench.random_policy(SimpleNamespace(device=device, dtype=dtype), SHAPES[shape], config.max_trace_tokens // 3)
    policy.tokenizer, policy.graphs = Letters(policy.tokenizer.eos_id), device.type == "cuda"
    if config.lora_rank:
        from peft import LoraConfig
        policy.model.add_adapter(LoraConfig(r=config.lora_rank, lora_alpha=2 * config.lora_rank, target_modules="all-linear"))
        for name, parameter in policy.model.named_parameters():
            parameter.requires_grad = "lora_" in name
    if config.gradient_checkpointing:
        getattr(policy.model, "activation_checkpointing_enable", policy.model.gradient_checkpointing_enable)({"use_reentrant": False})
    optimizer, phases, plain = spiral.make_optimizer(policy.model, config), {}, spiral.sample
    cuda = device.type == "cuda"

    def timed(name, function):
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        began, result = time.perf_counter(), function()
        if cuda:
            torch.cuda.synchronize()
        phases[name] = {"seconds": time.perf_counter() - began}
        if cuda:                                             # device: the allocator's reserve, graphs and their scratch memory too
            free, total = torch.cuda.mem_get_info(device)
            phases[name] |= {"peak_GiB": torch.cuda.max_memory_allocated() / 2 ** 30, "device_GiB": (total - free) / 2 ** 30}
        return result

    def sample(policy, prompts, limit, *rest):
        name = "search" if len(prompts) == config.problems else "aggregation"
        samples = timed(name, lambda: plain(policy, prompts, limit, *rest))
        count = int(samples.mask.sum())
        phases[name] |= {"tokens": count, "prompt_tokens": sum(map(len, prompts)), "tokens_per_s": count / phases[name]["seconds"]}
        return samples

    spiral.sample = sample
    try:
        for step in range(2):
            generators = [torch.Generator().manual_seed(100 * step + i) for i in range(config.problems)]
            records = spiral.rollout(policy, Coin(), list(range(config.problems)), config, generators)
            groups = [group for record in records for group in record["groups"]]
            stats = timed("update", lambda: spiral.update(policy, optimizer, groups, config.problems, config))          # noqa: B023
            phases["update"] |= {"trained_tokens": stats["trained_tokens"], "tokens_per_s": stats["trained_tokens"] / phases["update"]["seconds"],
                                 "logprob_difference": stats["logprob_difference"]}
            print({name: {key: round(value, 6) for key, value in row.items()} for name, row in phases.items()}, flush=True)
    finally:
        spiral.sample = plain
    return {"parameters": sum(p.numel() for p in policy.model.parameters()), "cuda_graphs": policy.graphs, "phases": phases}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, help="default: 0.6B and 4B with a GPU, else tiny")
    parser.add_argument("--problems", type=int, default=0, help="default: 16 with a GPU, else 4")
    parser.add_argument("--tokens", type=int, default=0, help="longest trace and aggregation; default: 4096 with a GPU, else 64")
    parser.add_argument("--lora-rank", type=int, default=None, help="default: 32 with a GPU, else 0")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    device = spiral.pick_device(args.device)
    cuda = device.type == "cuda"
    tokens, rows = args.tokens or (4096 if cuda else 64), []
    config = spiral.Config(problems=args.problems or (16 if cuda else 4), max_trace_tokens=tokens, max_aggregation_tokens=tokens, max_prompt_tokens=4 * tokens + 1024,
                           lora_rank=(32 if cuda else 0) if args.lora_rank is None else args.lora_rank, gradient_checkpointing=cuda and tokens > 1024, device=args.device)
    for shape in [args.shape] if args.shape else ("0.6B", "4B") if cuda else ("tiny",):
        rows.append({"shape": shape, **{name: getattr(config, name) for name in ("problems", "num_traces", "set_size", "num_sets", "num_aggregations", "max_trace_tokens",
                     "max_prompt_tokens", "lora_rank", "gradient_checkpointing")}, **measure(shape, config, device, torch.bfloat16 if cuda else torch.float32)})
    machine = {"device": torch.cuda.get_device_name() if cuda else f"{platform.machine()} CPU, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
               "load": os.getloadavg()[0], "torch": torch.__version__, "date": time.strftime("%Y-%m-%d")}
    out = Path(__file__).resolve().parent / "results" / f"whole_step_{device.type}.json"
    out.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")
    print(out)


if __name__ == "__main__":
    main()
