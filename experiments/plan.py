"""What a run needs before it starts: parameters, tokens a step, memory by part. Reads the model's config.json, loads no weights.

    python experiments/plan.py --model Qwen/Qwen3-4B-Instruct-2507 --preset paper        # takes every option of spiral.py

The formula, for one process (P parameters, of which T are trained; b bytes a weight):

    weights            b P                       (and b T for adapters)
    gradients, AdamW   12 T in fp32; 18 T in bf16 (2 and 4 for the gradient, 4 for the fp32 copy, 8 for AdamW)
    update             tokens of the largest micro-batch x layers x what a layer keeps for the backward pass:
                       b (5 q + 5 kv + 4 f) + (8 + 4 b) d, for q = heads x width, kv = key-value heads x width, f feed-forward, d hidden
                       (counted on Qwen3; a test compares); with --gradient-checkpointing b d a layer, and one layer whole
    logits             a chunk of 2^24, three times, in fp32
    cache              2 b kv layers x (prompt + completion) a row; a rollout that doesn't fit half of the free memory goes in turns
"""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import spiral  # noqa: E402


def memory_plan(config):
    """{"parameters", "trained": counts; "weights", "gradients and AdamW", "update", "logits", "cache of a whole rollout": bytes}."""
    _, settings, tokenizer = spiral.load_tokenizer(config)
    text, size = settings.get_text_config(), 2 if config.dtype == "bf16" else 4
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(settings)
    linear = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not model.get_output_embeddings()]
    parameters, d, layers = sum(p.numel() for p in model.parameters()), text.hidden_size, text.num_hidden_layers
    trained = config.lora_rank * sum(m.in_features + m.out_features for m in linear) or parameters
    width = getattr(text, "head_dim", None) or d // text.num_attention_heads
    q, kv = text.num_attention_heads * width, (getattr(text, "num_key_value_heads", None) or text.num_attention_heads) * width
    layer = size * (5 * q + 5 * kv + 4 * (getattr(text, "intermediate_size", None) or 4 * d)) + (8 + 4 * size) * d        # a token
    kept = layer + layers * size * d if config.gradient_checkpointing else layers * layer
    longest = config.max_prompt_tokens + max(config.max_trace_tokens, config.max_aggregation_tokens)
    rows = config.problems * max(config.num_traces, config.num_sets * config.num_aggregations)
    return {"parameters": parameters, "trained": trained, "weights": size * (parameters + trained % parameters),
            "gradients and AdamW": trained * (12 if size == 4 else 18), "update": kept * max(longest, config.micro_batch_tokens),
            "logits": 12 * 2 ** 24, "cache of a whole rollout": 2 * size * kv * layers * longest * rows}


def main(arguments=None):
    config = spiral.parse_config(arguments)
    try:
        config.check()
        plan = memory_plan(config)
    except (ValueError, OSError) as error:
        sys.exit(f"plan.py: {str(error).splitlines()[0]}")
    completions = config.num_traces * config.max_trace_tokens + config.num_sets * config.num_aggregations * config.max_aggregation_tokens
    for name in ("parameters", "trained"):
        print(f"{name:<28}{plan.pop(name) / 1e6:12,.1f} M")
    print(f"{'sampled tokens a step, max':<28}{config.problems * completions / 1e6:12,.2f} M")
    cache = plan.pop("cache of a whole rollout")
    for name, count in plan.items():
        print(f"{name:<28}{count / 2 ** 30:12,.2f} GiB")
    print(f"{'together':<28}{sum(plan.values()) / 2 ** 30:12,.2f} GiB\n{'cache of a whole rollout':<28}{cache / 2 ** 30:12,.2f} GiB, in turns where that is too much")


if __name__ == "__main__":
    main()
