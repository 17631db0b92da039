"""How noisy is set credit? Variance and signal of the search-term estimate on fixed weights, for each design of the sets.

    python experiments/gradient_noise.py                # writes experiments/results/gradient_noise.json, prints the table
    python experiments/gradient_noise.py --simulate     # no model: sum_j a_j^2, in seconds; writes gradient_noise_simulated.json

Each rollout samples N1 traces once and differentiates each of them; every design then draws its own sets and aggregations
(all cost the same N1 + K N2 completions) and weighs the same trace gradients with its own advantages. Per problem:
variance = E|g - E g|^2 over rollouts, signal = |E g|^2 without its bias. Reported: their means over problems, and the
relative noise sqrt(variance / signal), which doesn't depend on a design's scale.

A few problems have nearly all the variance, so this settles only large differences. --simulate: traces are right with probability 0.35,
an aggregation of n right traces of 4 with probability SCORE[n]; were the traces' gradients orthogonal and of one length, the variance
of the estimate would be proportional to E[sum_j a_j^2]. The designs without bias have one mean, so these numbers compare.
"""

import argparse
import json
import platform
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import spiral  # noqa: E402
import tasks  # noqa: E402

DESIGNS = {   # name: (K, N2, balanced, estimator)
    "random K=4 N2=4": (4, 4, False, "leave-one-out"),
    "balanced K=4 N2=4": (4, 4, True, "leave-one-out"),
    "published K=4 N2=4": (4, 4, False, "published"),
    "random K=8 N2=2": (8, 2, False, "leave-one-out"),
    "balanced K=8 N2=2": (8, 2, True, "leave-one-out"),
}

SCORE = (0.15, 0.45, 0.65, 0.8, 0.9)


def simulate(draws=20_000):
    """{design: (E sum_j a_j^2, its standard error)}."""
    found = {}
    for name, (num_sets, num_aggregations, balanced, estimator) in DESIGNS.items():
        torch.manual_seed(0)
        sets = torch.stack([spiral.draw_sets(8, 4, num_sets, balanced=balanced) for _ in range(draws)])                 # [D, K, n]
        right = (torch.rand(draws, 8) < 0.35).long()
        chance = torch.tensor(SCORE)[right.gather(1, sets.flatten(1)).view(sets.shape).sum(-1)]                          # [D, K]
        rewards = (torch.rand(draws, num_sets, num_aggregations) < chance[..., None]).float()
        energy = spiral.search_advantages(rewards, sets, 8, balanced, estimator).square().sum(1)
        found[name] = energy.mean().item(), energy.std().item() / draws ** 0.5
    return found


def trace_gradients(policy, prompt, samples):
    """grad log pi(y_j | x) of each trace: [N1, parameters]."""
    rows = []
    for j in range(len(samples.tokens)):
        policy.model.zero_grad()
        one = samples[j:j + 1]
        logprobs, _ = spiral.completion_logprobs(policy.model, [prompt], torch.zeros(1, dtype=torch.long), one.tokens, one.mask, 1.0)
        logprobs.sum().backward()
        rows.append(torch.cat([p.grad.flatten() for p in policy.model.parameters()]))
    return torch.stack(rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", type=int, default=16)
    parser.add_argument("--rollouts", type=int, default=24, help="per problem")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--simulate", action="store_true", help="no model, no gradients: advantages alone")
    args = parser.parse_args()
    results = Path(__file__).parent / "results"
    if args.simulate:
        found = simulate()
        (results / "gradient_noise_simulated.json").write_text(json.dumps(found, indent=1) + "\n")
        return print("\n".join(f"{name:<22}{mean:8.4f} ± {error:.4f}" for name, (mean, error) in found.items()))
    config = spiral.Config(model=args.model)
    if args.threads:
        torch.set_num_threads(args.threads)
    policy, task, began = spiral.load_policy(config), tasks.make_task(config.task), time.time()
    per_problem = {name: [] for name in [*DESIGNS, "grpo N1=8"]}
    for number, problem in enumerate(task.problems("validation", args.problems, 1)):
        prompt, estimates = policy.tokenizer.chat(task.prompt(problem)), {name: [] for name in per_problem}
        for rollout in range(args.rollouts):
            generator = torch.Generator().manual_seed(1000 * number + rollout)
            samples, (traces,) = spiral.sample_texts(policy, [prompt], config.max_trace_tokens, config, config.num_traces, generator)
            gradients = trace_gradients(policy, prompt, samples)
            for name, (num_sets, num_aggregations, balanced, estimator) in DESIGNS.items():
                sets = spiral.draw_sets(config.num_traces, config.set_size, num_sets, generator, balanced)
                prompts = [spiral.aggregation_prompt(policy.tokenizer, task.prompt(problem), [traces[j] for j in s]) for s in sets.tolist()]
                texts = spiral.sample_texts(policy, prompts, config.max_aggregation_tokens, config, num_aggregations, generator)[1]
                rewards = spiral.rewards_of(task, [problem] * num_sets, texts)[None]
                advantages = spiral.search_advantages(rewards, sets[None], config.num_traces, balanced, estimator)[0]
                estimates[name].append(advantages @ gradients)
            own = spiral.rewards_of(task, [problem], [traces])
            estimates["grpo N1=8"].append(spiral.grpo_advantages(own)[0] @ gradients)
        for name, rows in estimates.items():
            rows = torch.stack(rows)
            mean, variance = rows.mean(0), rows.var(0).sum().item()
            per_problem[name].append((variance, mean.square().sum().item() - variance / args.rollouts))
        print(f"problem {number + 1}/{args.problems}  {time.time() - began:.0f}s", flush=True)
    result = {"machine": f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}", "problems": args.problems,
              "rollouts": args.rollouts, "per_problem_variance_and_signal": per_problem}
    (results / "gradient_noise.json").write_text(json.dumps(result))
    print(f"{'design':<22}{'variance':>10}{'signal':>10}{'noise/signal':>14}")
    for name, pairs in per_problem.items():
        variance, signal = torch.tensor(pairs, dtype=torch.float64).mean(0).tolist()
        print(f"{name:<22}{variance:10.3f}{signal:10.3f}{(variance / max(signal, 1e-9)) ** 0.5:14.1f}")


if __name__ == "__main__":
    main()
