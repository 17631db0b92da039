"""How noisy is each credit of search? Measured on fixed weights; CREDIT.md explains the results.

    python experiments/gradient_noise.py --name start                      # the untrained policy
    python experiments/gradient_noise.py --seed 1 --name "start, seed 1"   # on other problems
    python experiments/gradient_noise.py --model runs/X/step-00060 --name "after training"
    python experiments/plot.py --table noise start                         # the table

A rollout of a problem holds 8 traces, the gradient of each, and four aggregations of *every* set of
4 of them. Set credit over all 70 sets is the search term's exact estimate, without the noise of
choosing sets; its mean over rollouts is the true gradient. Every credit of CREDITS is

    a = curve_advantages(g) + weight * search_advantages(f - g(c))       of some sets, drawn anew

(set credit: g = 0). With G the products of the traces' gradients, the squared length of
sum_j a_j grad log pi(y_j) is a' G a. Products of two means come from two different rollouts.
"""

import argparse
import itertools
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import spiral  # noqa: E402
import tasks  # noqa: E402
from experiments import credits  # noqa: E402

RESULT = Path(__file__).parent / "results/gradient_noise.json"
NUM_TRACES = 8  # N1
SET_SIZE = 4  # n
NUM_AGGREGATIONS = 4  # N2, of every set
SETS = [list(chosen) for chosen in itertools.combinations(range(NUM_TRACES), SET_SIZE)]  # all 70
DRAWS = 64  # how often sets are drawn from a rollout


@dataclass
class Credit:
    curve: list | None  # g(0) .. g(n); None: as measured in the rollouts
    residual: float = 0  # weight of the set credit of f - g(c)
    num_sets: int = 4  # K
    num_aggregations: int = 4  # N2


CREDITS = {
    "set, K=4 N2=4": Credit([0, 0, 0, 0, 0], residual=1),
    "set, K=8 N2=2": Credit([0, 0, 0, 0, 0], residual=1, num_sets=8, num_aggregations=2),
    "set, K=16 N2=1": Credit([0, 0, 0, 0, 0], residual=1, num_sets=16, num_aggregations=1),
    "curve + residual": Credit(None, residual=1),
    "curve + residual / 4": Credit(None, residual=0.25),
    "curve": Credit(None),
    "pass@4": Credit([0, 1, 1, 1, 1]),
    "trace": Credit([0, 0.25, 0.5, 0.75, 1]),
}


@dataclass
class Rollouts:
    """R rollouts of one problem."""

    products: torch.Tensor  # [R, N1, R, N1] of the traces' gradients
    rewards: torch.Tensor  # [R, N1] of the traces
    scores: torch.Tensor  # [R, 70, N2] rewards of the aggregations of every set
    tokens: float  # sampled by a rollout of the usual sizes


# ---- Rollouts, by spiral.py ----------------------------------------------------------------------


def gradient_of(policy, prompt, completion):
    """The gradient of the completion's log-probability by all weights: one long vector."""
    alone = spiral.Group(prompt, [completion])
    logprobs = spiral.completion_logprobs(policy.model, [alone], 1.0)[0]
    parts = torch.autograd.grad(logprobs.sum(), list(policy.model.parameters()))
    return torch.cat([part.flatten() for part in parts])


def roll_out(policy, task, problem, config, num_rollouts, generator):
    """Rollouts of one problem."""
    num_traces = num_rollouts * NUM_TRACES
    (traces,) = spiral.search(policy, task, [problem], config, num_traces, [generator])
    gradients = torch.stack(
        [gradient_of(policy, traces.prompt, completion) for completion in traces.completions]
    )
    products = gradients @ gradients.T

    sets = []
    for start in range(0, num_traces, NUM_TRACES):
        sets += [[start + member for member in chosen] for chosen in SETS]
    sets = torch.tensor(sets)
    spiral.aggregate(policy, task, [traces], [sets], config, NUM_AGGREGATIONS, [generator])
    answers = traces.aggregations

    trace_tokens = spiral.statistics([traces])["tokens"] / num_rollouts
    mean_length = spiral.statistics(answers)["length"]
    return Rollouts(
        products=products.view(num_rollouts, NUM_TRACES, num_rollouts, NUM_TRACES),
        rewards=spiral.rewards_of([traces]).view(num_rollouts, NUM_TRACES),
        scores=spiral.rewards_of(answers).view(num_rollouts, len(SETS), NUM_AGGREGATIONS),
        tokens=trace_tokens + config.num_sets * config.num_aggregations * mean_length,
    )


# ---- Moments -------------------------------------------------------------------------------------


def mean_product(left, right, products):
    """The product of the mean gradients with advantages left and right [R, N1]."""
    pairs = torch.einsum("ri,riqj,qj->rq", left, products, right)  # of two rollouts
    num_rollouts = len(pairs)
    independent = pairs.sum() - pairs.trace()  # not of a rollout with itself
    return independent.item() / (num_rollouts * (num_rollouts - 1))


