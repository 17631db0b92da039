"""Tests of credits.py: credit for traces that the verifier has looked at."""

import itertools
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.functional import one_hot
from torch.testing import assert_close

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import spiral  # noqa: E402
from experiments import credits  # noqa: E402

each = pytest.mark.parametrize


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def all_tuples(length, choices):
    """[choices ** length, length]: every tuple of numbers below `choices`."""
    return torch.cartesian_prod(*[torch.arange(choices)] * length)


# ---- Curve credit ----


@each("set_size", [1, 2, 3, 4])
def test_curve_credit_is_the_mean_over_all_sets_with_a_trace_minus_those_without(set_size):
    """Times n / N1; for every pattern of right and wrong among five traces."""
    rewards = all_tuples(5, 2).float()  # [32, 5]
    curve = torch.rand(set_size + 1, generator=seeded())
    sets = torch.tensor(list(itertools.combinations(range(5), set_size)))  # [S, n]
    scores = curve[rewards[:, sets].sum(2).long()]  # [32, S]
    credit = credits.curve_advantages(rewards, curve, set_size)
    for trace in range(5):
        holds = (sets == trace).any(1)  # [S]
        difference = scores[:, holds].mean(1) - scores[:, ~holds].mean(1)
        assert_close(credit[:, trace], set_size / 5 * difference)


def test_the_straight_curve_makes_it_grpo():
    """Of 160 traces: their sets of 16 are more than int64 holds."""
    rewards = all_tuples(5, 2).float().view(1, -1)
    credit = credits.curve_advantages(rewards, torch.arange(17) / 16, 16)
    assert_close(credit, spiral.grpo_advantages(rewards))


# Curve credit has a bias, which depends on the curve. With set credit for what the curve leaves
# unexplained added to it, that is for f(G) - g(how many in G are right), it has none. This is
# shown by complete enumeration, as for set credit in the tests of spiral.py: of every list of N1
# traces, of three different texts, and every choice of K sets. A set's score is a fixed number for
# each content in its order here: credit is linear in the scores, so the aggregator's luck is no
# matter.


def all_families(num_traces, set_size, num_sets, balanced):
    """[F, K, n]: every choice of K distinct sets, or of the balanced ones only."""
    subsets = itertools.combinations(range(num_traces), set_size)
    families = torch.tensor(list(itertools.combinations(subsets, num_sets)))
    if balanced:
        uses = one_hot(families, num_traces).sum((1, 2))  # [F, N1]
        families = families[(uses == num_sets * set_size / num_traces).all(1)]
    return families


TEXT_REWARDS = torch.tensor([1.0, 0.0, 1.0]).double()  # the verifier's, of the three texts


@each("curve", [[0.2, 0.3, 0.9], [0.0, 0.5, 1.0], [0.9, 0.0, 0.4]])
@each("balanced", [False, True])
@each("sizes", [(4, 2, 2), (4, 2, 4), (3, 2, 3)])
def test_curve_credit_and_set_credit_for_the_residual_are_unbiased(sizes, balanced, curve):
    """Whatever the curve is."""
    num_traces, set_size, num_sets = sizes
    curve = torch.tensor(curve)
    theta = torch.randn(3, generator=seeded()).double().requires_grad_()
    set_scores = torch.rand([3] * set_size, generator=seeded(1)).double()  # f, by the contents

    trace_lists = all_tuples(num_traces, 3)
    families = all_families(num_traces, set_size, num_sets, balanced)
    numbers = torch.cartesian_prod(torch.arange(len(trace_lists)), torch.arange(len(families))).T
    traces, sets = trace_lists[numbers[0]], families[numbers[1]]  # [P, N1], [P, K, n]
    logprobs = theta.log_softmax(0)[traces]  # [P, N1]
    chances = logprobs.sum(1).exp() / len(families)  # [P]

    contents = traces.gather(1, sets.flatten(1)).view(sets.shape)  # [P, K, n]
    scores = set_scores[contents.unbind(2)]  # [P, K]
    right = TEXT_REWARDS[contents].sum(2).long()  # [P, K]
    residual = (scores - curve[right])[:, :, None]  # [P, K, 1]
    credit = credits.curve_advantages(TEXT_REWARDS[traces], curve, set_size)
    credit = credit + spiral.search_advantages(residual, sets, num_traces, balanced=balanced)
    estimate = chances.detach() @ (credit * logprobs).sum(1)
    (expected,) = torch.autograd.grad(estimate, theta)

    list_chances = theta.log_softmax(0)[all_tuples(set_size, 3)].sum(1).exp()
    (truth,) = torch.autograd.grad(list_chances @ set_scores.flatten(), theta)
    assert_close(expected, truth, rtol=1e-5, atol=1e-7)


