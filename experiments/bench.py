"""How fast is it? Ours against the obvious alternative, in turns in one process.

    python experiments/bench.py                           # all cases, minutes on 2 CPU cores
    python experiments/bench.py --quick --cases rollout,memory      # small sizes, two cases
    OMP_NUM_THREADS=1 python experiments/bench.py         # CPU seconds, for a busy machine

    rollout   a default step of the tiny policy: 16 problems, 8 traces, 4 sets x 4 aggregations
    sampling  ragged completions, 8 to a prompt, 1 to 256 rows, the longest over 4x the median; and
              4 or 8 aggregations of four traces of 256 to 1024 tokens
    update    of such aggregations, and of traces of 64 to 256 tokens
    memory    of the log-probs of 4096 tokens with a vocabulary of 151,936

All but the first have random weights. Sampling is compared with transformers.generate (temperature
1, no top-k, prompts sorted by length, in four left-padded batches: here that beats one) and the
log-softmax of the logits that it keeps, since spiral.sample returns log-probs; each row of it ends
at the length that ours sampled. The update is compared with the prompt repeated for each
completion, the memory of log-probs with that of logits made at once.

The same GRPO step here and in TRL, 4 prompts x 8 completions of at most 64 tokens, fp32, all
weights, a process each that takes two steps and adds the second to results/bench_trl.jsonl:

    python experiments/bench.py --step ours --model DIR          # made by real_model.py
    python-that-has-trl experiments/bench.py --step trl --model DIR

with the update's share of the machine's matmul rate (6 flops a weight and token), and sampling's
shares of that (2 flops) and of its rate of copying (all weights once a token).
"""

import argparse
import json
import resource
import statistics
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
import transformers

HERE = Path(__file__).resolve().parent
if "trl" not in sys.argv:  # that process may live in an environment of its own
    sys.path.insert(0, str(HERE.parent))
    import spiral
    import tasks

