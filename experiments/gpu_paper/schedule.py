"""A rollout and an evaluation of each preset with the real scheduler: sample(), decode(), the cut
of the memory and the graphs' rounding are spiral.py's, the lengths of completions are drawn, and a
step takes as long as cost.py says. Nothing runs on a card.

    python experiments/gpu_paper/schedule.py                # the presets
    python experiments/gpu_paper/schedule.py --short        # 2 problems of one of them

Two kinds of lengths: "short", of about 280 tokens, and "cut off", where half of the completions
reach the limit. A preset's numbers: tokens, decoding steps, graphs, seconds on each card."""

import math
import random
import sys
from collections import Counter
from types import SimpleNamespace

import fakecuda  # noqa: F401  first: it changes torch
from cost import CARDS, Step, kernels_of, step_seconds
from fakecuda import settings_of, spiral, torch

CAPTURE = 0.2  # seconds to capture a graph, beside the four times that it runs
PYTHON = 0.3e-3  # seconds of Python and copies for each step
QUESTION = 120  # tokens of a problem's prompt

# Model, LoRA rank, gigabytes, longest prompt and completions, problems a step, --rsa-steps
PRESETS = {
    "tiny": ("tiny", 0, 0.5, 512, 24, 48, 16, 2),
    "qwen2.5-1.5b-countdown-24gb": ("qwen2.5-1.5b", 64, 4.0, 2304, 512, 512, 16, 2),
    "qwen2.5-0.5b-countdown-16gb": ("qwen2.5-0.5b", 0, 1.5, 2304, 512, 512, 16, 2),
    "qwen3-4b-math-24gb": ("qwen3-4b", 32, 8.0, 5120, 1024, 1024, 16, 1),
    "qwen3-4b-math-paper": ("qwen3-4b", 32, 40.0, 17_920, 4096, 4096, 256, 1),
}


class Simulation:
    """A policy whose steps are only timed."""

    def __init__(self, model, lora, gigabytes):
        self.model, self.lora = model, lora
        settings = settings_of(model)
        dtype = torch.float32 if model == "tiny" else torch.bfloat16
        stand_in = SimpleNamespace(config=settings, dtype=dtype, device="meta")
        self.memory = spiral.Memory(stand_in, gigabytes)
        self.memory.pool = "some"
        self.policy = SimpleNamespace(
            memory=self.memory,
            model=SimpleNamespace(device="cpu"),
            tokenizer=SimpleNamespace(eos_ids={0}),
        )
        self.steps = self.tokens = self.not_captured = 0
        self.seconds = Counter()

    def sample(self, prompts, num_samples, max_new_tokens, draw_length):
        """Lengths of prompts -> lengths of their completions."""
        wanted = {}

        def captured(memory, step, inputs, key):
            (prompt_shape, _), (row_shape, _), _ = key
            shape = Step(
                self.model,
                self.lora,
                row_shape[2],
                prompt_shape[2],
                prompt_shape[4],
                row_shape[4],
                step.args[1].num_samples,
            )
            kernels, _ = kernels_of(shape)
            number = sum(kernels.values())
            eager = key not in memory.graphs and len(memory.graphs) >= 128
            self.not_captured += eager
            for name, card in CARDS.items():
                time = step_seconds(kernels, card)
                slow = max(time, 8e-6 * number)  # kernels launched one by one
                if key not in memory.graphs and not eager:
                    self.seconds[name, "capture"] += 4 * slow + CAPTURE
                self.seconds[name, "decode"] += (slow if eager else time) + PYTHON
            if not eager:
                memory.graphs[key] = True
            return lambda *inputs: self.outputs(len(inputs[0]), wanted, draw_length)

        def decode(policy, active, *rest):
            self.active = active
            self.steps += 1
            self.tokens += len(active)
            real_decode(policy, active, *rest)

        def prefill(policy, tokens, cache):
            number = len(tokens) * max(map(len, tokens))
            weights = 2 * self.size() * number  # operations
            for name, card in CARDS.items():
                self.seconds[name, "prefill"] += weights / (card.bf16 * 0.6)

        real_decode = spiral.decode
        real = spiral.captured, spiral.decode, spiral.prefill
        spiral.captured, spiral.decode, spiral.prefill = captured, decode, prefill
        tokens = [[1] * length for length in prompts]
        codes = torch.zeros(len(prompts), num_samples, dtype=torch.float64)
        results = spiral.sample(self.policy, tokens, max_new_tokens, codes=codes)
        spiral.captured, spiral.decode, spiral.prefill = real
        return [[len(c.tokens) for c in completions] for completions in results]

    def size(self):
        s = settings_of(self.model)
        width = getattr(s, "head_dim", None) or s.hidden_size // s.num_attention_heads
        heads = 2 * (s.num_attention_heads + s.num_key_value_heads)
        return s.num_hidden_layers * s.hidden_size * (heads * width + 3 * s.intermediate_size)

    def outputs(self, rows, wanted, draw_length):
        tokens = [7.0] * rows
        for i, row in enumerate(self.active):
            key = row.prompt_index, row.sample_index
            if key not in wanted:
                wanted[key] = draw_length()
            if len(row.tokens) + 1 >= wanted[key]:
                tokens[i] = 0.0
        return torch.tensor([tokens, [-1.0] * rows, [0.5] * rows], dtype=torch.float64)


