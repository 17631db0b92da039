"""What spiral.py does on this card: tests, speed and memory, in at most 9 minutes and without a
network, on any NVIDIA card with 24 GB or more. Writes experiments/results/gpu_CARD.json after each
part; a part that fails is named there with its error, and the next one follows.

    python experiments/gpu.py
    python experiments/gpu.py --miniature     # all of it on the CPU with tiny shapes, in a minute

Weights of the large models are random: shapes decide on speed and memory. Decoding is compared with
`generate` of transformers, in the same batch, and with the bandwidth floor: the time to read all
weights once for each token, and the keys and values there are, at the bandwidth of a large copy.
"""

import contextlib
import json
import re
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import torch  # noqa: E402
import transformers  # noqa: E402

import spiral  # noqa: E402

SECONDS = 500  # no part begins after so many
QWEN2 = transformers.Qwen2Config
QWEN3 = transformers.Qwen3Config
SHARED = {"vocab_size": 151_936, "max_position_embeddings": 32_768, "tie_word_embeddings": True}
SHAPES = {
    "Qwen2.5-0.5B": (QWEN2, [896, 4864, 24, 14, 2, 64]),
    "Qwen2.5-1.5B": (QWEN2, [1536, 8960, 28, 12, 2, 128]),
    "Qwen3-4B": (QWEN3, [2560, 9728, 36, 32, 8, 128]),
}
PARTS = {}


def part(function):
    PARTS[function.__name__] = function
    return function


def device():
    return "cuda" if torch.cuda.is_available() else "cpu"


def wait():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


# ---- Policies without files ----


class Ends:
    """A tokenizer of a random model. No completion ends early if eos_ids is empty."""

    def __init__(self, eos_ids=()):
        self.eos_ids, self.markers = set(eos_ids), []
        self.tiny = spiral.Tokenizer(spiral.TINY)
        self.hf = self.tiny.hf

    def encode(self, text):
        return self.tiny.encode(text)

    def decode(self, tokens):
        return self.tiny.decode([token % 1000 for token in tokens])

    def chat(self, text):
        return self.tiny.chat(text)


class Coin(spiral.tasks.Countdown):
    """Rewards by chance, so that there are advantages whatever a random model writes."""

    def reward(self, problem, text):
        return float(hash(text) % 2)


def random_policy(settings, config, eos_ids=()):
    """By load_model() itself, but with random weights, made where they stay."""
    kind = transformers.AutoModelForCausalLM

    class Loader:
        @staticmethod
        def from_pretrained(path, dtype, attn_implementation, **options):
            torch.manual_seed(1)
            with torch.device(device()):
                model = kind.from_config(
                    settings, dtype=getattr(torch, dtype), attn_implementation=attn_implementation
                )
            return model, {"missing_keys": []}

    spiral.AutoModelForCausalLM = Loader
    try:
        model = spiral.load_model("random weights", config, is_adapter=False)
    finally:
        spiral.AutoModelForCausalLM = kind
    return spiral.Policy(model, Ends(eos_ids), spiral.Memory(model, config.sampler_memory))


def toy_settings():
    return QWEN3(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
    )


def shape(name, miniature):
    kind, sizes = SHAPES[name]
    if miniature:
        sizes = [64, 128, 2, 4, 2, 16]
    names = """hidden_size intermediate_size num_hidden_layers num_attention_heads
    num_key_value_heads head_dim""".split()
    shared = SHARED | ({"vocab_size": 1300} if miniature else {})
    return kind(**shared, **dict(zip(names, sizes)))


# ---- Tests ----

PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 0, 9, 10, 11, 12], [50], [1, 2, 3], [9] * 37]
TOY = spiral.Config(sampler_memory=0.01)


