"""How noisy is set credit? Variance and signal of the search term's estimate on fixed weights, for each design of the sets (experiment 8).

    python experiments/gradient_noise.py                                    # the start policy, study.py's short setting
    python experiments/gradient_noise.py --model runs/study/spiral-0-... --name trained
    python experiments/gradient_noise.py --table                            # the table, from results/gradient_noise.json alone

Per problem and rollout: N1 = 16 traces, the gradient of each, and four aggregations of *every* set of 4, and of 2, of the first 8. Each
design then draws its sets and aggregations from these, again and again, and gives its advantages a to the traces:

    E |g|^2 = E a' G a, G the traces' gradients' products (no assumption on them);   |E g|^2 = the product of two rollouts' mean gradients.

The designs without bias share one mean gradient, that of all sets, in which the choice of sets makes no noise. Written per problem: second
moment, signal |E g|^2. The table: noise = variance / signal, both meant over problems, of one problem's rollout; and the sampled tokens after which
signal and noise of the summed gradient are level, tokens of a rollout * noise: what counts at an equal budget. 95% intervals: bootstrap over problems.
"""

import argparse
import itertools
import json
import platform
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import spiral  # noqa: E402
import tasks  # noqa: E402

DESIGNS = {   # name: (N1, n, K, N2, balanced, estimator); None: GRPO on N1 traces
    "random, K=4 N2=4": (8, 4, 4, 4, False, "leave-one-out"),
    "balanced, K=4 N2=4": (8, 4, 4, 4, True, "leave-one-out"),
    "published, K=4 N2=4": (8, 4, 4, 4, False, "published"),
    "random, K=8 N2=2": (8, 4, 8, 2, False, "leave-one-out"),
    "balanced, K=8 N2=2": (8, 4, 8, 2, True, "leave-one-out"),
    "all 70 sets, N2=2": (8, 4, 70, 2, False, "leave-one-out"),
    "balanced, N1=16 K=4 N2=2": (16, 4, 4, 2, True, "leave-one-out"),
    "sets of 2, balanced, K=4 N2=4": (8, 2, 4, 4, True, "leave-one-out"),
    "sets of 2, balanced, K=8 N2=2": (8, 2, 8, 2, True, "leave-one-out"),
    "grpo, 8 traces": None,
}
DRAWS, DIRECT, MOST = 64, 6, 4               # of a design per rollout; with N1 = 16, where sets are too many for all; aggregations of a set
RESULT = Path(__file__).parent / "results" / "gradient_noise.json"


def trace_gradients(policy, prompt, samples):
    """grad log pi(y_j | x) of each trace: [traces, parameters]."""
    rows = []
    for j in range(len(samples.tokens)):
        policy.model.zero_grad()
        one = samples[j:j + 1]
        logprobs, _ = spiral.completion_logprobs(policy.model, [prompt], torch.zeros(1, dtype=torch.long), one.tokens, one.mask, 1.0)
        logprobs.sum().backward()
        rows.append(torch.cat([p.grad.flatten() for p in policy.model.parameters()]))
    return torch.stack(rows)


def rewards_of_sets(policy, task, problem, traces, sets, num_aggregations, config, generator):
    """Rewards [sets, aggregations], and the mean tokens of an aggregation."""
    chosen = [[traces[j] for j in s] for s in sets.tolist()]
    _, samples, texts = spiral.aggregate(policy, task, [problem] * len(sets), chosen, config, num_aggregations, generator)
    return spiral.rewards_of(task, [problem] * len(sets), texts), samples.mask.sum().item() / len(samples.mask)


def rollout_advantages(policy, task, problem, traces, config, generator, pools):
    """{design: (advantages of its draws [draws, 16], their mean or that of all sets [16])}, and the mean tokens of an aggregation."""
    own, found, length = spiral.rewards_of(task, [problem], [traces[:8]]), {}, []
    wide = lambda a: torch.nn.functional.pad(a, (0, 16 - a.shape[-1]))                   # noqa: E731
    tables, means = {}, {}
    for n in (4, 2):
        sets = torch.tensor(list(itertools.combinations(range(8), n)))
        tables[n], tokens = rewards_of_sets(policy, task, problem, traces, torch.stack([s[torch.randperm(n, generator=generator)] for s in sets]), MOST, config, generator)
        means[n], length = wide(spiral.search_advantages(tables[n][None], sets[None], 8))[0], length + [tokens]
    for name, design in DESIGNS.items():
        if not design:
            found[name] = (a := wide(spiral.grpo_advantages(own))), a[0]
            continue
        num_traces, n, num_sets, num_aggregations, balanced, estimator = design
        if num_traces == 16:
            sets = torch.stack([spiral.draw_sets(16, n, num_sets, generator, balanced) for _ in range(DIRECT)])          # [D, K, n]
            rewards = rewards_of_sets(policy, task, problem, traces, sets.flatten(0, 1), num_aggregations, config, generator)[0]
            draws = spiral.search_advantages(rewards.view(DIRECT, num_sets, -1), sets, 16, balanced, estimator)
        else:
            sets, rows = pools[name]
            rewards = tables[n][rows]                                                                                    # [D, K, 4]
            order = torch.rand(rewards.shape, generator=generator).argsort(-1)[..., :num_aggregations]
            draws = spiral.search_advantages(rewards.gather(-1, order), sets, 8, balanced, estimator)
        shared = num_traces == 8 and estimator == "leave-one-out"
        found[name] = wide(draws), means[n] if shared else wide(draws).mean(0)
    return found, length[0], length[1]


