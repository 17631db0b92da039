"""Credit for search traces that asks the verifier about traces: --search-credit curve, pass, trace.

It isn't the paper's, whose traces are credited by the answers of their sets alone. CREDIT.md
derives it, and measures how much less noise it has, and how much bias.
"""

from math import comb

import torch


def curve_advantages(trace_rewards, curve, set_size):
    """Credit from a curve [n + 1] that scores a set by how many of its traces are right: traces'
    rewards [P, N1], 0 or 1 -> [P, N1].

    All C(N1, n) sets have a score then, and a trace gets n / N1 times the mean score of the sets
    that hold it minus that of the sets that don't. The curve c / n makes this grpo_advantages(); a
    step at 1 is credit for pass@n."""
    num_traces = trace_rewards.shape[1]
    curve = curve.tolist()

    def mean_score(right, size, already_right):
        """Of all sets of `size` other traces, `right` of them right, beside already_right more."""
        wrong = num_traces - 1 - right
        ways = [comb(right, count) * comb(wrong, size - count) for count in range(size + 1)]
        total = 0.0
        for count, number in enumerate(ways):
            if number:  # these may be more than a float holds
                total += number / sum(ways) * curve[already_right + count]
        return total

    credit = torch.zeros(2, num_traces)  # by the trace's reward, and how many others are right
    for reward in (0, 1):
        for right_others in range(num_traces):
            with_trace = mean_score(right_others, set_size - 1, reward)
            without_trace = mean_score(right_others, set_size, 0)
            credit[reward, right_others] = set_size / num_traces * (with_trace - without_trace)

    right = trace_rewards.long()
    right_others = right.sum(1, keepdim=True) - right  # [P, N1]
    return credit[right, right_others]


def other_sets_advantages(rewards):
    """b_km = (r_km - mean reward of the other sets' answers) / (K N2): a problem's rewards [K, N2]
    -> [K, N2]. For N2 = 1, where a set has no other answers for a baseline. It is unbiased as well:
    given the traces, the answers of different sets are independent."""
    num_sets, num_answers = rewards.shape
    of_set = rewards.sum(1, keepdim=True)
    others_mean = (rewards.sum() - of_set) / ((num_sets - 1) * num_answers)
    return (rewards - others_mean) / rewards.numel()


def response_counts(group, set_size):
    """[2, n + 1]: a problem's aggregations that were right, and all, by how many of the n
    candidates were right."""
    counts = torch.zeros(2, set_size + 1)
    for answer in group.aggregations:
        right = sum(group.completions[j].reward for j in answer.candidates)
        rewards = [completion.reward for completion in answer.completions]
        counts[:, int(right)] += torch.tensor([sum(rewards), len(rewards)])
    return counts


def response_curve(counts):
    """How often aggregations are right when 0, 1 .. n candidates are, [n + 1]. A guess of c / n
    counts as one aggregation each."""
    guess = torch.linspace(0, 1, counts.shape[1])
    return (counts[0] + guess) / (counts[1] + 1)


def verified_credit(groups, kind, set_size):
    """a_j [P, N1] of the traces of P problems' groups. kind: trace, as GRPO would; pass, for
    pass@n; curve, by the response curve that the *other* problems of the rollout show: so that the
    curve doesn't depend on these traces."""
    rewards = torch.tensor([[c.reward for c in group.completions] for group in groups])
    if kind == "trace":
        return curve_advantages(rewards, torch.linspace(0, 1, set_size + 1), set_size)
    if kind == "pass":
        return curve_advantages(rewards, (torch.arange(set_size + 1) > 0).float(), set_size)

    counts = [response_counts(group, set_size) for group in groups]
    total = sum(counts)
    credit = []
    for own_rewards, own_counts in zip(rewards, counts):
        curve = response_curve(total - own_counts)
        credit.append(curve_advantages(own_rewards[None], curve, set_size))
    return torch.cat(credit)