@torch.no_grad()
def errors(policy, prompts, results):
    """Differences of all sampled log-probs from those of a forward pass without cache."""
    found = []
    policy.model.set_attn_implementation("sdpa")
    for prompt, completions in zip(prompts, results):
        for completion in completions:
            whole = torch.tensor([prompt + completion.tokens], device=policy.model.device)
            logits = policy.model(whole, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
            logprobs = logits.log_softmax(-1).gather(-1, whole[0, len(prompt) :, None])[:, 0]
            found.append(logprobs.cpu() - torch.tensor(completion.logprobs))
    policy.model.set_attn_implementation("spiral")
    return torch.cat(found).abs()


def toy_errors(dtype, checkpointing=False):
    """Two calls: the second replays what the first captured, after the weights have changed."""
    config = replace(TOY, dtype=dtype, gradient_checkpointing=checkpointing)
    policy = random_policy(toy_settings(), config, eos_ids=[0, 5, 21])
    for parameter in policy.model.parameters():
        parameter.data.mul_(3 if parameter.ndim > 1 else 1)
    found = []
    for seed in range(2):
        generator = torch.Generator().manual_seed(seed)
        results = spiral.sample(policy, PROMPTS, 40, num_samples=4, generator=generator)
        found.append(errors(policy, PROMPTS, results))
        for parameter in policy.model.parameters():
            parameter.data.mul_(0.97)
    found = torch.cat(found)
    return {
        "largest": found.max().item(),
        "mean": found.mean().item(),
        "graphs": len(policy.memory.graphs),
    }


@part
def exact_fp32(miniature, folder):
    found = toy_errors("float32")
    assert found["largest"] < 1e-4, found
    return found


@part
def grouped_bf16(miniature, folder):
    found = toy_errors("bfloat16")
    assert found["mean"] < 0.03, found
    return found


@part
def checkpointing(miniature, folder):
    """Captures with layers that are checkpointed; gradients with and without."""
    found = toy_errors("float32", checkpointing=True)
    assert found["largest"] < 1e-4, found
    gradients = []
    for on in (False, True):
        policy = random_policy(toy_settings(), replace(TOY, gradient_checkpointing=on))
        completions = []
        for i in range(3):
            tokens = [7 + i] * (5 + i)
            completions.append(
                spiral.Completion(tokens=tokens, logprobs=[-4.0] * len(tokens), advantage=1.0 - i)
            )
        groups = [spiral.Group(PROMPTS[1], completions)]
        logprobs, old, advantages = spiral.completion_logprobs(policy.model, groups, 1.0)
        spiral.policy_loss(logprobs, old, advantages, 0.2).backward()
        gradients.append([p.grad for p in policy.model.parameters()])
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)
    return found


def train(folder, *options):
    """spiral.py itself; its last row of metrics."""
    command = ["--out", str(folder), "--eval-problems", "0", *map(str, options)]
    if spiral.main(command):
        raise RuntimeError("spiral.py failed: its message is above")
    return json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])


@part
def resume(miniature, folder):
    """Two steps and one more, against three. A card's kernels may add up in another order, so
    that a token may differ, and all that follows."""
    options = ["--problems", 4, "--save-every", 1]
    if miniature:
        options = ["--problems", 1, "--max-trace-tokens", 4, "--max-aggregation-tokens", 4]
    train(folder / "twice", "--steps", 2, *options)
    resumed = train(folder / "twice", "--steps", 3, *options)
    straight = train(folder / "once", "--steps", 3, *options)
    assert resumed["step"] == straight["step"] == 3
    names = "loss", "grad_norm", "logprob_difference"
    return {name: [resumed[name], straight[name]] for name in names}


@part
def tiny_run(miniature, folder):
    options = ["--steps", 2 if miniature else 5]
    if miniature:
        options += ["--problems", 1, "--max-trace-tokens", 4, "--max-aggregation-tokens", 4]
    row = train(folder / "tiny", *options)
    names = "seconds", "tokens_per_second", "logprob_difference"
    return {name: row[name] for name in names}


# ---- Speed ----


def bandwidth(miniature):
    """Bytes a second of a large copy."""
    source = torch.zeros((1 << 20) if miniature else (1 << 30), dtype=torch.uint8, device=device())
    target = torch.empty_like(source)
    target.copy_(source)
    wait()
    began = time.time()
    for _ in range(20):
        target.copy_(source)
    wait()
    return 20 * 2 * len(source) / (time.time() - began)