# ---- The response curve, and what --search-credit names ----


def group_of(rewards, **fields):
    """A Group whose completions have these rewards."""
    completions = [spiral.Completion(reward=float(reward)) for reward in rewards]
    return spiral.Group([], completions, **fields)


def problem_of(trace_rewards, answers):
    """answers: {which two traces a set holds: rewards of its aggregations}."""
    aggregations = []
    for candidates, rewards in answers.items():
        aggregations.append(group_of(rewards, candidates=list(candidates)))
    return group_of(trace_rewards, aggregations=aggregations)


FIRST = problem_of([1, 1, 0, 0], {(0, 1): [1, 0], (2, 0): [1, 1], (3, 2): [0, 0]})
SECOND = problem_of([1, 0, 0, 0], {(0, 1): [0, 0], (2, 3): [0, 1]})
THIRD = problem_of([1, 1, 1, 0], {(3, 1): [1, 1, 1]})


def test_the_response_curve_counts_right_aggregations_by_right_candidates():
    """A guess of c / n is one more aggregation of each kind."""
    counts = credits.response_counts(FIRST, set_size=2)
    assert counts.tolist() == [[0, 2, 1], [2, 2, 2]]
    expected = torch.tensor([(0 + 0) / 3, (2 + 0.5) / 3, (1 + 1) / 3])
    assert_close(credits.response_curve(counts), expected)
    guess = credits.response_curve(torch.zeros(2, 5))
    assert_close(guess, torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0]))


def test_curve_credit_leaves_the_problem_itself_out_of_the_curve():
    groups = [FIRST, SECOND, THIRD]
    found = credits.verified_credit(groups, "curve", set_size=2)
    counts = [credits.response_counts(group, 2) for group in groups]
    others = [counts[1] + counts[2], counts[0] + counts[2], counts[0] + counts[1]]
    for group, other_counts, credit in zip(groups, others, found, strict=True):
        curve = credits.response_curve(other_counts)
        rewards = spiral.rewards_of([group])
        assert_close(credit, credits.curve_advantages(rewards, curve, 2)[0])


def test_a_problem_alone_is_credited_by_the_guess():
    found = credits.verified_credit([FIRST], "curve", set_size=2)
    assert_close(found, spiral.grpo_advantages(spiral.rewards_of([FIRST])))


def test_trace_credit_is_grpos():
    groups = [FIRST, SECOND, THIRD]
    found = credits.verified_credit(groups, "trace", set_size=2)
    assert_close(found, spiral.grpo_advantages(spiral.rewards_of(groups)))


def test_pass_credit_is_what_a_trace_adds_to_the_chance_of_a_right_one():
    """Sets of two of four traces. Where one trace is right, all three sets with it hold a right
    one, none of the three without it does. Where two are, two of three without the first do."""
    found = credits.verified_credit([FIRST, SECOND], "pass", set_size=2)
    right_of_two = 2 / 4 * (1 - 2 / 3)
    wrong_beside_two = 2 / 4 * (2 / 3 - 1)
    expected_first = [right_of_two] * 2 + [wrong_beside_two] * 2
    wrong_beside_one = 2 / 4 * (1 / 3 - 2 / 3)
    expected_second = [2 / 4] + [wrong_beside_one] * 3
    assert_close(found, torch.tensor([expected_first, expected_second]))
