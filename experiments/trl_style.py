"""Our set advantages in somebody else's loop: flat lists, one padded batch, labels of -100, as in TRL and the scripts modelled on it.

    python experiments/trl_style.py        # prints how far its gradient is from that of spiral.update

Three functions are all that is taken from spiral.py: draw_sets, search_advantages and aggregation_advantages. A trainer of this kind
asks a reward function for one number for each completion of a flat list, prompts repeated. Set credit needs to know more: which
traces each aggregation has read. So the list holds the traces first, num_traces of each problem, then the aggregations, num_sets x
num_aggregations of each problem, and `set_advantages` turns rewards of the latter into advantages of both.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import spiral  # noqa: E402
import tasks  # noqa: E402


def set_advantages(rewards, sets, num_traces, search_weight):
    """rewards: flat [P * K * N2] of the aggregations; sets [P, K, n] -> flat advantages [P * N1 + P * K * N2], the traces first.

    They carry the 1 / (K N2) of the estimator: the loss is a sum over completions and tokens, divided by the number of problems.
    TRL's loss_type="grpo" divides by each completion's length and by their number instead: not the gradient of any objective here.
    """
    rewards = rewards.view(*sets.shape[:2], -1)                                            # [P, K, N2]
    search = spiral.search_advantages(rewards, sets, num_traces, balanced=True)            # [P, N1]
    return torch.cat([search_weight * search.flatten(), spiral.aggregation_advantages(rewards).flatten()])


def padded_batch(prompts, completions, pad_id):
    """input_ids, attention_mask, labels [B, L + T]: prompts padded on the left, completions (EOS included) on the right."""
    before, after = max(map(len, prompts)), max(map(len, completions))
    rows = [([pad_id] * (before - len(p)) + p + c + [pad_id] * (after - len(c)),
             [0] * (before - len(p)) + [1] * (len(p) + len(c)) + [0] * (after - len(c)),
             [-100] * before + c + [-100] * (after - len(c))) for p, c in zip(prompts, completions)]
    return [torch.tensor(column) for column in zip(*rows)]


def loss_of(model, input_ids, attention_mask, labels, advantages, num_problems):
    """REINFORCE on a padded batch: minus the sum over labelled tokens of advantage * log pi, over the number of problems."""
    positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)
    logits = model(input_ids, attention_mask=attention_mask, position_ids=positions, use_cache=False).logits[:, :-1]
    labels = labels[:, 1:]
    logprobs = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[:, :, None])[:, :, 0]
    return -(advantages[:, None] * logprobs * (labels != -100)).sum() / num_problems


def gradients(num_problems=4, seed=0):
    """(this loop's, spiral.update's) gradient of one rollout of the tiny policy on countdown, flat."""
    config = spiral.Config(device="cpu", search_weight=0.5, max_grad_norm=1e9)
    policy, task = spiral.load_policy(config), tasks.make_task(config.task)
    problems, tokenizer = task.problems("train", num_problems, seed), policy.tokenizer
    generators = [torch.Generator().manual_seed(seed + i) for i in range(num_problems)]

    # Sampling, by whatever the trainer has; here spiral.sample
    def complete(prompts, limit, count, generators):
        samples = spiral.sample(policy, prompts, limit, config.temperature, count, generators)
        return [row[:n] for row, n in zip(samples.tokens.tolist(), samples.mask.sum(-1).tolist())]

    repeat = lambda rows, times: [row for row in rows for _ in range(times)]               # noqa: E731
    searches = [tokenizer.chat(task.prompt(problem)) for problem in problems]
    traces = complete(searches, config.max_trace_tokens, config.num_traces, generators)    # [P * N1]
    texts = [tokenizer.decode(trace) for trace in traces]
    sets = torch.stack([spiral.draw_sets(config.num_traces, config.set_size, config.num_sets, g, balanced=True) for g in generators])
    readers = [spiral.aggregation_prompt(tokenizer, task.prompt(problem), [texts[p * config.num_traces + j] for j in members])
               for p, problem in enumerate(problems) for members in sets[p].tolist()]      # [P * K]
    answers = complete(readers, config.max_aggregation_tokens, config.num_aggregations, repeat(generators, config.num_sets))
    owners = repeat(problems, config.num_sets * config.num_aggregations)
    rewards = torch.tensor([task.reward(problem, tokenizer.decode(answer)) for problem, answer in zip(owners, answers)])

    # The trainer's step
    advantages = set_advantages(rewards, sets, config.num_traces, config.search_weight)
    batch = padded_batch(repeat(searches, config.num_traces) + repeat(readers, config.num_aggregations), traces + answers, tokenizer.eos_id)
    loss_of(policy.model, *batch, advantages, num_problems).backward()
    theirs = torch.cat([p.grad.flatten() for p in policy.model.parameters()])

    # Ours, from the same seeds
    generators = [torch.Generator().manual_seed(seed + i) for i in range(num_problems)]
    records, taken = spiral.rollout(policy, task, problems, config, generators), []
    optimizer = spiral.make_optimizer(policy.model, config)
    optimizer.step = lambda: taken.append(torch.cat([p.grad.flatten() for p in policy.model.parameters()]))
    spiral.update(policy, optimizer, [group for record in records for group in record["groups"]], num_problems, config)
    return theirs, taken[0]


if __name__ == "__main__":
    theirs, ours = gradients()
    print(f"gradient norm {ours.norm():.3f}; relative difference {(theirs - ours).norm() / ours.norm():.1e}")