def decoding(name, rows, prompt_tokens, num_samples, gigabytes, miniature):
    """Tokens a second of sample() and of generate(), all rows up to the limit."""
    new_tokens, compared = 256, 64
    if miniature:
        rows, prompt_tokens, new_tokens, compared, gigabytes = 8, 16, 8, 4, 0.05
    config = replace(TOY, dtype="bfloat16", lora_rank=32, sampler_memory=gigabytes)
    policy = random_policy(shape(name, miniature), config)
    prompts = [[7 + i] * prompt_tokens for i in range(rows // num_samples)]

    def run(tokens):
        wait()
        began = time.time()
        spiral.sample(policy, prompts, tokens, num_samples=num_samples)
        wait()
        return time.time() - began

    first, seconds = run(new_tokens), run(new_tokens)
    weights = sum(p.numel() * p.element_size() for p in policy.model.parameters())
    layers, _, heads, width = policy.memory.shape
    per_token = 2 * layers * heads * width * 2
    tokens = len(prompts) * prompt_tokens + rows * new_tokens / 2
    floor = new_tokens * (weights + tokens * per_token) / bandwidth(miniature)

    policy.model.set_attn_implementation("sdpa")
    inputs = torch.tensor(prompts, device=device()).repeat_interleave(num_samples, 0)
    options = {"attention_mask": torch.ones_like(inputs), "do_sample": True, "top_k": 0}
    options |= {"min_new_tokens": compared, "max_new_tokens": compared, "pad_token_id": 0}
    with torch.no_grad():
        policy.model.generate(inputs, **options)
        wait()
        began = time.time()
        policy.model.generate(inputs, **options)
        wait()
    return {
        "rows": rows,
        "prompt_tokens": prompt_tokens,
        "milliseconds_a_step": 1e3 * seconds / new_tokens,
        "tokens_per_second": rows * new_tokens / seconds,
        "share_of_floor": floor / seconds,
        "seconds_of_first_call": first,
        "generate_tokens_per_second": rows * compared / (time.time() - began),
    }


@part
def decoding_1p5b(miniature, folder):
    return decoding("Qwen2.5-1.5B", 64, 384, 8, 4.0, miniature)


@part
def decoding_4b_traces(miniature, folder):
    return decoding("Qwen3-4B", 24, 192, 8, 4.0, miniature)


@part
def decoding_4b_aggregations(miniature, folder):
    return decoding("Qwen3-4B", 24, 3840, 4, 6.0, miniature)


# ---- A step of each preset ----


def preset_step(path, miniature):
    """A rollout and an update with all sizes of the preset but the lengths of completions, and few
    problems. Then an update pass of as many tokens as the preset allows."""
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    config = spiral.parse_config(lines)
    name = next(name for name in SHAPES if name in config.model)
    config = replace(config, problems=2, max_draws=1, max_trace_tokens=96)
    config = replace(config, max_aggregation_tokens=96, max_prompt_tokens=640)
    if torch.cuda.is_available():  # a smaller card still tries the preset of a larger one
        total = torch.cuda.get_device_properties(0).total_memory / 1e9
        config = replace(config, sampler_memory=min(config.sampler_memory, total / 4))
    budget = config.micro_batch_tokens
    if miniature:
        config = replace(config, max_trace_tokens=8, max_aggregation_tokens=8)
        config = replace(config, sampler_memory=0.05, max_prompt_tokens=400)
        budget = 64
    policy = random_policy(shape(name, miniature), config)
    optimizer = spiral.make_optimizer(policy.model, config.lr)
    task = Coin()
    problems, state = task.problems("train", 8, 0), {"step": 0, "cursor": 0}
    for _ in range(2):  # the first captures
        stats, groups = spiral.train_step(policy, optimizer, task, problems, state, config)
    assert stats["useful"] and not stats["skipped"] and stats["grad_norm"] > 0, stats

    size = budget // 8
    completions = []
    for _ in range(7):
        completion = spiral.Completion(tokens=[5] * size, advantage=0.1)
        completion.logprobs = [-11.9] * size
        completions.append(completion)
    wait()
    began = time.time()
    group = spiral.Group([3] * size, completions)
    found = spiral.update(policy, optimizer, [group], 1, replace(config, micro_batch_tokens=budget))
    wait()
    return {
        "seconds_of_step": stats["seconds"],
        "tokens_per_second": stats["tokens_per_second"],
        "logprob_difference": stats["logprob_difference"],
        "update_tokens_per_second": budget / (time.time() - began),
        "update_skipped": found["skipped"],
    }


for preset in sorted((HERE.parent / "presets").glob("qwen*.args")):
    PARTS[preset.stem] = lambda miniature, folder, path=preset: preset_step(path, miniature)


# ---- All of it ----


def run_part(function, miniature):
    """The part's numbers, or its error in one line; seconds, and the most memory it had."""
    began = time.time()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    try:
        with tempfile.TemporaryDirectory() as folder:
            found = function(miniature, Path(folder))
    except Exception as error:  # whatever it is, it is what we want to know
        message = (str(error).strip() or "no message").splitlines()[0]
        found = {"error": f"{type(error).__name__}: {message}"}
    found["seconds"] = time.time() - began
    if torch.cuda.is_available():
        found["peak_memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
    return {key: round(x, 6) if isinstance(x, float) else x for key, x in found.items()}


def run_all(folder=HERE / "results", miniature=False):
    card = "miniature" if miniature else torch.cuda.get_device_name()
    began = time.time()
    result = {
        "card": card,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": sys.version.split()[0],
        "bandwidth_gb_per_second": round(bandwidth(miniature) / 1e9, 1),
        "parts": {},
    }
    if torch.cuda.is_available():
        result["memory_gb"] = round(torch.cuda.get_device_properties(0).total_memory / 1e9, 1)
    name = re.sub("[^A-Za-z0-9]+", "-", card).strip("-")
    for part_name, function in PARTS.items():
        if time.time() - began > SECONDS:
            result["parts"][part_name] = {"error": "no time was left"}
        else:
            with contextlib.redirect_stdout(sys.stderr):
                result["parts"][part_name] = run_part(function, miniature)
        print(part_name, json.dumps(result["parts"][part_name]), flush=True)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"gpu_{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    return result


def main():
    transformers.logging.set_verbosity_error()
    miniature = "--miniature" in sys.argv
    if not miniature and not torch.cuda.is_available():
        sys.exit("gpu.py: no CUDA device is here; --miniature tries the script on the CPU")
    folder = Path(tempfile.mkdtemp()) if miniature else HERE / "results"
    failed = [name for name, x in run_all(folder, miniature)["parts"].items() if "error" in x]
    print("failed:", ", ".join(failed) or "nothing")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
