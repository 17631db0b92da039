"""How fast is it? Ours against the obvious alternative: same weights, prompts and stopping, in turns in one process.

    python experiments/bench.py                         # all cases, under 5 minutes on 2 CPU cores; writes results/bench_cpu.json
    python experiments/bench.py --quick --cases a,d     # smaller sizes, two cases
    python experiments/bench.py --profile               # where a default rollout's time goes, to results/profile_cpu.txt

    (a) the rollout and update of a default step: the tiny policy, 16 countdown problems, 8 traces each, then 4 sets x 4 aggregations
    (b) ragged long completions, 8 to a prompt, at batch 1, 16, 64, 256 (--large: 1024): the longest is over 4x the median
    (c) aggregation sampling: a set of n=4 traces of 256 to 1024 tokens, N2 = 4 and 8
    (d) the update of (c): against the prompt repeated for each completion, and against a padded forward with full logits
    (e) a vocabulary of 151k: memory of the log-prob pass at 4096 tokens, and sampling

(b) to (e) have random weights. The alternative for sampling is transformers.generate: temperature 1, no top-k or top-p, prompts
sorted by length and left-padded, num_return_sequences, in one batch or in four, whichever is faster in a trial. It returns tokens,
and the update also needs their log-probs, which spiral.sample returns. So "ratio" counts them: generate, plus the cheaper of the two
ways to get them, gathering from the logits it kept (output_logits) or one padded forward over the result, as minimal GRPO scripts do.
"bare" is generate alone. Ours stops by itself (with random weights by a bias on the logit of EOS: lengths are geometric), and
generate is made to stop each row at the length that ours sampled, so both return as many tokens.

"bandwidth": the bytes that decoding must read (the weights once a step, each row's keys and values, a prompt's once for all) per second, as a fraction of a
measured copy. "flops": those that must be done, as a fraction of a measured matmul. On the CPU the tiny weights stay in the cache and
decoding is bound by the overhead of small operations, then by flops. "padding": the fraction of the tokens in our forwards. "flops
ratio": of the repeated prompt to the shared one, the most that an update can gain: completions attend to the whole prompt in both.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("KINETO_LOG_LEVEL", "99")              # the profiler is quiet
import torch  # noqa: E402
import transformers  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import spiral  # noqa: E402
import tasks  # noqa: E402

TINY = dict(hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=4, head_dim=32, vocab_size=1275)
QWEN = {"0.6B": dict(hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16, num_key_value_heads=8, vocab_size=151936),
        "4B": dict(hidden_size=2560, intermediate_size=9728, num_hidden_layers=36, num_attention_heads=32, num_key_value_heads=8, vocab_size=151936)}


# ---- Measuring ----

now = time.process_time if "--cpu-time" in sys.argv else time.perf_counter


def clock(function):
    """(result, seconds)."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    wait()
    began, result = now(), function()
    wait()
    return result, now() - began


