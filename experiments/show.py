"""What people read while spiral.py works: notes on a step, a transcript of a problem, and the votes
behind an answer to --ask. Nothing here changes what is sampled or trained."""

from collections import Counter


def votes(task, history):
    """Prints the votes of one problem's populations, and the text of the first completion with the
    answer that wins. history: [steps + 1][1] Groups of recursive_self_aggregation(). Returns the
    answer, or None."""
    for step, (group,) in enumerate(history):
        answers = [task.answer(completion.text) for completion in group.completions]
        counts = Counter()
        for answer, completion in zip(answers, group.completions):
            missing = "cut off" if completion.truncated else "no answer"
            counts[answer or missing] += 1
        shown = ", ".join(f"{answer} ({count})" for answer, count in counts.most_common())
        name = f"{len(answers)} traces" if step == 0 else f"step {step} of aggregation"
        print(f"votes after {name}: {shown}")

    given = Counter(answer for answer in answers if answer is not None)
    if not given:
        return None
    winner = answers.index(max(given, key=given.get))
    if len(history) > 1:
        numbers = numbers_of(history[-2][0].aggregations[winner].candidates)
        print(f"--- a text of the winner, which has read candidates {numbers} of the step before:")
    print(history[-1][0].completions[winner].text)
    return answers[winner]


def notes(stats, first_reward):
    """Plain lines about what people otherwise puzzle over. first_reward: of the first step's
    traces."""
    search, answers = stats["search"], stats["aggregation"]
    messages = []
    if stats["useful"] == 0:
        messages.append(f"all advantages are 0; {answers['reward']:.0%} of answers are right")
    if search["truncated"] > 0.75:
        messages.append("most traces are cut off: raise --max-trace-tokens")
    if answers["truncated"] > 0.75 and answers != search:  # for grpo these are the same
        messages.append("most answers are cut off: raise --max-aggregation-tokens")
    if search["reward"] < 0.5 * first_reward:
        messages.append("the search collapses: lower --lr or --search-weight")
    if stats["logprob_difference"] > 0.1:
        distance = f"{stats['logprob_difference']:.1e}"
        messages.append(f"sampler and trainer are {distance} nats a token apart")
    if stats["skipped"]:
        messages.append("loss or gradient is not finite: no step. Lower --lr")
    return messages


def numbers_of(candidates):
    return ", ".join(str(j + 1) for j in candidates)


def transcript(task, group):
    """A problem as a person reads it: traces, the best set's aggregations, and advantages."""
    text, shown = task.prompt(group.problem), [group]
    if group.aggregations:
        shown.append(
            max(group.aggregations, key=lambda answer: sum(c.reward for c in answer.completions))
        )
    for part in shown:
        for number, c in enumerate(part.completions, 1):
            title = f"aggregation of {numbers_of(part.candidates)}" if part.candidates else "trace"
            text += f"\n{title}, {number}:   reward {c.reward:.0f}   advantage {c.advantage:+.3f}\n"
            text += c.text + "\n"
    return text
