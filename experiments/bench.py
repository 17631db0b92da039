"""How fast is it? This project against the obvious alternative, in turns in one process.

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
shares of that (2 flops) and of its rate of copying (all weights once a token). BENCH.md shows the
results.
"""

import argparse
import json
import resource
import statistics
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
import transformers

HERE = Path(__file__).resolve().parent
if "trl" not in sys.argv:  # that process may live in an environment of its own
    sys.path.insert(0, str(HERE.parent))
    import spiral
    import tasks


@dataclass
class SamplingCase:
    mean_length: int  # of completions; 0: they never end by themselves
    shortest_prompt: int
    longest_prompt: int
    num_prompts: int
    max_tokens: int  # of a completion
    num_samples: int  # completions of a prompt


SAMPLING = {
    "batch 1": SamplingCase(0, 16, 64, num_prompts=1, max_tokens=128, num_samples=1),
    "batch 16": SamplingCase(56, 16, 64, num_prompts=2, max_tokens=256, num_samples=8),
    "batch 64": SamplingCase(56, 16, 64, num_prompts=8, max_tokens=256, num_samples=8),
    "batch 256": SamplingCase(56, 16, 64, num_prompts=32, max_tokens=256, num_samples=8),
    "aggregation N2=4": SamplingCase(64, 1024, 4096, num_prompts=1, max_tokens=256, num_samples=4),
    "aggregation N2=8": SamplingCase(64, 1024, 4096, num_prompts=1, max_tokens=256, num_samples=8),
}
TINY = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "head_dim": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 8192,
}
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TURNS = 5
ROWS = []  # of the result
SUMS = ["What is 7 + 5?", "What is 12 * 3?", "What is 19 - 8?", "What is 6 * 7?"]


# ---- Measuring -----------------------------------------------------------------------------------


