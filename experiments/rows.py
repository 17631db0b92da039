"""Raw rows of the study, and the statistics that are made from them.

tables.py and plot.py show what is computed here; study.py writes the rows. Nothing runs by itself.

A file of rows holds one JSON object a line, and is compressed if its name ends in .gz. The rows of
one trained policy, in results/study/evaluation.jsonl.gz, hold for each of P problems:

    right       how many of the 64 traces are right
    rsa         right members of a population of 8 after each step of self-aggregation,
                [generators][steps + 1][P]
    votes       1 where the vote of that population is right, of the same shape
    hits        of the disjoint subsets of k traces, how many hold a right one (for lattices)

Since version 2 they hold the answers as well; study.py says how.
"""

import gzip
import json
from collections import Counter
from pathlib import Path

import numpy as np

# Rows of different versions are never compared. Raise VERSION when a change of spiral.py, tasks.py
# or study.py changes what is sampled, trained or measured; tables and figures show SHOWN_VERSION.
# Rows of version 1 don't name it.
VERSION = 2
SHOWN_VERSION = 1
SHOWN_SPLIT = "test"

RESULTS = Path(__file__).resolve().parent / "results"
STUDY = RESULTS / "study"

# How the pages and figures call each run.
LABELS = {
    "base": "untrained",
    "grpo": "GRPO",
    "none": "no search credit",
    "trace": "trace credit",
    "set": "set credit",
    "pass": "pass credit",
    "curve": "curve credit",
    "depth 2": "two levels of aggregation",
    "curve trained with lattices": "curve credit, trained with lattices",
}


# ---- Files of rows -------------------------------------------------------------------------------


def read_rows(path):
    """The rows of a JSONL file, or none if there is no such file.

    The last line is left out while it is still being written: it then has no line end.
    """
    if not path.exists():
        return []
    if path.suffix == ".gz":
        text = gzip.decompress(path.read_bytes()).decode()
    else:
        text = path.read_text()
    complete_lines = text.split("\n")[:-1]
    return [json.loads(line) for line in complete_lines]


def of_version(rows, version):
    return [row for row in rows if row.get("version", 1) == version]


def append_row(path, row):
    """Adds a row in a single write, so that processes can share the file.

    A compressed file grows by one gzip member for each row; readers see them as one text.
    """
    data = (json.dumps(row, separators=(",", ":")) + "\n").encode()
    if path.suffix == ".gz":
        data = gzip.compress(data, mtime=0)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab", buffering=0) as file:
        file.write(data)


def load_runs(setting="short", tokens=1_000_000):
    """The evaluated policies of a setting after so many training tokens: {run: {seed: row}}.

    The untrained policy (0 tokens) belongs to every budget. All seeds of a run have the options of
    its first row: rows with other options are left out.
    """
    runs = {}
    for row in of_version(read_rows(STUDY / "evaluation.jsonl.gz"), SHOWN_VERSION):
        if row["setting"] != setting or row["tokens"] not in (0, tokens):
            continue
        if row["split"] != SHOWN_SPLIT:
            continue
        seeds = runs.setdefault(row["run"], {})
        if all(other["options"] == row["options"] for other in seeds.values()):
            seeds[row["seed"]] = row
    return runs


# ---- What a row says about each problem ----------------------------------------------------------


def pass_curve(row):
    """pass@k of each problem for k = 1, 2, 4 .. S, of S traces: an array [P, log2(S) + 1].

    With c of S traces right, k of them chosen without replacement are all wrong with probability
    prod_{i < k} (S - c - i) / (S - i). Traces of a lattice aren't independent, so there pass@k is
    the share of the whole lattices of k that hold a right trace.
    """
    num_traces = row["evaluation"]["traces"]
    sizes = 2 ** np.arange(num_traces.bit_length())
    if row["lattice"]:
        return np.transpose([*row["hits"].values()]) * sizes / num_traces
    num_wrong = num_traces - np.array(row["right"])[:, None]  # [P, 1]
    already_drawn = np.arange(num_traces)
    next_is_wrong = np.clip((num_wrong - already_drawn) / (num_traces - already_drawn), 0, 1)
    all_wrong = np.cumprod(next_is_wrong, axis=1)  # [P, S]
    return 1 - all_wrong[:, sizes - 1]


def recursion_curve(row):
    """Share of right answers in each problem's population, after each step: [P, steps + 1]."""
    return np.mean(row["rsa"], axis=0).T / row["population"]


