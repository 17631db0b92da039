"""The capture of CUDA graphs, emulated by tracing: the operations of one call, with every Python
value frozen, replayed on the same storages. A value that a step takes from Python, or a shape that
depends on a number in a tensor, makes a replay differ from a call that isn't captured, or raises.

    python experiments/gpu_paper/capture.py
"""

import os
import sys
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import torch  # noqa: E402
import transformers  # noqa: E402
from torch.fx.experimental.proxy_tensor import make_fx  # noqa: E402

import spiral  # noqa: E402

PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 0, 9, 10, 11, 12], [50], [1, 2, 3], [9] * 7]
CALLS = [
    {"prompts": PROMPTS[:1], "num_samples": 1},
    {"prompts": PROMPTS[:2], "num_samples": 9},
    {"prompts": PROMPTS, "num_samples": 4},
    {"prompts": PROMPTS, "num_samples": 4, "temperature": 0.5},
]


class Ends:
    eos_ids = {0, 5, 21, 33, 40, 58}


def toy_policy(dtype=torch.float32, checkpointing=False):
    """The same random model each time, of grouped queries."""
    torch.manual_seed(1)
    settings = transformers.Qwen3Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
    )
    model = transformers.AutoModelForCausalLM.from_config(
        settings, attn_implementation="spiral", dtype=dtype
    ).eval()
    for parameter in model.parameters():
        parameter.data.mul_(3 if parameter.ndim > 1 else 1)  # no flat distributions
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
        for module in model.modules():
            module.training = isinstance(module, transformers.GradientCheckpointingLayer)
    return spiral.Policy(model, Ends(), spiral.Memory(model, 0.002))


def capture(step, inputs, pool):
    """For torch.cuda.make_graphed_callables."""
    for _ in range(3):
        step(*inputs)  # as torch warms up: what they write into memory is written again
    graph = make_fx(step)(*inputs)

    def replay(*values):
        for place, value in zip(inputs, values):
            place.copy_(value)
        replay.times += 1
        return graph(*inputs)

    replay.times = 0
    return replay


@torch.no_grad()
def error(policy, prompts, results, temperature):
    """The largest difference of the log-probs from those of a whole forward pass without cache."""
    largest = 0.0
    policy.model.set_attn_implementation("eager")
    for prompt, completions in zip(prompts, results):
        for completion in completions:
            whole = torch.tensor([prompt + completion.tokens])
            logits = policy.model(whole, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
            logprobs = (logits / temperature).log_softmax(-1)
            right = logprobs.gather(-1, whole[0, len(prompt) :, None])[:, 0]
            difference = right - torch.tensor(completion.logprobs)
            largest = max(largest, difference.abs().max().item())
    policy.model.set_attn_implementation("spiral")
    return largest


def compare(dtype=torch.float32, checkpointing=False, calls=CALLS * 2):
    """(graphs, replays, calls with the same tokens as without graphs, the largest error of a
    log-prob), while the weights change in place. In fp32 the same code may choose another token
    where it lies on an edge, since the graphs' larger shapes round otherwise."""
    torch.cuda.make_graphed_callables, real = capture, torch.cuda.make_graphed_callables
    policy, plain = toy_policy(dtype, checkpointing), toy_policy(dtype)
    policy.memory.pool = "some"
    equal, largest = 0, 0.0
    for call in calls:
        tokens = []
        for one in (policy, plain):
            generator = torch.Generator().manual_seed(0)
            results = spiral.sample(one, max_new_tokens=16, generator=generator, **call)
            tokens.append([[c.tokens for c in completions] for completions in results])
            if one is policy:
                temperature = call.get("temperature", 1.0)
                largest = max(largest, error(one, call["prompts"], results, temperature))
        equal += tokens[0] == tokens[1]
        for parameter in [*policy.model.parameters(), *plain.model.parameters()]:
            parameter.data.mul_(0.97)
    torch.cuda.make_graphed_callables = real
    graphs = policy.memory.graphs.values()
    return len(graphs), sum(graph.times for graph in graphs), equal, largest


def main():
    torch.set_num_threads(1)
    for dtype in (torch.float32, torch.bfloat16):
        for checkpointing in (False, True):
            graphs, replays, equal, largest = compare(dtype, checkpointing)
            print(f"{dtype}, checkpointing {checkpointing}: {graphs} graphs, {replays} replays,")
            print(f"    {equal} of 8 calls equal, log-probs within {largest:.1e}", flush=True)


if __name__ == "__main__":
    main()
