"""How noisy is each credit of search? Measured on fixed weights (see README.md).

    python experiments/gradient_noise.py --name start                      # the start policy
    python experiments/gradient_noise.py --seed 1 --name "start, seed 1"   # on other problems
    python experiments/gradient_noise.py --model runs/X/step-00060 --name "after training"
    python experiments/plot.py --table noise                               # the table

Per problem and rollout: 8 traces, the gradient of each, and four aggregations of *every* set of 4
of them. Their set credit is the search term's exact estimate without the noise of choosing sets;
over rollouts it gives the true gradient. Every credit of CREDITS is

    a = curve_advantages(g) + weight * search_advantages(f - g(c))       of some sets, drawn anew

(set credit: g = 0), so E |sum_j a_j grad log pi(y_j)|^2 = E a' G a, with G the products of the
traces' gradients, and products of means come from two different rollouts.
"""

import argparse
import itertools
import json
import math
import sys
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import spiral  # noqa: E402
import tasks  # noqa: E402

RESULT = Path(__file__).parent / "results/gradient_noise.json"
N1, N, N2 = 8, 4, 4  # traces, traces in a set, aggregations of each set
SETS = [list(chosen) for chosen in itertools.combinations(range(N1), N)]  # all 70
DRAWS = 64  # of sets
CREDITS = {  # name: (curve g or None for the measured one, weight of the residual, K, N2)
    "set, K=4 N2=4": ([0.0] * 5, 1, 4, 4),
    "set, K=8 N2=2": ([0.0] * 5, 1, 8, 2),
    "curve + residual": (None, 1, 4, 4),
    "curve + residual / 4": (None, 0.25, 4, 4),
    "curve": (None, 0, 4, 4),
    "pass@4": ([0.0, 1, 1, 1, 1], 0, 4, 4),
    "trace": ([0, 0.25, 0.5, 0.75, 1], 0, 4, 4),
}


def roll_out(policy, task, problem, config, rollouts, generator):
    """Products of the traces' gradients [R, N1, R, N1], rewards of the traces [R, N1] and of the
    aggregations of every set [R, 70, N2], and the tokens of a default rollout."""
    count = rollouts * N1
    group = spiral.search(policy, task, [problem], config, count, generator)[0]
    parameters, gradients = [*policy.model.parameters()], []
    for c in group.completions:
        one = spiral.Group(group.prompt, [c])
        score = spiral.completion_logprobs(policy.model, [one], 1.0)[0].sum()
        gradient = torch.autograd.grad(score, parameters)
        gradients.append(torch.cat([part.flatten() for part in gradient]))
    gradients = torch.stack(gradients)
    products = (gradients @ gradients.T).view(rollouts, N1, rollouts, N1)
    rewards = spiral.rewards_of([group]).view(rollouts, N1)
    sets = []
    for start in range(0, count, N1):
        sets += [[start + j for j in chosen] for chosen in SETS]
    (answers,) = spiral.aggregate(policy, task, [problem], [group], [sets], config, N2, generator)
    scores = spiral.rewards_of(answers).view(rollouts, len(SETS), N2)
    tokens = sum(len(c.tokens) for c in group.completions) / rollouts
    lengths = [len(c.tokens) for answer in answers for c in answer.completions]
    return products, rewards, scores, tokens + 16 * sum(lengths) / len(lengths)