def vote_curve(row):
    """Whether the vote of each problem's population is right, after each step: [P, steps + 1]."""
    return np.mean(row["votes"], axis=0).T


def most_frequent(answers):
    """The answer with the most votes; of several, the one seen first. -1, no answer, has none."""
    votes = Counter(answer for answer in answers if answer >= 0)
    return max(votes, key=votes.get, default=-1)


def votes_of_traces(row):
    """How often the vote of k traces is right, k = 1, 2, 4 .. S: the mean over the disjoint blocks
    of k of the S traces, [P, log2(S) + 1]."""
    num_traces = row["evaluation"]["traces"]
    right = np.zeros((len(row["traces"]), num_traces.bit_length()))
    for problem, answers in enumerate(row["traces"]):
        for i in range(num_traces.bit_length()):
            blocks = np.reshape(answers, (-1, 2**i)).tolist()
            winners = [most_frequent(block) for block in blocks]
            right[problem, i] = np.mean([w in row["right_answers"][problem] for w in winners])
    return right


def budget_points(row):
    """Ways to answer, of version 2: {name: (tokens a problem, whether the answer is right [P])}."""
    points = {}
    trace_tokens = np.mean(row["trace_tokens"]) / row["evaluation"]["traces"]
    for i, right in enumerate(votes_of_traces(row).T):
        points[f"vote of {2**i} traces"] = (2**i * trace_tokens, right)
    for population, pipeline in row["pipelines"].items():
        tokens = np.cumsum(np.mean(pipeline["tokens"], axis=1))  # of all steps so far
        for step, answers in enumerate(pipeline["answers"][:4]):
            winners = [most_frequent(of_problem) for of_problem in answers]
            pairs = zip(winners, row["right_answers"])
            right = np.array([float(winner in numbers) for winner, numbers in pairs])
            name = f"{population} traces, {step} x {population} aggregations, a vote"
            points[name] = (tokens[step], right)
    return points


def measures(row):
    """What the tables show of an evaluated policy: {measure: one number for each problem}."""
    passed = pass_curve(row)
    recursion = recursion_curve(row)
    vote = vote_curve(row)
    last = recursion.shape[1] - 1
    return {
        "one trace (pass@1)": passed[:, 0],
        "one of 8 traces (pass@8)": passed[:, 3],
        "one of 16 traces (pass@16)": passed[:, 4],
        "one of 64 traces (pass@64)": passed[:, 6],
        "vote of 8 traces": vote[:, 0],
        "one aggregation of 4 traces": recursion[:, 1],
        "**vote of 8 aggregations**": vote[:, 1],
        f"one answer after {last} steps": recursion[:, last],
        f"vote after {last} steps": vote[:, last],
    }


# ---- Statistics ----------------------------------------------------------------------------------


def interval(values):
    """Mean of values [seeds, problems, ...] over both, and half the width of its 95% interval.

    Seeds and problems are both samples, and crossed: value = mean + a_seed + b_problem + rest. So
    the mean's variance is var(a) / S + var(b) / P + var(rest) / (S P). The variance of the seeds'
    means over S holds the first and the last of these terms, that of the problems' means over P the
    last two; what both hold is subtracted once. Degrees of freedom are those of Satterthwaite, the
    quantile of Student's t is Wallace's approximation. With one seed, only problems are samples.
    """
    values = np.asarray(values, float)
    num_seeds, num_problems = values.shape[:2]
    seed_freedom = max(1, num_seeds - 1)
    problem_freedom = num_problems - 1
    mean = values.mean((0, 1))
    seed_means = values.mean(1)
    problem_means = values.mean(0)

    by_seed = seed_means.var(0) / seed_freedom
    by_problem = problem_means.var(0, ddof=1) / num_problems
    rest = values - problem_means - seed_means[:, None] + mean
    counted_twice = (rest**2).mean((0, 1)) / (seed_freedom * problem_freedom)
    variance = by_seed + by_problem - counted_twice
    variance = np.maximum(variance, np.maximum(by_seed, by_problem)) + 1e-12

    freedom = by_seed**2 / seed_freedom + by_problem**2 / problem_freedom + 1e-24
    freedom = variance**2 / freedom
    z = 1.96 * (8 * freedom + 3) / (8 * freedom + 1)
    return mean, np.sqrt(variance * freedom * np.expm1(z**2 / freedom))