# mean length (0: endless), prompt tokens from and to, prompts, longest completion, rows to a prompt
SAMPLING = {
    "batch 1": (0, 16, 64, 1, 128, 1),
    "batch 16": (56, 16, 64, 2, 256, 8),
    "batch 64": (56, 16, 64, 8, 256, 8),
    "batch 256": (56, 16, 64, 32, 256, 8),
    "aggregation N2=4": (64, 1024, 4096, 1, 256, 4),
    "aggregation N2=8": (64, 1024, 4096, 1, 256, 8),
}
TINY = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "head_dim": 32}
TINY |= {"num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 8192}
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ROWS = []  # of the table
SUMS = ["What is 7 + 5?", "What is 12 * 3?", "What is 19 - 8?", "What is 6 * 7?"]


# ---- Measuring ----


def clock(function, *args):
    """(result, seconds): of the CPU where there is one thread."""
    cpu = DEVICE.type == "cpu"
    now = time.process_time if cpu and torch.get_num_threads() == 1 else time.perf_counter
    wait = int if cpu else torch.cuda.synchronize
    wait()
    began = now()
    result = function(*args)
    wait()
    return result, now() - began


def peak_bytes(function):
    """The most that tensors made in `function` hold at a time, from a trace of every allocation."""
    with torch.profiler.profile(profile_memory=True) as trace:
        function()
    held, peak = 0, 0
    for event in trace.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def machine_limits():
    """(bytes/s of a large copy, flops/s of a large fp32 matmul)."""
    source, matrix = torch.ones(1 << 26, device=DEVICE), torch.ones(2048, 2048, device=DEVICE)
    target = torch.empty_like(source)
    copy = min(clock(target.copy_, source)[1] for _ in range(9))
    matmul = min(clock(torch.mm, matrix, matrix)[1] for _ in range(9))
    return 2 * source.nbytes / copy, 2 * 2048**3 / matmul


def add(case, ratios, **more):
    ratio = statistics.median(ratios)
    print(f"{case:<24}{ratio:6.2f}x  ({min(ratios):.2f} to {max(ratios):.2f})")
    ROWS.append({"case": case, "ratio": ratio, "ratios": ratios, **more})


def compare(case, turn):
    """turn(seed): (seconds of ours, of theirs, tokens of each)."""
    turns = [turn(seed) for seed in range(1, 6)]
    ours, theirs, tokens = map(sum, zip(*turns, strict=True))
    ratios = [their / mine for mine, their, _ in turns]
    add(case, ratios, ours=tokens / ours, theirs=tokens / theirs)


# ---- Random weights ----


def random_policy(memory, mean_length=0, vocabulary=1275):
    """A Qwen3, of whose tokens so many end a completion that it has `mean_length` (0: no end).
    memory: rows, longest prompt, longest completion."""
    torch.manual_seed(0)
    config = transformers.Qwen3Config(**TINY, vocab_size=vocabulary)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="spiral")
    model = model.eval().to(DEVICE)
    tokenizer = SimpleNamespace(eos_ids=range(vocabulary // mean_length if mean_length else 0))
    return spiral.Policy(model, tokenizer, spiral.Memory(model, *memory))


def random_tokens(low, high, count):
    lengths = torch.randint(low, high + 1, (count,)).tolist()
    return [torch.randint(1, 1274, (n,)).tolist() for n in lengths]


# ---- Sampling ----


def generate(policy, prompts, lengths):
    """transformers.generate and log-probs; row r ends after lengths[r] tokens."""
    times, eos = len(lengths) // len(prompts), 0  # any token: `stop` says when it comes
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    size = -(-len(order) // 4)
    for chunk in [order[i : i + size] for i in range(0, len(order), size)]:
        width = len(prompts[chunk[-1]])  # the longest
        tokens = [[0] * (width - len(prompts[i])) + prompts[i] for i in chunk]
        tokens = torch.tensor(tokens, device=DEVICE)
        ends = torch.tensor([lengths[i * times + j] for i in chunk for j in range(times)])
        last = ends.to(DEVICE) + width - 1

        def stop(so_far, scores, last=last):
            scores[:, eos] = torch.where(last == so_far.shape[1], 1e4, -1e4)
            return scores

        out = policy.model.generate(
            tokens,
            attention_mask=tokens > 0,
            do_sample=True,
            top_k=0,
            num_return_sequences=times,
            max_new_tokens=int(ends.max()),
            eos_token_id=eos,
            pad_token_id=eos,
            logits_processor=[stop],
            output_logits=True,
            return_dict_in_generate=True,
        )
        for t, logits in enumerate(out.logits, width):
            logits.log_softmax(-1).gather(-1, out.sequences[:, t, None])


def compare_sampling(case, policy, run):
    """Compares run(seed), whose calls of spiral.sample generate repeats."""
    real, calls = spiral.sample, []

    def sample(policy, prompts, *args, **kwargs):
        completions, seconds = clock(lambda: real(policy, prompts, *args, **kwargs))
        calls.append((prompts, [len(c.tokens) for row in completions for c in row], seconds))
        return completions

    def turn(seed):
        calls.clear()
        _, ours = clock(run, seed)
        tokens = sum(sum(lengths) for _, lengths, _ in calls)
        theirs = ours - sum(seconds for *_, seconds in calls)  # prompts, rewards: both need them
        policy.model.set_attn_implementation("sdpa")
        for prompts, lengths, _ in calls:
            theirs += clock(generate, policy, prompts, lengths)[1]
        policy.model.set_attn_implementation("spiral")
        return ours, theirs, tokens

    spiral.sample = sample
    run(0)  # warm-up
    compare(case, turn)
    spiral.sample = real


def rollout(shrink):
    config, count = spiral.Config(), 16 // shrink
    policy, task = spiral.load_policy(config), tasks.make_task(config.task)
    problems = task.problems("train", 200, 0)

    def run(seed):
        generators = [torch.Generator().manual_seed(1000 * seed + i) for i in range(count)]
        mine = problems[seed * count : (seed + 1) * count]
        spiral.rollout(policy, task, mine, config, generators, torch.arange(5) / 4)

    compare_sampling("rollout", policy, run)


def sampling(shrink):
    for case, (mean, low, high, prompts, limit, count) in SAMPLING.items():
        low, high, limit = (n // shrink for n in (low, high, limit))
        policy = random_policy((prompts * count, high, limit), mean // shrink)

        def run(seed, policy=policy, sizes=(low, high, prompts), limit=limit, count=count):
            torch.manual_seed(seed)
            spiral.sample(policy, random_tokens(*sizes), limit, 1.0, count)

        compare_sampling(case, policy, run)


# ---- Update ----


def gradient(policy, groups):
    for batch in spiral.micro_batches(groups, 8192):
        logprobs, _, advantages = spiral.completion_logprobs(policy.model, batch, 1.0)
        spiral.policy_loss(logprobs, logprobs.detach(), advantages, 0.2).backward()


def update(shrink):
    policy = random_policy((1, 1, 1))
    for count, low, high in ((4, 256, 1024), (8, 256, 1024), (8, 64, 256)):
        torch.manual_seed(count)
        prompt = sum(random_tokens(256 // shrink, 1024 // shrink, 4), [])
        rows = random_tokens(low // shrink, high // shrink, count)
        completions = [spiral.Completion(0, 0, 0, None, 1, row, row, advantage=1) for row in rows]
        repeated = [spiral.Group([*prompt], [c]) for c in completions]
        ways = [spiral.Group(prompt, completions)], repeated
        tokens = sum(map(len, rows))

        def turn(_, ways=ways, tokens=tokens):
            return *(clock(gradient, policy, way)[1] for way in ways), tokens

        compare(f"update N2={count}, {low}-{high}", turn)


def memory(shrink):
    policy, count = random_policy((1, 1, 1), 0, 151936), 4096 // shrink**2
    hidden = torch.randn(count, 128, device=DEVICE, requires_grad=True)
    targets = torch.randint(1274, (count,), device=DEVICE)

    def chunks():
        return spiral.token_logprobs(policy.model, hidden, targets, 1.0)

    def whole():
        return policy.model.lm_head(hidden).log_softmax(-1).gather(-1, targets[:, None])

    peaks = [peak_bytes(lambda way=way: way().sum().backward()) for way in (chunks, whole)]
    add("memory", [peaks[1] / peaks[0]], bytes=peaks)


# ---- A GRPO step in TRL and here ----


def reward(text):
    return float(len(text) % 7)  # differs between the completions of a prompt


def trl_step(model):
    """Two steps in TRL, of which the second is reported."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    def score(completions, **_):
        return [reward(turns[0]["content"]) for turns in completions]

    config = GRPOConfig(
        output_dir="runs/trl",
        max_steps=2,
        per_device_train_batch_size=32,
        num_generations=8,
        max_completion_length=64,
        temperature=1.0,
        top_k=0,
        bf16=False,
        model_init_kwargs={"dtype": "float32"},
        gradient_checkpointing=False,
        use_cpu=not torch.cuda.is_available(),
        logging_steps=1,
        save_strategy="no",
        report_to="none",
    )
    prompts = [[{"role": "user", "content": text}] for text in SUMS]
    trainer = GRPOTrainer(model, score, config, Dataset.from_dict({"prompt": prompts}))
    trainer.train()
    log = trainer.state.log_history[1]
    return {"seconds": log["step_time"], "tokens": round(32 * log["completions/mean_length"])}


def our_step(model):
    """The same here."""
    config = spiral.Config(model=model, rows=32, max_prompt_tokens=400)
    policy = spiral.load_policy(config)
    optimizer = spiral.make_optimizer(policy.model, config.lr)
    prompts = [policy.tokenizer.chat(text) for text in SUMS]

    def updating(completions):
        groups = [spiral.Group(*pair) for pair in zip(prompts, completions, strict=True)]
        for c in sum(completions, []):
            c.reward = reward(policy.tokenizer.decode(c.tokens))
        advantages = spiral.grpo_advantages(spiral.rewards_of(groups))
        spiral.assign_advantages(groups, advantages, 0)
        spiral.update(policy, optimizer, groups, 4, config)

    for _ in range(2):
        completions, sampled = clock(spiral.sample, policy, prompts, 64, 1.0, 8)
        _, updated = clock(updating, completions)
    copy, matmul = machine_limits()
    weights = sum(p.numel() for p in policy.model.parameters())
    lengths = [len(c.tokens) for row in completions for c in row]
    return {
        "seconds": sampled + updated,
        "sampling": sampled,
        "tokens": sum(lengths),
        "update_matmul": 6 * weights * sum(lengths) / updated / matmul,
        "sampling_matmul": 2 * weights * sum(lengths) / sampled / matmul,
        "sampling_copy": 4 * weights * max(lengths) / sampled / copy,
    }


# ---- Command line ----


def main(arguments=None):
    cases = {case.__name__: case for case in (rollout, sampling, update, memory)}
    parser = argparse.ArgumentParser()
    parser.add_argument("--cases", default=",".join(cases))
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--step", choices=("ours", "trl"))
    parser.add_argument("--model")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    args = parser.parse_args(arguments)
    machine = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    if args.step:
        result = our_step(args.model) if args.step == "ours" else trl_step(args.model)
        result["memory"] = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        row = json.dumps({"step": args.step, **result, **machine})
        print(row)
        with (args.out / "bench_trl.jsonl").open("a") as file:
            file.write(row + "\n")
        return
    for name in args.cases.split(","):
        cases[name](8 if args.quick else 1)
        text = json.dumps({"machine": machine, "rows": ROWS}, indent=1)
        (args.out / f"bench_{DEVICE.type}{'_quick' * args.quick}.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
