"""Prefill, a decoding step, a whole call of sample() with its graphs and compaction, and an update
on fake CUDA tensors: bf16 and fp32, grouped queries or not, LoRA with checkpointing or neither. A
tensor on the wrong device raises. Says which attention kernels torch would choose.

    python experiments/gpu_paper/devices.py
"""

import sys

from fakecuda import CHOSEN, fake, make_policy, settings_of, spiral, torch


def groups_of(shapes):
    """Groups for an update: (tokens of the prompt, tokens of each completion)."""
    groups = []
    for prompt, lengths in shapes:
        completions = []
        for i, length in enumerate(lengths):
            completion = spiral.Completion(sample_index=i, tokens=[5] * length, advantage=0.5)
            completion.logprobs = [-1.0] * length
            completions.append(completion)
        groups.append(spiral.Group([3] * prompt, completions))
    return groups


class Numbers:
    """What sample() asks of a tensor whose numbers matter: fake ones have none."""

    def __init__(self, rows):
        self.rows, self.shape = rows, (len(rows), len(rows[0]))

    def tolist(self):
        return self.rows

    def numel(self):
        return self.shape[0] * self.shape[1]


def try_sampling(policy):
    """All of sample(), with graphs that run once. Returns how many there are."""

    def capture(function, inputs, pool):
        outputs = function(*inputs)
        assert outputs.is_cuda and outputs.dtype == torch.float64

        def replay(*inputs):
            assert all(tensor.is_cuda for tensor in inputs)
            rows = range(len(inputs[0]))  # every third completion ends
            return Numbers(
                [[0.0 if i % 3 == 2 else 7.0 for i in rows], [-0.5] * len(rows)]
                + [[0.5] * len(rows)]
            )

        return replay

    torch.cuda.make_graphed_callables = capture
    codes = Numbers([[0.1, 0.2, 0.3, 0.4]] * 3)
    spiral.sample(policy, [[1] * 20, [2] * 33, [4]], 8, codes=codes)
    return len(policy.memory.graphs)


def try_update(policy, lr=1e-4):
    optimizer = spiral.make_optimizer(policy.model, lr)
    masters = optimizer.param_groups[0]["params"]
    for master in masters:
        master.grad = torch.zeros_like(master)
    groups = groups_of([(12, [3, 1, 7]), (1, [2, 4]), (30, [5, 5])])
    logprobs, old, advantages = spiral.completion_logprobs(policy.model, groups, 1.0)
    assert logprobs.is_cuda and logprobs.dtype == torch.float32 and old.is_cuda
    (spiral.policy_loss(logprobs, old, advantages, 0.2) / 3).backward()
    norm = torch.nn.utils.clip_grad_norm_(masters, 1.0)
    optimizer.step()
    optimizer.zero_grad()
    assert norm.is_cuda and all(master.is_cuda for master in masters)
    state = next(iter(optimizer.state.values()))
    assert state["exp_avg"].is_cuda and state["exp_avg"].dtype == torch.float32


def try_all(dtype, kv_heads, lora_rank, checkpointing):
    """{where: the attention kernels chosen there}."""
    chosen = {}
    settings = settings_of("tiny", num_key_value_heads=kv_heads)
    with fake:
        policy = make_policy(settings, dtype, lora_rank, checkpointing, gigabytes=0.001)
        CHOSEN.clear()
        assert try_sampling(policy)
        chosen["prefill"] = dict(CHOSEN)
        CHOSEN.clear()
        try_update(policy)
        chosen["update"] = dict(CHOSEN)
    return chosen


def main():
    dtypes = [torch.bfloat16] if "--short" in sys.argv else [torch.bfloat16, torch.float32]
    for dtype in dtypes:
        for kv_heads in (2,) if "--short" in sys.argv else (2, 4):
            for lora_rank, checkpointing in ((0, False), (8, True)):
                chosen = try_all(dtype, kv_heads, lora_rank, checkpointing)
                print(f"{dtype} kv {kv_heads} of 4, LoRA {lora_rank}:", chosen, flush=True)
                if dtype == torch.bfloat16:
                    assert "math" not in chosen["update"], chosen


if __name__ == "__main__":
    main()