def paired(runs, names, measure):
    """measure(row) of the seeds that all named runs have: one array [seeds, P, ...] for each name.

    Where the untrained policy has one row, it is compared with every seed of another run: there,
    seeds are evaluations alone.
    """
    seeds = [set(runs[name]) for name in names if len(runs[name]) > 1 or "base" not in name]
    shared = sorted(set.intersection(*seeds)) if seeds else [0]
    arrays = []
    for name in names:
        rows = [runs[name].get(seed, runs[name].get(0)) for seed in shared]
        arrays.append(np.array([measure(row) for row in rows]))
    return arrays


def traces_needed(ours, theirs, k):
    """How many times more traces they need for their own pass@k than we need for the same, as text.

    `ours` and `theirs` are curves [seeds, problems, log2(S) + 1]. Our curve is a straight line
    between its points over log2(k); k' is where it reaches their mean pass@k. The error of log2(k')
    is that of the difference of the two pass rates there, over the slope of our curve.
    """
    their_pass = theirs[..., k.bit_length() - 1]
    our_mean = ours.mean((0, 1))
    after = int(np.argmax(our_mean >= their_pass.mean()))  # k' is at most 2^after
    if after == 0:
        return "-"  # their pass@k is below our pass@1, or above all that we have
    before = after - 1
    slope = our_mean[after] - our_mean[before]
    weight = (their_pass.mean() - our_mean[before]) / slope
    our_pass = (1 - weight) * ours[..., before] + weight * ours[..., after]  # at k'
    _, half = interval(our_pass - their_pass)
    log_factor = np.log2(k) - (before + weight)
    error = half / slope
    value, low, high = np.exp2([log_factor, log_factor - error, log_factor + error])
    if high > 100 * low:
        return "-"  # nothing can be said
    return f"{value:.2f} ({low:.2f} to {high:.2f})"


def student_interval(values):
    """Mean over seeds alone, and half of its 95% interval; None with a single seed."""
    quantiles = {2: 12.7, 3: 4.30, 4: 3.18, 5: 2.78}
    mean = np.mean(values)
    if len(values) < 2:
        return mean, None
    return mean, quantiles[len(values)] * np.std(values, ddof=1) / len(values) ** 0.5


# ---- Noise of the credits ------------------------------------------------------------------------

NOISE_MEASURES = (
    "noise",
    "cosine with the true gradient",
    "thousand tokens",
    "times fewer tokens than set credit",
)
REFERENCE_CREDIT = "set, K=4 N2=4"


def noise_moments():
    """{(policy, credit): rows} of gradient_noise.json, one row a problem: the four moments that
    gradient_noise.py measures, then the tokens of a rollout.

    "start, seed 1" measured more problems of the policy "start", so their rows are joined.
    """
    moments = {}
    for name, entry in json.loads((RESULTS / "gradient_noise.json").read_text()).items():
        policy = name.split(",")[0]
        for credit, problems in entry["credits"].items():
            rows = moments.setdefault((policy, credit), [])
            rows += [[*problem, entry["tokens"]] for problem in problems]
    return moments


def noise_of_credits():
    """{(policy, credit): {measure: (value, low, high)}} with 95% bootstrap intervals over problems.

    The gradients g of all problems are blocks of one long vector, t is the true gradient. Noise is
    the variance of g over its squared length along t, (sum of E g . t)^2 / (sum of t . t).
    """
    found = {}
    reference = {}  # tokens of set credit, by policy: it comes first, with the same picks
    for key, rows in noise_moments().items():
        policy, credit = key
        count = len(rows)
        picks = np.random.default_rng(0).integers(count, size=(2000, count))
        picks[0] = np.arange(count)  # every problem once: the value itself
        means = np.array(rows)[picks].mean(1)  # [2000, 5]
        second, squared_mean, along, true, tokens = means.T
        noise = (second - squared_mean) * true / along**2
        cosine = along / np.sqrt(squared_mean * true)
        thousand_tokens = noise * tokens / 1000  # until signal = noise
        if credit == REFERENCE_CREDIT:
            reference[policy] = thousand_tokens
        times_fewer = reference[policy] / thousand_tokens
        found[key] = {}
        samples = (noise, cosine, thousand_tokens, times_fewer)
        for measure, values in zip(NOISE_MEASURES, samples, strict=True):
            low, high = np.percentile(values, [2.5, 97.5])
            found[key][measure] = (values[0], low, high)
    return found