def now():
    """Seconds: of this process's CPU time where there is one thread, else of the clock."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    elif torch.get_num_threads() == 1:
        return time.process_time()
    return time.perf_counter()


def clock(function, *arguments):
    """(result, seconds) of a call."""
    began = now()
    result = function(*arguments)
    return result, now() - began


def peak_bytes(function):
    """The most that tensors made in `function` hold at a time, from a trace of every allocation."""
    with torch.profiler.profile(profile_memory=True) as trace:
        function()
    held = 0
    peak = 0
    for event in trace.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def machine_limits():
    """(bytes/s of a large copy, flops/s of a large fp32 matmul)."""
    source = torch.ones(1 << 26, device=DEVICE)
    target = torch.empty_like(source)
    matrix = torch.ones(2048, 2048, device=DEVICE)
    copy_seconds = min(clock(target.copy_, source)[1] for _ in range(9))
    matmul_seconds = min(clock(torch.mm, matrix, matrix)[1] for _ in range(9))
    return 2 * source.nbytes / copy_seconds, 2 * 2048**3 / matmul_seconds


def add_row(case, ratios, **more):
    ratio = statistics.median(ratios)
    print(f"{case:<24}{ratio:6.2f}x  ({min(ratios):.2f} to {max(ratios):.2f})")
    ROWS.append({"case": case, "ratio": ratio, "ratios": ratios, **more})


def compare(case, turn):
    """turn(seed) returns the seconds of ours, those of theirs, and the tokens of each."""
    ratios = []
    our_seconds = 0
    their_seconds = 0
    num_tokens = 0
    for seed in range(1, TURNS + 1):
        ours, theirs, tokens = turn(seed)
        ratios.append(theirs / ours)
        our_seconds += ours
        their_seconds += theirs
        num_tokens += tokens
    add_row(case, ratios, ours=num_tokens / our_seconds, theirs=num_tokens / their_seconds)


# ---- Random weights ------------------------------------------------------------------------------


def random_policy(mean_length=0, vocabulary=1275):
    """A small Qwen3. So many of its tokens end a completion that it has `mean_length` (0: none)."""
    torch.manual_seed(0)
    config = transformers.Qwen3Config(**TINY, vocab_size=vocabulary)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="spiral")
    model = model.eval().to(DEVICE)
    num_ends = vocabulary // mean_length if mean_length else 0
    tokenizer = SimpleNamespace(eos_ids=range(num_ends))
    return spiral.Policy(model, tokenizer, spiral.Memory(model, gigabytes=1))


def random_tokens(shortest, longest, count):
    lengths = torch.randint(shortest, longest + 1, (count,)).tolist()
    return [torch.randint(1, 1274, (length,)).tolist() for length in lengths]


# ---- Sampling ------------------------------------------------------------------------------------


def generate_batch(policy, prompts, lengths):
    """transformers.generate and log-probs of left-padded prompts; lengths [prompts][samples]."""
    width = max(len(prompt) for prompt in prompts)
    tokens = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    tokens = tokens.to(DEVICE)
    ends = torch.tensor(lengths).flatten()  # one for each completion
    last_position = ends.to(DEVICE) + width - 1
    end_token = 0  # any token: `stop` says when it comes

    def stop(so_far, scores):
        is_last = last_position == so_far.shape[1]
        scores[:, end_token] = torch.where(is_last, 1e4, -1e4)
        return scores

    out = policy.model.generate(
        tokens,
        attention_mask=tokens > 0,
        do_sample=True,
        top_k=0,
        num_return_sequences=len(lengths[0]),
        max_new_tokens=int(ends.max()),
        eos_token_id=end_token,
        pad_token_id=end_token,
        logits_processor=[stop],
        output_logits=True,
        return_dict_in_generate=True,
    )
    for position, logits in enumerate(out.logits, width):
        logits.log_softmax(-1).gather(-1, out.sequences[:, position, None])


def generate(policy, prompts, lengths):
    """The same completions by transformers, in four batches of prompts of like length."""
    num_samples = len(lengths) // len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    batch_size = -(-len(order) // 4)
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        generate_batch(
            policy,
            prompts=[prompts[i] for i in batch],
            lengths=[lengths[i * num_samples : (i + 1) * num_samples] for i in batch],
        )


def compare_sampling(case, policy, run):
    """Compares run(seed), whose calls of spiral.sample are repeated with generate."""
    plain_sample = spiral.sample
    calls = []  # of (prompts, lengths of the completions, seconds)

    def recorded_sample(policy, prompts, *arguments, **options):
        began = now()
        completions = plain_sample(policy, prompts, *arguments, **options)
        seconds = now() - began
        lengths = [len(c.tokens) for of_prompt in completions for c in of_prompt]
        calls.append((prompts, lengths, seconds))
        return completions

    def turn(seed):
        calls.clear()
        _, ours = clock(run, seed)
        num_tokens = sum(sum(lengths) for _, lengths, _ in calls)
        in_sample = sum(seconds for _, _, seconds in calls)
        theirs = ours - in_sample  # prompts and rewards, which both need
        policy.model.set_attn_implementation("sdpa")
        for prompts, lengths, _ in calls:
            theirs += clock(generate, policy, prompts, lengths)[1]
        policy.model.set_attn_implementation("spiral")
        return ours, theirs, num_tokens

    spiral.sample = recorded_sample
    run(0)  # warm-up
    compare(case, turn)
    spiral.sample = plain_sample


def rollout(shrink):
    config = spiral.Config()
    policy = spiral.load_policy(config)
    task = tasks.make_task(config.task)
    problems = task.problems("train", 200, 0)
    num_problems = 16 // shrink

    def run(seed):
        chosen = problems[seed * num_problems : (seed + 1) * num_problems]
        seeds = [1000 * seed + i for i in range(num_problems)]
        generators = [torch.Generator().manual_seed(number) for number in seeds]
        spiral.rollout(policy, task, chosen, config, generators)

    compare_sampling("rollout", policy, run)


def compare_sampling_case(name, case, shrink):
    shortest = case.shortest_prompt // shrink
    longest = case.longest_prompt // shrink
    max_tokens = case.max_tokens // shrink
    policy = random_policy(mean_length=case.mean_length // shrink)

    def run(seed):
        torch.manual_seed(seed)
        prompts = random_tokens(shortest, longest, count=case.num_prompts)
        spiral.sample(policy, prompts, max_tokens, num_samples=case.num_samples)

    compare_sampling(name, policy, run)


def sampling(shrink):
    for name, case in SAMPLING.items():
        compare_sampling_case(name, case, shrink)


# ---- Update --------------------------------------------------------------------------------------


def compute_gradient(policy, groups):
    for batch in spiral.micro_batches(groups, 8192):
        logprobs, _, advantages = spiral.completion_logprobs(policy.model, batch, 1.0)
        spiral.policy_loss(logprobs, logprobs.detach(), advantages, 0.2).backward()


def compare_update(policy, count, shortest, longest, shrink):
    torch.manual_seed(count)
    traces = random_tokens(256 // shrink, 1024 // shrink, count=4)
    prompt = [token for trace in traces for token in trace]
    completions = []
    for tokens in random_tokens(shortest // shrink, longest // shrink, count=count):
        logprobs = [0.0] * len(tokens)  # their values don't matter
        completions.append(spiral.Completion(tokens=tokens, logprobs=logprobs, advantage=1))
    shared = [spiral.Group(prompt, completions)]
    repeated = [spiral.Group(list(prompt), [completion]) for completion in completions]
    num_tokens = sum(len(completion.tokens) for completion in completions)

    def turn(seed):
        _, ours = clock(compute_gradient, policy, shared)
        _, theirs = clock(compute_gradient, policy, repeated)
        return ours, theirs, num_tokens

    compare(f"update N2={count}, {shortest}-{longest}", turn)


def update(shrink):
    policy = random_policy()
    compare_update(policy, count=4, shortest=256, longest=1024, shrink=shrink)
    compare_update(policy, count=8, shortest=256, longest=1024, shrink=shrink)
    compare_update(policy, count=8, shortest=64, longest=256, shrink=shrink)


def memory(shrink):
    policy = random_policy(vocabulary=151936)
    num_tokens = 4096 // shrink**2
    hidden = torch.randn(num_tokens, 128, device=DEVICE, requires_grad=True)
    targets = torch.randint(1274, (num_tokens,), device=DEVICE)

    def in_chunks():
        spiral.token_logprobs(policy.model, hidden, targets, 1.0).sum().backward()

    def at_once():
        logprobs = policy.model.lm_head(hidden).log_softmax(-1)
        logprobs.gather(-1, targets[:, None]).sum().backward()

    ours = peak_bytes(in_chunks)
    theirs = peak_bytes(at_once)
    add_row("memory", [theirs / ours], bytes=[ours, theirs])


# ---- A GRPO step in TRL and here -----------------------------------------------------------------


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
    """Two steps here, of which the second is reported."""
    config = spiral.Config(model=model)
    policy = spiral.load_policy(config)
    optimizer = spiral.make_optimizer(policy.model, config.lr)
    prompts = [policy.tokenizer.chat(text) for text in SUMS]

    def update_on(completions):
        groups = []
        for prompt, of_prompt in zip(prompts, completions, strict=True):
            for completion in of_prompt:
                completion.reward = reward(policy.tokenizer.decode(completion.tokens))
            groups.append(spiral.Group(prompt, of_prompt))
        advantages = spiral.grpo_advantages(spiral.rewards_of(groups))
        spiral.assign_advantages(groups, advantages, 0)
        spiral.update(policy, optimizer, groups, len(prompts), config)

    for _ in range(2):
        completions, sampling_seconds = clock(
            partial(spiral.sample, policy, prompts, max_new_tokens=64, num_samples=8)
        )
        _, update_seconds = clock(update_on, completions)

    copy_rate, matmul_rate = machine_limits()
    num_weights = sum(parameter.numel() for parameter in policy.model.parameters())
    lengths = [len(c.tokens) for of_prompt in completions for c in of_prompt]
    num_tokens = sum(lengths)
    sampling_flops = 2 * num_weights * num_tokens / sampling_seconds
    update_flops = 6 * num_weights * num_tokens / update_seconds
    sampling_bytes = 4 * num_weights * max(lengths) / sampling_seconds
    return {
        "seconds": sampling_seconds + update_seconds,
        "sampling": sampling_seconds,
        "tokens": num_tokens,
        "update_matmul": update_flops / matmul_rate,
        "sampling_matmul": sampling_flops / matmul_rate,
        "sampling_copy": sampling_bytes / copy_rate,
    }


# ---- Command line --------------------------------------------------------------------------------

CASES = {"rollout": rollout, "sampling": sampling, "update": update, "memory": memory}


def measure_step(args, machine):
    """Takes one GRPO step, and adds its row to bench_trl.jsonl."""
    result = our_step(args.model) if args.step == "ours" else trl_step(args.model)
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    row = {"step": args.step, **result, "memory": 1024 * kilobytes, **machine}
    text = json.dumps(row)
    print(text)
    with (args.out / "bench_trl.jsonl").open("a") as file:
        file.write(text + "\n")


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--quick", action="store_true", help="small sizes")
    parser.add_argument("--step", choices=("ours", "trl"))
    parser.add_argument("--model", help="folder of the model, for --step")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    args = parser.parse_args(arguments)
    machine = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    if args.step:
        measure_step(args, machine)
        return

    suffix = "_quick" if args.quick else ""
    for name in args.cases.split(","):
        CASES[name](shrink=8 if args.quick else 1)
        text = json.dumps({"machine": machine, "rows": ROWS}, indent=1)
        (args.out / f"bench_{DEVICE.type}{suffix}.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
