"""What a run needs: parameters, tokens a step, memory by part, and whether it fits. Reads the model's config.json, loads no weights.

    python spiral.py --model Qwen/Qwen3-4B-Instruct-2507 --preset paper --dry-run        # with the options of the run

The formula, for one process (P parameters, of which T are trained; b bytes a weight):

    weights            b P                       (and b T for adapters)
                       under torchrun with --shard, of what is in the layers only the share of one process, and one layer whole
    gradients, AdamW   12 T in fp32; 18 T in bf16 (2 and 4 for the gradient, 4 for the fp32 copy, 8 for AdamW); with --shard the share too
    update             tokens of the largest micro-batch x layers x what a layer keeps for the backward pass:
                       b (5 q + 5 kv + 4 f) + (8 + 4 b) d, for q = heads x width, kv = key-value heads x width, f feed-forward, d hidden
                       (counted on Qwen3; a test compares), and 2 b q for each completion and token of its prompt, whose keys and values its
                       attention reads as a copy; with --gradient-checkpointing b d a layer, and one layer whole
    logits             a chunk of 2^24, three times, in fp32
    start policy       b P once more, with --kl
    cache              2 b kv layers x (completion of a row, and prompt, once for all of its completions), for search or for aggregation,
                       whichever is more. It takes half of the memory that the weights leave free, at most, and keeps it; a rollout that
                       doesn't fit goes in turns
"""

import os
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM
from transformers.modeling_layers import GradientCheckpointingLayer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import spiral  # noqa: E402


def memory_plan(config):
    """{"parameters", "trained": counts; "weights", "start policy", "gradients and AdamW", "update", "logits", "cache of a whole rollout": bytes}."""
    _, settings, tokenizer = spiral.load_tokenizer(config)
    auto = config.dtype == "auto" and config.device != "cpu" and isinstance(tokenizer, spiral.HubTokenizer)       # as load_policy on a GPU
    text, size = settings.get_text_config(), 2 if auto or config.dtype == "bf16" else 4
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(settings)
    linear = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not model.get_output_embeddings()]
    parameters, d, layers = sum(p.numel() for p in model.parameters()), text.hidden_size, text.num_hidden_layers
    trained = config.lora_rank * sum(m.in_features + m.out_features for m in linear) or parameters
    inside, processes = sum(p.numel() for m in model.modules() if isinstance(m, GradientCheckpointingLayer) for p in m.parameters()), 1
    if config.shard:
        processes = int(os.environ.get("WORLD_SIZE", 1))
    outside = parameters - inside
    held = outside + inside / processes + (inside / layers if processes > 1 else 0)
    mine = trained / processes if config.lora_rank else outside + inside / processes     # adapters are all in the layers
    width = getattr(text, "head_dim", None) or d // text.num_attention_heads
    q, kv = text.num_attention_heads * width, (getattr(text, "num_key_value_heads", None) or text.num_attention_heads) * width
    layer = size * (5 * q + 5 * kv + 4 * (getattr(text, "intermediate_size", None) or 4 * d)) + (8 + 4 * size) * d        # a token
    kept = layer + layers * size * d if config.gradient_checkpointing else layers * layer
    prompt, completion = config.max_prompt_tokens, max(config.max_trace_tokens, config.max_aggregation_tokens)
    tokens = max(prompt + completion, config.micro_batch_tokens)                         # of the largest micro-batch
    rows = min(config.num_aggregations, max(1, (tokens - prompt) // completion))         # of a set that fit into it
    copies = rows * prompt * max(1, tokens / (prompt + rows * completion)) * (not config.gradient_checkpointing)
    traces = config.num_traces + (config.num_sets * config.num_aggregations if config.algo == "grpo" else 0)
    search = config.max_prompt_tokens + traces * config.max_trace_tokens                 # of a problem, if its prompt is as long as it may be
    aggregation = config.num_sets * (config.max_prompt_tokens + config.num_aggregations * config.max_aggregation_tokens) * (config.algo != "grpo")
    return {"parameters": parameters, "trained": trained, "weights": size * (held + (mine if config.lora_rank else 0)),
            "start policy": size * parameters * (config.kl > 0), "gradients and AdamW": mine * (12 if size == 4 else 18), "update": kept * tokens + copies * layers * size * 2 * q,
            "logits": 12 * 2 ** 24, "cache of a whole rollout": 2 * size * kv * layers * config.problems * max(search, aggregation)}


def show(config):
    """Prints the plan, and whether it fits this GPU, or what GPU it takes. Returns the exit code 0."""
    plan = memory_plan(config)
    completions = config.num_traces * config.max_trace_tokens + config.num_sets * config.num_aggregations * config.max_aggregation_tokens
    for name in ("parameters", "trained"):
        print(f"{name:<28}{plan.pop(name) / 1e6:12,.1f} M")
    print(f"{'sampled tokens a step, max':<28}{config.problems * completions / 1e6:12,.2f} M")
    cache = plan.pop("cache of a whole rollout")
    for name, count in plan.items():
        print(f"{name:<28}{count / 2 ** 30:12,.2f} GiB")
    together = sum(plan.values())
    kept = min(cache, together - plan["weights"])            # the cache leaves the update as much as it takes
    print(f"{'together':<28}{together / 2 ** 30:12,.2f} GiB")
    print(f"{'cache of a whole rollout':<28}{cache / 2 ** 30:12,.2f} GiB, in turns where that is too much")
    needed, device = (together + kept) / 2 ** 30, spiral.pick_device(config.device)
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory / 2 ** 30
        print(f"it {'fits' if needed <= total else 'does NOT fit'}: {needed:,.1f} GiB with a cache in turns; {device} has {total:,.1f} GiB"
              + ("" if needed <= total else ". Lower the token limits or --micro-batch-tokens, or add --gradient-checkpointing or --lora-rank 32"))
    else:
        print(f"it needs a GPU with {needed:,.1f} GiB (no GPU here to compare with), or as much memory on the CPU")
    return 0