def peak_memory(function, device):
    """(result, bytes): the most that tensors made in `function` hold at a time, from a trace of every allocation."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return function(), torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as trace:
        result, now, peak = function(), 0, 0
    for event in trace.profiler.kineto_results.events():
        now += event.nbytes() if event.name() == "[memory]" else 0
        peak = max(peak, now)
    return result, peak


def machine_limits(device, dtype):
    """(bytes/s of a large copy, read plus written; flops/s of a large matmul): the best of several."""
    size = 1024 if device.type == "cpu" else 8192
    source, matrix = torch.ones(1 << 26, device=device), torch.ones(size, size, device=device, dtype=dtype)
    target = torch.empty_like(source)
    copy, matmul = (min(clock(function)[1] for _ in range(9)) for function in (lambda: target.copy_(source), lambda: matrix @ matrix))
    return 2 * source.nbytes / copy, 2 * size ** 3 / matmul


def recorded(name, function):
    """(result of `function`, [(arguments, result, seconds)] of its calls of spiral.`name`)."""
    real, calls = getattr(spiral, name), []

    def recorder(*args, **kwargs):
        result, seconds = clock(lambda: real(*args, **kwargs))
        calls.append((args, result, seconds))
        return result
    setattr(spiral, name, recorder)
    try:
        return function(), calls
    finally:
        setattr(spiral, name, real)


def row_of(ours, theirs, tokens, **more):
    """A row of the table, from seconds and tokens of each repetition."""
    spread = lambda ratios: {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios), "repetitions": len(ratios)}  # noqa: E731
    more = {key: spread([b / a for a, b in zip(ours, value)]) if key == "bare" else value for key, value in more.items()}
    return {"ratio": spread([b / a for a, b in zip(ours, theirs)]), "ours": sum(tokens) / sum(ours), "theirs": sum(tokens) / sum(theirs), **more}


# ---- Random weights, and what their work costs ----


def random_policy(bench, sizes, mean_length=0):
    """A Qwen3 of these sizes that ends a completion after `mean_length` tokens in the mean; 0: never."""
    torch.manual_seed(0)
    config, dtype = transformers.Qwen3Config(**{"head_dim": 128, **sizes}, max_position_embeddings=8192, tie_word_embeddings=False), bench.dtype
    with bench.device:
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa").eval()
        model.lm_head = torch.nn.Linear(config.hidden_size, config.vocab_size, dtype=dtype)
    eos = config.vocab_size - 1
    torch.nn.init.normal_(model.lm_head.weight, std=0.1 * config.hidden_size ** -0.5)    # logits are about 0, but for that of EOS
    torch.nn.init.zeros_(model.lm_head.bias).data[eos] = torch.tensor(eos / (mean_length - 1)).log() if mean_length else -30.0
    return spiral.Policy(model, SimpleNamespace(eos_id=eos, eos_ids=[eos]), bench.device, graphs=bench.device.type == "cuda")


def random_tokens(policy, low, high, count):
    """`count` lists of low..high tokens, none of them EOS."""
    return [torch.randint(policy.tokenizer.eos_id, (n,)).tolist() for n in torch.randint(low, high + 1, (count,)).tolist()]


def random_group(policy, prompt, low, high, count):
    """A Group of `count` completions of low..high tokens with made-up advantages."""
    rows, device = random_tokens(policy, low, high, count), policy.device
    tokens, mask = spiral.pad(rows, device), spiral.pad([[1] * len(row) for row in rows], device).bool()
    return spiral.Group(prompt, spiral.Samples(tokens, torch.zeros(mask.shape, device=device), mask, ~mask.any(-1)), torch.randn(count, device=device))


def work(model, prompts, lengths):
    """(bytes that decoding must read, forward flops) of completions of these lengths, as many to each prompt, that share it."""
    c, times = model.config, len(lengths) // len(prompts)
    heads, vocabulary = c.num_hidden_layers * c.head_dim, c.hidden_size * c.vocab_size
    matrices = sum(p.numel() for name, p in model.named_parameters() if p.dim() == 2 and "embed_tokens" not in name and "lm_head" not in name)
    own = sum(n * (n - 1) // 2 for n in lengths)                                                        # keys that completions attend to
    shared = sum(len(prompt) * max(lengths[u * times:(u + 1) * times]) for u, prompt in enumerate(prompts))      # read at once for all of a prompt
    flops = (2 * matrices * (sum(map(len, prompts)) + sum(lengths)) + 2 * vocabulary * sum(lengths)
             + 4 * heads * c.num_attention_heads * (own + sum(n * len(prompts[i // times]) for i, n in enumerate(lengths)) + sum(len(prompt) ** 2 // 2 for prompt in prompts)))
    return (max(lengths) * (matrices + vocabulary) + 2 * (own + shared) * heads * c.num_key_value_heads) * model.dtype.itemsize, flops


# ---- Sampling ----


@torch.no_grad()
def padded_logprobs(model, sequences, mask, width, keep=0):
    """Log-probs [B, T] of the tokens behind column `width`, from full logits. keep: positions with logits; 0: all of them."""
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    logits = model(sequences, attention_mask=mask, position_ids=positions, use_cache=False, logits_to_keep=keep).logits[:, :-1].float()
    return logits.log_softmax(-1).gather(-1, sequences[:, -logits.shape[1]:, None])[:, width - sequences.shape[1]:, 0]


def generate(policy, prompts, lengths, batches):
    """transformers.generate; row r ends after lengths[r] tokens -> a list of (input [B, L + T], mask, L, kept logits)."""
    eos, device, out, times = policy.tokenizer.eos_id, policy.device, [], len(lengths) // len(prompts)
    order, batches = sorted(range(len(prompts)), key=lambda i: len(prompts[i])), min(batches, len(prompts))
    for chunk in (order[len(order) * i // batches:len(order) * (i + 1) // batches] for i in range(batches)):
        width = max(len(prompts[i]) for i in chunk)
        tokens = torch.tensor([[eos] * (width - len(prompts[i])) + prompts[i] for i in chunk], device=device)
        mask = torch.tensor([[0] * (width - len(prompts[i])) + [1] * len(prompts[i]) for i in chunk], device=device)
        ends = torch.tensor([lengths[i * times + j] for i in chunk for j in range(times)], device=device)

        def stop(so_far, scores):
            scores[:, eos] = torch.where(ends == so_far.shape[1] - width + 1, 1e4, -1e4)                # noqa: B023
            return scores
        result = policy.model.generate(
            tokens, attention_mask=mask, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, use_cache=True, num_return_sequences=times,
            max_new_tokens=max(ends.tolist()), eos_token_id=eos, pad_token_id=eos, logits_processor=[stop], return_dict_in_generate=True,
            output_logits=len(ends) * max(ends.tolist()) * policy.model.config.vocab_size < 1 << 30)    # more than 4 GB are not worth keeping
        present = torch.arange(result.sequences.shape[1] - width, device=device) < ends[:, None]
        out.append((result.sequences, torch.cat([mask.repeat_interleave(times, 0), present.long()], 1), width, result.logits))
    return out


def gather(policy, made):
    """Log-probs of the sampled tokens from the logits that generate kept."""
    return [torch.stack([step.log_softmax(-1).gather(-1, sequences[:, width + t, None])[:, 0] for t, step in enumerate(logits)], 1)
            for sequences, _, width, logits in made]


def forward(policy, made):
    """The same by padded forwards, of as many rows as have at most 4 GB of logits."""
    out = []
    for sequences, mask, width, _ in made:
        keep = sequences.shape[1] - width + 1
        rows = max(1, (1 << 30) // (keep * policy.model.config.vocab_size))
        out += [padded_logprobs(policy.model, s, m, width, keep) for s, m in zip(sequences.split(rows), mask.split(rows))]
    return out


def compare_sampling(bench, policy, names, run, small=True):
    """Adds a row for each of `names`: run(seed) calls spiral.sample as many times. Generate repeats those calls, in turns with it.
    Not small: it takes the batches that were faster the time before, and memory is not measured."""
    arguments = lambda call: (policy, call[0][1], call[1].mask.sum(-1).tolist())                        # noqa: E731
    for seed in range(8 if policy.graphs else 1):                                                       # warm-up, and the trial
        _, calls = recorded("sample", lambda: run(seed))                                                # noqa: B023, with graphs of every shape to come
    if small:
        trial = {batches: clock(lambda: [generate(*arguments(call), batches) for call in calls])[1] for batches in (1, 4)}    # noqa: B023
        bench.batches = min(trial, key=trial.get)
    batches, runs, began = bench.batches, [], now()
    while bench.more(runs, began):
        (_, calls), whole = clock(lambda: recorded("sample", lambda: run(len(runs) + 1)))
        seconds = []                                                                                    # of generate, of the log-probs
        for call in calls:
            made, bare = clock(lambda: generate(*arguments(call), batches))                             # noqa: B023
            kept = all(logits is not None for *_, logits in made)
            ways = {way.__name__: clock(lambda: way(policy, made))[1] for way in ((gather, forward) if kept else (forward,))}        # noqa: B023
            seconds.append((bare, min(ways.values()), min(ways, key=ways.get)))
        runs.append((calls, whole, seconds))
    for i, name in enumerate(names):
        ours, theirs, lengths = [calls[i][2] for calls, *_ in runs], [seconds[i] for *_, seconds in runs], [arguments(calls[i])[2] for calls, *_ in runs]
        reads, flops = zip(*(work(policy.model, calls[i][0][1], n) for (calls, *_), n in zip(runs, lengths)))
        way, every = statistics.mode(t[2] for t in theirs), sum(lengths, [])
        row = row_of(ours, [t[0] + t[1] for t in theirs], list(map(sum, lengths)), bare=[t[0] for t in theirs],
                     bandwidth=sum(reads) / sum(ours) / bench.copy, flops=sum(flops) / sum(ours) / bench.matmul, generate=f"batches: {batches}, log-probs: {way}",
                     lengths={"mean": statistics.mean(every), "median": statistics.median(every), "max": max(every)})
        if small:
            call = runs[-1][0][i]
            row["memory"] = peak_memory(lambda: spiral.sample(spiral.replace(policy, slots=None), *call[0][1:]), policy.device)[1]          # noqa: B023, its slots too
            row["their_memory"] = peak_memory(lambda: globals()[way](policy, generate(*arguments(call), batches)), policy.device)[1]     # noqa: B023
        bench.add(name, row)
    if len(names) > 1:                                       # sampling, and what both need besides: prompts, rewards, advantages
        rest = [whole - sum(call[2] for call in calls) for calls, whole, _ in runs]
        bench.add("whole rollout", row_of([whole for _, whole, _ in runs], [r + sum(a + b for a, b, _ in s) for r, (*_, s) in zip(rest, runs)],
                                          [sum(int(call[1].mask.sum()) for call in calls) for calls, *_ in runs],
                                          bare=[r + sum(a for a, *_ in s) for r, (*_, s) in zip(rest, runs)]))


# ---- Update ----


def gradient(policy, groups, way):
    """Forward and backward of the loss of `groups` in micro-batches -> the gradients, in one vector."""
    policy.model.zero_grad()
    for prompts, owner, tokens, _, mask, advantages in spiral.micro_batches(groups, 8192, way == "shared"):
        if way == "padded":
            before, rows = max(map(len, prompts)), list(zip([prompts[u] for u in owner.tolist()], tokens.tolist(), mask.sum(-1).tolist()))
            sequences = spiral.pad([[0] * (before - len(prompt)) + prompt + row for prompt, row, _ in rows], policy.device)
            real = spiral.pad([[0] * (before - len(prompt)) + [1] * (len(prompt) + n) for prompt, _, n in rows] + [[0] * sequences.shape[1]], policy.device)
            logprobs = padded_logprobs.__wrapped__(policy.model, sequences, real[:-1], before)
        else:
            logprobs, _ = spiral.completion_logprobs(policy.model, prompts, owner, tokens, mask, 1.0, share_prefix=way == "shared")
        spiral.policy_loss(logprobs, logprobs.detach(), advantages, mask, 0.2).backward()
    return torch.cat([p.grad.flatten() for p in policy.model.parameters()])


def compare_update(bench, policy, name, groups, ways=("shared", "repeated")):
    """Adds rows: the shared prefix against the repeated prompt, and (padded) against a padded forward with full logits."""
    seconds, results, began = {way: [] for way in ways}, {}, now()
    lengths = [group.samples.mask.sum(-1).tolist() for group in groups]
    needed, trained = sum(len(group.prompt) + sum(row) - len(row) for group, row in zip(groups, lengths)), sum(map(sum, lengths))
    flops = 3 * sum(work(policy.model, [group.prompt], row)[1] for group, row in zip(groups, lengths))
    repeated = 3 * sum(work(policy.model, [group.prompt], [n])[1] for group, row in zip(groups, lengths) for n in row)
    for way in ways:
        policy.model.zero_grad()
        (results[way], peak), calls = recorded("hidden_states", lambda: peak_memory(lambda: gradient(policy, groups, way), policy.device))  # noqa: B023
        results[way] = {"gradient": results[way], "peak": peak, "padding": 1 - needed / max(1, sum(call[0][1].numel() for call in calls))}
    while bench.more(seconds["repeated"], began):
        for way in ways:
            seconds[way].append(clock(lambda: gradient(policy, groups, way))[1])                        # noqa: B023
    exact = results["shared"]["gradient"]
    for way in ways[1:]:
        row = row_of(seconds["shared"], seconds[way], [trained] * len(seconds[way]), memory=results["shared"]["peak"], their_memory=results[way]["peak"],
                     padding=results["shared"]["padding"], flops_ratio=repeated / flops, flops=flops / statistics.mean(seconds["shared"]) / bench.matmul,
                     gradient_difference=((results[way]["gradient"] - exact).norm() / exact.norm()).item())
        bench.add(f"{name}, {way}", row)


# ---- Cases ----


def rollout(bench):
    config, count, records = spiral.Config(device=str(bench.device)), 16 // bench.shrink, []
    policy, task = spiral.load_policy(config), tasks.make_task(config.task)
    problems = task.problems("train", 1000, 0)

    def run(seed):
        records[:] = spiral.rollout(policy, task, problems[count * seed:count * (seed + 1)], config,
                                    [torch.Generator().manual_seed(1000 * seed + i) for i in range(count)])
    compare_sampling(bench, policy, ["search", "aggregation"], run)
    groups = [spiral.Group(g.prompt, g.samples[g.advantages != 0], g.advantages[g.advantages != 0]) for r in records for g in r["groups"]]
    compare_update(bench, policy, "update", [group for group in groups if len(group.advantages)])


def sample_random(policy, low, high, prompts, limit, count, seed):
    torch.manual_seed(seed)
    return spiral.sample(policy, random_tokens(policy, low, high, prompts), limit, 1.0, count, torch.Generator().manual_seed(seed))


def ragged(bench, sizes=TINY):
    limit, chosen = 256 // bench.shrink, random_policy(bench, sizes)
    for batch in [1, 16, 64, 256, 1024][:2 if bench.quick else 5 if bench.large else 4]:
        compare_sampling(bench, chosen, [f"batch {batch}"], small=batch < 64,
                         run=lambda seed: sample_random(chosen, 16, 64, max(1, batch // 8), limit if batch > 1 else limit // 2, min(8, batch), seed))   # noqa: B023
        chosen = random_policy(bench, sizes, 56 // bench.shrink)
    _, ((args, samples, _),) = recorded("sample", lambda: sample_random(chosen, 16, 64, 8, limit, 8, 0))
    compare_update(bench, chosen, "update of 64", [spiral.Group(prompt, samples[8 * i:8 * i + 8], torch.randn(8, device=bench.device))
                                                   for i, prompt in enumerate(args[1])])


def aggregation(bench, sizes=TINY):
    policy = random_policy(bench, sizes, 64 // bench.shrink)
    for count in (4, 8):
        compare_sampling(bench, policy, [f"N2={count}"],
                         lambda seed: sample_random(policy, 1024 // bench.shrink, 4096 // bench.shrink, 1, 256 // bench.shrink, count, seed))       # noqa: B023


def aggregation_update(bench, sizes=TINY):
    policy = random_policy(bench, sizes)
    for count, low, high, *ways in ((4, 256, 1024, "shared", "repeated"), (8, 256, 1024, "shared", "repeated"), (8, 64, 256, "shared", "repeated", "padded")):
        torch.manual_seed(count)
        prompt = sum(random_tokens(policy, 256 // bench.shrink, 1024 // bench.shrink, 4), [])
        compare_update(bench, policy, f"N2={count} of {low}-{high}", [random_group(policy, prompt, low // bench.shrink, high // bench.shrink, count)], ways)


def vocabulary(bench):
    policy, count = random_policy(bench, {**TINY, "vocab_size": 151936}, 12), 4096 // bench.shrink ** 2
    hidden = torch.randn(count, TINY["hidden_size"], device=bench.device, dtype=bench.dtype, requires_grad=True)
    targets = torch.randint(151936, (count,), device=bench.device)
    ways = (lambda n: spiral.token_logprobs(policy.model, hidden[:n], targets[:n], 1.0)[0].sum().backward(),
            lambda n: spiral.head(policy.model, hidden[:n], 1.0).log_softmax(-1).gather(-1, targets[:n, None]).sum().backward())
    peaks, seconds, began = [peak_memory(lambda: way(count), bench.device)[1] for way in ways], [], now()          # noqa: B023
    while bench.more(seconds, began):                        # an eighth is enough for the speed
        seconds.append([clock(lambda: way(count // 8))[1] for way in ways])                             # noqa: B023
    bench.add(f"log-probs of {count}", row_of(*zip(*seconds), [count // 8] * len(seconds), memory=peaks[0], their_memory=peaks[1]))
    compare_sampling(bench, policy, ["sampling 16"], lambda seed: sample_random(policy, 16, 64, 2, 32, 8, seed))


def profile(out):
    """The operations of a default rollout by their own time, on one thread, as the profiler and as the clock have it."""
    torch.set_num_threads(1)
    config = spiral.Config(device="cpu")
    policy, task = spiral.load_policy(config), tasks.make_task(config.task)
    problems = task.problems("train", 48, 0)

    def run(seed):
        generators = [torch.Generator().manual_seed(1000 * seed + i) for i in range(16)]
        return spiral.rollout(policy, task, problems[16 * seed:16 * seed + 16], config, generators)
    run(0)
    _, seconds = clock(lambda: run(1))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as trace:
        run(2)
    text = f"{seconds:.2f} s for a rollout without the profiler\n{trace.key_averages().table(sort_by='self_cpu_time_total', row_limit=30, max_name_column_width=48)}"
    out.write_text("\n".join(line.rstrip() for line in text.split("\n")) + "\n")
    print(f"{text}\n{out}")


CASES = {"a": rollout, "b": ragged, "c": aggregation, "d": aggregation_update, "e": vocabulary}


# ---- The table ----


def table(rows):
    def cell(row, key, form, scale=1):
        value = row.get(key)
        return "" if value is None else format((value["median"] if isinstance(value, dict) else value) * scale, form)
    columns = [("ours/s", "ours", ".0f", 1), ("theirs/s", "theirs", ".0f", 1), ("bare", "bare", ".2f", 1), ("MB", "memory", ".0f", 1e-6),
               ("theirs", "their_memory", ".0f", 1e-6), ("bandwidth", "bandwidth", ".1%", 1), ("flops", "flops", ".1%", 1), ("padding", "padding", ".1%", 1),
               ("flops ratio", "flops_ratio", ".2f", 1)]
    print(f"\n{'':<29}{'ratio':>6}  {'(min to max, n)':<20}" + "".join(f"{title:>12}" for title, *_ in columns))
    for row in rows:
        ratio = row["ratio"]
        print(f"{row['case']:<29}{ratio['median']:6.2f}  " + f"({ratio['min']:.2f} to {ratio['max']:.2f}, {ratio['repetitions']})".ljust(20)
              + "".join(f"{cell(row, *rest):>12}" for _, *rest in columns))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--cases", default="a,b,c,d,e")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--cpu-time", action="store_true", help="seconds of the CPU, not of the wall; on a busy machine, with --threads 1")
    parser.add_argument("--large", action="store_true", help="batch 1024 too")
    parser.add_argument("--quick", action="store_true", help="smaller sizes, to see that it runs")
    parser.add_argument("--profile", action="store_true", help="of a default rollout, instead of the cases")
    parser.add_argument("--out", default="", help="default experiments/results/bench_cpu.json, or bench_cuda.json")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    transformers.utils.logging.disable_progress_bar()
    device, began, label, rows = spiral.pick_device(args.device), time.time(), [""], []
    folder, cuda = Path(__file__).resolve().parent, device.type == "cuda"
    out = Path(args.out or folder / "results" / f"bench_{device.type}.json")
    if args.profile:
        return profile(folder / "results" / "profile_cpu.txt")
    copy, matmul = machine_limits(device, torch.bfloat16 if cuda else torch.float32)
    info = Path("/proc/cpuinfo").read_text() if sys.platform == "linux" else ""
    machine = {"cpu": next((line.split(": ")[1] for line in info.split("\n") if line.startswith("model name")), platform.processor()),
               "cores": os.cpu_count(), "threads": torch.get_num_threads(), "clock": now.__name__, "load": os.getloadavg()[0], "gpu": torch.cuda.get_device_name() if cuda else None,
               "torch": torch.__version__, "transformers": transformers.__version__, "date": time.strftime("%Y-%m-%d %H:%M"),
               "commit": subprocess.run(["git", "describe", "--always", "--dirty"], cwd=folder, capture_output=True, text=True).stdout.strip(),
               "copy_GB_per_s": copy / 1e9, "matmul_GFlop_per_s": matmul / 1e9}
    print(machine, flush=True)

    def add(name, row):
        rows.append({"case": f"{label[0]} {name}", **row})
        print(f"{time.time() - began:5.0f}s  {rows[-1]['case']}: {row['ratio']['median']:.2f}x", flush=True)
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps({"machine": machine, "quick": args.quick, "seconds": round(time.time() - began), "rows": rows}, indent=1) + "\n")

    bench = SimpleNamespace(device=device, dtype=torch.float32, copy=copy, matmul=matmul, add=add, quick=args.quick, shrink=4 if args.quick else 1, large=args.large or cuda,
                            more=lambda done, since: len(done) < 2 or (len(done) < 7 and now() - since < (2 if args.quick else 3)))
    plans = [(letter, letter, ()) for letter in args.cases.split(",")]
    plans += [(f"{letter} {size}", letter, (QWEN[size],)) for size in QWEN for letter in sorted(set("bcd") & set(args.cases)) if cuda]      # bf16, random weights
    for label[0], letter, sizes in plans:
        bench.dtype = torch.bfloat16 if sizes else torch.float32
        try:
            CASES[letter](bench, *sizes)
        except torch.OutOfMemoryError as error:
            print(f"{label[0]}: {error}", flush=True)
            torch.cuda.empty_cache()
    table(rows)
    print(f"\n{time.time() - began:.0f} s; {out}")


if __name__ == "__main__":
    main()