def measure(policy, task, config, num_problems, num_rollouts):
    """{design: [problems][second moment, signal]}, and the mean tokens {trace, aggregation of 4, of 2}."""
    result, lengths, began = {name: [] for name in DESIGNS}, [], time.time()
    pools, generator = {}, torch.Generator().manual_seed(0)
    for name, design in DESIGNS.items():
        if design and design[0] == 8:
            place = {s: i for i, s in enumerate(itertools.combinations(range(8), design[1]))}
            sets = torch.stack([spiral.draw_sets(8, *design[1:3], generator, design[4]) for _ in range(DRAWS)])
            pools[name] = sets, torch.tensor([[place[tuple(sorted(s))] for s in drawn] for drawn in sets.tolist()])
    for number, problem in enumerate(task.problems("validation", num_problems, 1)):
        prompt, generator = policy.tokenizer.chat(task.prompt(problem)), torch.Generator().manual_seed(number)
        _, samples, (texts,) = spiral.search(policy, task, [problem], config, 16 * num_rollouts, generator)
        gradients = trace_gradients(policy, prompt, samples)
        products = (gradients @ gradients.T).view(num_rollouts, 16, num_rollouts, 16)
        rollouts = []
        for r in range(num_rollouts):
            with torch.no_grad():
                found, four, two = rollout_advantages(policy, task, problem, texts[16 * r:16 * r + 16], config, generator, pools)
            rollouts.append(found)
            lengths.append([samples.mask.sum().item() / len(samples.mask), four, two])
        for name, rows in result.items():
            second = [torch.einsum("di,ij,dj->d", draws, products[r, :, r], draws).mean().item() for r, draws in enumerate(f[name][0] for f in rollouts)]
            means = [f[name][1] for f in rollouts]
            crossed = [(means[r] @ products[r, :, q] @ means[q]).item() for r, q in itertools.combinations(range(num_rollouts), 2)]
            rows.append([float(f"{np.mean(second):.5g}"), float(f"{np.mean(crossed):.5g}")])
        print(f"problem {number + 1}/{num_problems}  {time.time() - began:.0f}s", flush=True)
    return result, [round(x, 2) for x in np.mean(lengths, 0).tolist()]


def table(result, draws=4000):
    """Lines of the table of all policies in the file."""
    lines = []
    for policy, entry in result.items():
        lines += [f"| {policy}: {entry['problems']} problems, {entry['rollouts']} rollouts each | variance | signal | noise | tokens until signal = noise |", "|---|---|---|---|---|"]
        trace, four, two = entry["lengths"]
        choice = np.random.default_rng(0).integers(entry["problems"], size=(draws, entry["problems"]))
        for name, pairs in entry["designs"].items():
            size = DESIGNS[name]
            tokens = size[0] * trace + size[2] * size[3] * (four if size[1] == 4 else two) if size else 8 * trace
            pairs = np.array(pairs)
            noise = lambda mean: (mean[..., 0] - mean[..., 1]) / np.maximum(mean[..., 1], 1e-9)             # noqa: E731
            low, high = np.quantile(noise(pairs[choice].mean(1)), (0.025, 0.975))
            second, signal = pairs.mean(0)
            show = lambda x: f"{x:,.0f}" if x < 1e6 else "unbounded"                                        # noqa: E731
            lines.append(f"| {name} | {second - signal:.0f} | {signal:.2f} | {show(noise(pairs.mean(0)))} ({show(low)} to {show(high)}) | "
                         f"{show(tokens * noise(pairs.mean(0)))} |")
        lines.append("")
    return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", type=int, default=40)
    parser.add_argument("--rollouts", type=int, default=6, help="per problem")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--name", default="start", help="what the result calls this policy")
    parser.add_argument("--table", action="store_true", help="print the table from the result file, and stop")
    args = parser.parse_args()
    result = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    if not args.table:
        torch.set_num_threads(1)
        config = spiral.Config(model=args.model, max_trace_tokens=24, max_aggregation_tokens=48)
        designs, lengths = measure(spiral.load_policy(config), tasks.make_task(config.task), config, args.problems, args.rollouts)
        result = json.loads(RESULT.read_text()) if RESULT.exists() else {}              # another policy's may have come meanwhile
        result[args.name] = {"machine": f"{platform.machine()}, 1 thread, torch {torch.__version__}", "problems": args.problems, "rollouts": args.rollouts,
                             "lengths": lengths, "designs": designs}
        RESULT.write_text(json.dumps(result) + "\n")
    print("\n".join(table(result)))


if __name__ == "__main__":
    main()