def moments(products, rewards, scores, curve, weight, num_sets, num_aggregations):
    """Of a credit, for one problem: E|g|^2, E g . E g, E g . t and t . t, t the true gradient."""
    rollouts, generator = len(rewards), torch.Generator().manual_seed(0)
    every = torch.tensor(SETS).expand(rollouts, -1, -1)  # [R, 70, n]
    right = rewards[:, SETS].sum(-1).long()  # [R, 70]
    plain = spiral.curve_advantages(rewards, curve, N)  # [R, N1]
    residual = weight * (scores - curve[right][..., None])  # [R, 70, N2]
    true = spiral.search_advantages(scores, every, N1)
    mean = plain + spiral.search_advantages(residual, every, N1)
    result = []
    for a, b in ((mean, mean), (mean, true), (true, true)):
        pairs = torch.einsum("ri,riqj,qj->rq", a, products, b)  # independent off the diagonal
        result.append((pairs.sum() - pairs.trace()).item() / (rollouts * (rollouts - 1)))
    drawn = [spiral.draw_sets(N1, N, num_sets, generator, True) for _ in range(DRAWS)]
    rows = [[SETS.index(sorted(chosen)) for chosen in sets.tolist()] for sets in drawn]
    part = residual[:, rows, :num_aggregations].flatten(0, 1)  # [R * D, K, N2]
    noisy = spiral.search_advantages(part, torch.stack(drawn).repeat(rollouts, 1, 1), N1, True)
    noisy = noisy.view(rollouts, DRAWS, N1) + plain[:, None]
    second = torch.einsum("rdi,rirj,rdj->rd", noisy, products, noisy).mean().item()
    return [second, *result]


def lattice_bias(curve, words=16, policies=1000):
    """(slope, cosine) of curve credit's mean along the gradient of E g(c), when the N1 traces are
    one lattice: over random policies that say one word, about half of which are right. Exact: the
    words change at finitely many shifts of a lattice."""
    generator, ours, true = torch.Generator().manual_seed(0), [], []
    for _ in range(policies):
        logits = 2 * torch.randn(words, dtype=torch.float64, generator=generator)
        rewards = (torch.rand(words, generator=generator) < 0.5).double()
        policy = logits.requires_grad_().softmax(0)  # [V]
        right = policy @ rewards
        chances = [math.comb(N, c) * right**c * (1 - right) ** (N - c) for c in range(N + 1)]
        true += torch.autograd.grad(torch.stack(chances) @ curve.double(), logits)
        cdf = policy.detach().cumsum(0)
        shifts = torch.cat([cdf.new_tensor([0, 1]), cdf * N1 % 1]).sort()[0]  # where words change
        middles = (shifts[1:] + shifts[:-1])[:, None] / 2  # [S, 1], of these intervals
        said = torch.searchsorted(cdf, (torch.arange(N1) + middles) / N1)  # [S, N1] words
        said.clamp_(max=words - 1)
        credit = spiral.curve_advantages(rewards[said], curve, N).double()  # [S, N1]
        scores = torch.eye(words)[said] - policy.detach()  # [S, N1, V] grad log pi
        ours.append(shifts.diff() @ (credit[:, None] @ scores)[:, 0])  # [V], over all shifts
    ours, true = torch.stack(ours), torch.stack(true)
    along = (ours * true).sum()
    return [(along / x).item() for x in (true.norm() ** 2, true.norm() * ours.norm())]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--sizes", type=int, nargs=2, default=(40, 6), help="problems, rollouts")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--name", required=True, help="what the result calls this policy")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    config = spiral.Config(model=args.model, max_trace_tokens=24, max_aggregation_tokens=48)
    policy, task = spiral.load_policy(config), tasks.make_task(config.task)
    generator = torch.Generator().manual_seed(args.seed)
    count, rollouts = args.sizes
    problems = tqdm(task.problems("validation", count, args.seed))
    found = [roll_out(policy, task, x, config, rollouts, generator) for x in problems]
    _, rewards, scores, tokens = zip(*found, strict=True)
    right = torch.stack(rewards)[..., SETS].sum(-1)  # [problems, R, 70]
    measured = [torch.stack(scores)[right == c].mean().item() for c in range(N + 1)]
    entry = {"command": sys.argv, "tokens": sum(tokens) / len(tokens), "curve": measured}
    entry |= {"credits": {}, "lattice_bias": {}}
    for name, (curve, *design) in CREDITS.items():
        curve = torch.tensor(curve or measured)
        entry["credits"][name] = [moments(*each[:3], curve, *design) for each in found]
        if design[0] == 0:  # no residual
            entry["lattice_bias"][name] = lattice_bias(curve)
    result = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    RESULT.write_text(json.dumps(result | {args.name: entry}) + "\n")


if __name__ == "__main__":
    main()