def short():
    return max(20, int(random.lognormvariate(math.log(280), 0.4)))


def cut_off(limit):
    return limit if random.random() < 0.5 else random.randint(limit // 4, limit)


def aggregation_prompts(lengths, sets, set_size, longest):
    """Lengths of the prompts of all sets of all problems."""
    found = []
    for traces in lengths:
        for _ in range(sets):
            found.append(min(longest, QUESTION + 100 + sum(random.sample(traces, set_size))))
    return found


def rollout(simulation, problems, longest, trace_tokens, answer_tokens, draw):
    traces = simulation.sample(
        [QUESTION] * problems, 8, trace_tokens, lambda: min(trace_tokens, draw(trace_tokens))
    )
    prompts = aggregation_prompts(traces, 4, 4, longest)
    answers = simulation.sample(
        prompts, 4, answer_tokens, lambda: min(answer_tokens, draw(answer_tokens))
    )
    return traces, answers


def evaluation(simulation, problems, longest, trace_tokens, answer_tokens, draw, steps):
    """8 traces, and recursion: once for each 50 problems."""
    lengths = simulation.sample([QUESTION] * problems, 8, trace_tokens, lambda: draw(trace_tokens))
    for _ in range(steps):
        prompts = aggregation_prompts(lengths, 8, 4, longest)
        found = simulation.sample(prompts, 1, answer_tokens, lambda: draw(answer_tokens))
        lengths = [sum(found[i : i + 8], []) for i in range(0, len(found), 8)]


def show(name, simulation):
    per_step = simulation.tokens / simulation.steps
    print(
        f"{name}: {simulation.tokens} tokens, {simulation.steps} steps of {per_step:.0f} rows, "
        f"{len(simulation.memory.graphs)} graphs, {simulation.not_captured} steps without"
    )
    for card in CARDS:
        parts = {part: simulation.seconds[card, part] for part in ("decode", "prefill", "capture")}
        speed = simulation.tokens / (parts["decode"] + parts["prefill"])
        cells = ", ".join(f"{part} {seconds:.0f} s" for part, seconds in parts.items())
        print(f"    {card}: {cells}; {speed:.0f} tokens/s", flush=True)


def main():
    random.seed(0)
    names = [word for word in sys.argv[1:] if word in PRESETS] or list(PRESETS)
    few = "--short" in sys.argv
    for name in names:
        model, lora, gigabytes, longest, trace_tokens, answer_tokens, problems, steps = PRESETS[
            name
        ]
        kinds = {"short": lambda limit: min(limit, short()), "cut off": cut_off}
        if name == "tiny":
            kinds = {"short": lambda limit: random.randint(limit // 2, limit)}
        for kind, draw in kinds.items():
            simulation = Simulation(model, lora, gigabytes)
            number = 2 if few else min(problems, 16)
            rollout(simulation, number, longest, trace_tokens, answer_tokens, draw)
            show(f"{name}, {number} problems, {kind}", simulation)
            if not few:
                simulation.steps = simulation.tokens = simulation.not_captured = 0
                simulation.seconds.clear()
                evaluation(simulation, 50, longest, trace_tokens, answer_tokens, draw, steps)
                show("    an evaluation of 50 problems", simulation)


if __name__ == "__main__":
    main()