def moments(rollouts, credit, curve):
    """Of a credit's gradient g, for one problem: E|g|^2, E g . E g, E g . t and t . t, with t the
    true gradient."""
    rewards = rollouts.rewards
    scores = rollouts.scores
    num_rollouts = len(rewards)
    all_sets = torch.tensor(SETS).expand(num_rollouts, -1, -1)  # [R, 70, n]
    num_right = rewards[:, SETS].sum(-1).long()  # [R, 70]
    from_curve = credits.curve_advantages(rewards, curve, SET_SIZE)  # [R, N1]
    residual = credit.residual * (scores - curve[num_right][..., None])  # [R, 70, N2]

    true = spiral.search_advantages(scores, all_sets, NUM_TRACES)  # [R, N1]
    mean = from_curve + spiral.search_advantages(residual, all_sets, NUM_TRACES)

    generator = torch.Generator().manual_seed(0)
    drawn = [
        spiral.draw_sets(NUM_TRACES, SET_SIZE, credit.num_sets, generator, balanced=True)
        for _ in range(DRAWS)
    ]
    indices = [[SETS.index(sorted(chosen)) for chosen in sets.tolist()] for sets in drawn]
    of_drawn = residual[:, indices, : credit.num_aggregations].flatten(0, 1)  # [R * D, K, N2]
    drawn_sets = torch.stack(drawn).repeat(num_rollouts, 1, 1)  # [R * D, K, n]
    noisy = spiral.search_advantages(of_drawn, drawn_sets, NUM_TRACES, balanced=True)
    noisy = noisy.view(num_rollouts, DRAWS, NUM_TRACES) + from_curve[:, None]
    squares = torch.einsum("rdi,rirj,rdj->rd", noisy, rollouts.products, noisy)
    return [
        squares.mean().item(),
        mean_product(mean, mean, rollouts.products),
        mean_product(mean, true, rollouts.products),
        mean_product(true, true, rollouts.products),
    ]


# ---- Lattices ------------------------------------------------------------------------------------


def true_gradient(logits, rewards, curve):
    """Of the expected g(c) of n independent words: [V]."""
    right = logits.softmax(0) @ rewards
    expected = 0
    for count in range(SET_SIZE + 1):
        wrong = SET_SIZE - count
        chance = math.comb(SET_SIZE, count) * right**count * (1 - right) ** wrong
        expected = expected + chance * curve[count].double()
    return torch.autograd.grad(expected, logits)[0]


def lattice_estimate(policy, rewards, curve):
    """Curve credit's expected gradient [V] when the N1 words are one lattice. Exact: as the shift
    of the lattice goes from 0 to 1, its words change at finitely many places."""
    num_words = len(policy)
    cdf = policy.cumsum(0)
    ends = cdf.new_tensor([0, 1])
    shifts = torch.cat([ends, cdf * NUM_TRACES % 1]).sort()[0]
    middles = (shifts[1:] + shifts[:-1])[:, None] / 2  # [S, 1] of the intervals between them
    words = torch.searchsorted(cdf, (torch.arange(NUM_TRACES) + middles) / NUM_TRACES)  # [S, N1]
    words = words.clamp(max=num_words - 1)
    advantages = credits.curve_advantages(rewards[words], curve, SET_SIZE).double()  # [S, N1]
    log_gradients = torch.eye(num_words)[words] - policy  # [S, N1, V]
    gradients = (advantages[:, None] @ log_gradients)[:, 0]  # [S, V]
    return shifts.diff() @ gradients


def lattice_bias(curve, num_words=16, num_policies=1000):
    """Slope and cosine of curve credit's expected gradient along the true one, when the traces of
    a problem are one lattice. Over random policies that say one word; half of the words are right.
    """
    generator = torch.Generator().manual_seed(0)
    estimates = []
    gradients = []
    for _ in range(num_policies):
        logits = 2 * torch.randn(num_words, dtype=torch.float64, generator=generator)
        rewards = (torch.rand(num_words, generator=generator) < 0.5).double()
        gradients.append(true_gradient(logits.requires_grad_(), rewards, curve))
        policy = logits.detach().softmax(0)
        estimates.append(lattice_estimate(policy, rewards, curve))
    estimate = torch.stack(estimates)
    true = torch.stack(gradients)
    along = (estimate * true).sum()
    slope = along / true.norm() ** 2
    cosine = along / (true.norm() * estimate.norm())
    return [slope.item(), cosine.item()]


# ---- Command line --------------------------------------------------------------------------------


def measure_curve(rollouts):
    """How often aggregations are right when 0 to n of their candidates are."""
    scores = torch.stack([each.scores for each in rollouts])  # [problems, R, 70, N2]
    rewards = torch.stack([each.rewards for each in rollouts])
    num_right = rewards[..., SETS].sum(-1)  # [problems, R, 70]
    return [scores[num_right == count].mean().item() for count in range(SET_SIZE + 1)]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", type=int, nargs=2, default=(40, 6), help="problems, rollouts")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--name", required=True, help="what the result calls this policy")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    config = spiral.Config(model=args.model)
    policy = spiral.load_policy(config)
    task = tasks.make_task(config.task)
    generator = torch.Generator().manual_seed(args.seed)
    num_problems, num_rollouts = args.sizes
    rollouts = []
    for problem in tqdm(task.problems("validation", num_problems, args.seed)):
        rollouts.append(roll_out(policy, task, problem, config, num_rollouts, generator))

    measured_curve = measure_curve(rollouts)
    entry = {
        "command": sys.argv,
        "tokens": sum(each.tokens for each in rollouts) / len(rollouts),
        "curve": measured_curve,
        "credits": {},
        "lattice_bias": {},
    }
    for name, credit in CREDITS.items():
        curve = torch.tensor(credit.curve or measured_curve, dtype=torch.float32)
        entry["credits"][name] = [moments(each, credit, curve) for each in rollouts]
        if credit.residual == 0:
            entry["lattice_bias"][name] = lattice_bias(curve)
    result = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    RESULT.write_text(json.dumps(result | {args.name: entry}) + "\n")


if __name__ == "__main__":
    main()
