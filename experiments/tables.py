"""Every table of the pages, made from the raw rows in results/.

A page holds a table between two markers, and `fill` writes what stands between them anew:

    <!-- table: levels short 1000000 -->
    <!-- /table -->

The first word names a function of TABLES, the other words are its arguments. Run it through
plot.py, which fills all pages:

    python experiments/plot.py --table levels short 1000000     # prints one table
    python experiments/plot.py --fill experiments/STUDY.md      # fills one page
"""

import json
import re

import numpy as np
import rows as raw

ROOT = raw.RESULTS.parents[1]
CREDITS = ("trace", "set", "pass", "curve")
RIVALS = ("base", "grpo", "none", *CREDITS)
SETTING = ("short", "1000000")  # what a table shows if its marker names no other


def markdown(rows):
    """A Markdown table of rows of cells, the first of which is the header."""
    header, *body = rows
    lines = [header, ["---"] * len(header), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def transpose(columns):
    """Columns, each a dict of the same keys, as rows: the keys first, then one cell a column."""
    return [[key, *(column[key] for column in columns)] for key in columns[0]]


# ---- The study -----------------------------------------------------------------------------------


def levels(setting, tokens):
    """The mean of every measure for every policy. In brackets: from how many seeds."""
    runs = raw.load_runs(setting, int(tokens))
    columns = []
    for name in names_of(runs):
        (seeds,) = raw.paired(runs, names=[name], measure=raw.measures)
        column = {"(seeds)": f"{label(name)} ({len(seeds)})"}
        for measure in seeds[0]:
            mean, half = raw.interval([row[measure] for row in seeds])
            column[measure] = f"{mean:.3f} ± {half:.3f}"
        columns.append(column)
    return markdown(transpose(columns))


def difference(runs, name, reference):
    """A column: what `name` has more than `reference`, paired by seed and by problem."""
    ours, theirs = raw.paired(runs, names=[name, reference], measure=raw.measures)
    column = {"(seeds)": f"{label(name)} ({len(ours)})"}
    for measure in ours[0]:
        our_values = np.array([row[measure] for row in ours])
        their_values = np.array([row[measure] for row in theirs])
        mean, half = raw.interval(our_values - their_values)
        column[measure] = f"{mean:+.3f} ± {half:.3f}"
    curves = raw.paired(runs, names=[name, reference], measure=raw.pass_curve)
    for k in (16, 64):
        column[f"times the traces for the same pass@{k}"] = raw.traces_needed(*curves, k=k)
    return column


def label(name):
    """ "set (lattice)" is the run "set", evaluated with lattices."""
    run, _, lattice = name.partition(" (")
    return raw.LABELS.get(run, run) + (" (" + lattice if lattice else "")


def differences(reference, setting=SETTING[0], tokens=SETTING[1]):
    """Every policy minus the reference: "base", "grpo", "none" or "trace"."""
    runs = raw.load_runs(setting, int(tokens))
    names = [name for name in names_of(runs) if name != reference]
    if reference != "base":
        names = [name for name in names if name != "base"]
    if reference not in ("base", "grpo"):
        names = [name for name in names if name != "grpo"]
    return markdown(transpose([difference(runs, name, reference) for name in names]))


def lattice():
    """The same policies evaluated with a lattice of traces, minus with independent traces."""
    runs = raw.load_runs()
    names = [name for name in RIVALS if f"{name} (lattice)" in runs]
    columns = [difference(runs, f"{name} (lattice)", name) for name in names]
    return markdown(transpose(columns))


def variants():
    """Other ways to train with curve credit, minus curve credit."""
    runs = raw.load_runs()
    names = ("depth 2", "curve trained with lattices")
    return markdown(transpose([difference(runs, name, "curve") for name in names]))


def names_of(runs):
    """Rivals in their usual order, then their variants. Lattices have a table of their own."""
    others = [name for name in runs if name.split(" K=")[0] in RIVALS and name not in RIVALS]
    return [name for name in RIVALS if name in runs] + sorted(others)


def votes(setting, tokens):
    """The vote of 8 answers after every step of self-aggregation."""
    runs = raw.load_runs(setting, int(tokens))
    columns = []
    for name in names_of(runs):
        (seeds,) = raw.paired(runs, names=[name], measure=raw.vote_curve)
        column = {"(seeds)": f"{label(name)} ({len(seeds)})"}
        means, halves = raw.interval(seeds)
        for step, (mean, half) in enumerate(zip(means, halves)):
            column[f"after step {step}"] = f"{mean:.3f} ± {half:.3f}"
        columns.append(column)
    return markdown(transpose(columns))


def budget(setting, tokens):
    """Votes of traces and of pipelines, with the tokens that they sample for a problem."""
    runs = raw.load_runs(setting, int(tokens))
    columns = []
    for name in names_of(runs):
        points = [raw.budget_points(row) for row in runs[name].values()]
        column = {"(seeds)": f"{label(name)} ({len(points)})"}
        for way in points[0]:
            mean, half = raw.interval([of_seed[way][1] for of_seed in points])
            spent = np.mean([of_seed[way][0] for of_seed in points])
            column[way] = f"{mean:.3f} ± {half:.3f}, {spent:.0f} tokens"
        columns.append(column)
    return markdown(transpose(columns))


def summary(setting=SETTING[0], tokens=SETTING[1]):
    """Four policies and five measures: for the project's first page."""
    shown = {
        "one trace": "one trace (pass@1)",
        "one of 64 traces": "one of 64 traces (pass@64)",
        "vote of 8 traces": "vote of 8 traces",
        "one aggregation of 4 traces": "one aggregation of 4 traces",
        "**vote of 8 aggregations**": "**vote of 8 aggregations**",
    }
    runs = raw.load_runs(setting, int(tokens))
    lines = [["", *shown]]
    for name in ("base", "grpo", "none", "set"):
        if name in runs:
            (seeds,) = raw.paired(runs, names=[name], measure=raw.measures)
            results = [raw.interval([row[key] for row in seeds]) for key in shown.values()]
            cells = [f"{mean:.2f} ± {half:.2f}" for mean, half in results]
            text = "SPIRAL, set credit" if name == "set" else raw.LABELS[name]
            lines.append([text, *cells])
    return markdown(lines)


def tuning_score(row):
    """What tuning goes by: the mean of pass@16 and of one answer after the last step."""
    recursion = raw.recursion_curve(row)[:, -1].mean()
    return (raw.pass_curve(row)[:, 4].mean() + recursion) / 2


def tuning():
    """The score of every learning rate and weight that was tried. One seed."""
    scores = {}
    for row in raw.of_version(raw.read_rows(raw.STUDY / "tuning.jsonl.gz"), raw.SHOWN_VERSION):
        run, rate, weight = row["run"].split()
        scores[run, rate, weight] = tuning_score(row)
    choices = [(rate, weight) for rate in ("5e-5", "1e-4") for weight in ("0.05", "0.2")]
    lines = [["", *(f"rate {rate}, weight {weight}" for rate, weight in choices)]]
    for name in CREDITS:
        cells = [f"{scores[name, *choice]:.3f}" for choice in choices]
        lines.append([raw.LABELS[name], *cells])
    grpo = {rate: f"{scores['grpo', rate, '1']:.3f}" for rate in ("5e-5", "1e-4")}
    lines.append(["GRPO, which has no such weight", grpo["5e-5"], "", grpo["1e-4"], ""])
    return markdown(lines)


def trainings(setting, tokens):
    """The training rows of a setting and budget: {run: [the steps of each seed]}."""
    steps = {}
    for row in raw.read_rows(raw.STUDY / "training.jsonl.gz"):
        steps[row["folder"], row["tokens"]] = row["steps"]
    found = {}
    for name, seeds in raw.load_runs(setting, int(tokens)).items():
        if name in RIVALS and name != "base":
            found[name] = [steps[row["folder"], row["tokens"]] for row in seeds.values()]
    return {name: found[name] for name in RIVALS if name in found}


def training(setting=SETTING[0], tokens=SETTING[1]):
    """First and last five steps of training, in the mean over seeds."""
    shown = {
        "reward of traces": ("search", "reward"),
        "tokens a trace": ("search", "length"),
        "entropy of traces": ("search", "entropy"),
        "reward of aggregations": ("aggregation", "reward"),
        "entropy of aggregations": ("aggregation", "entropy"),
    }
    lines = [["", "steps", *shown]]
    for name, seeds in trainings(setting, tokens).items():
        cells = [f"{np.mean([len(steps) for steps in seeds]):.0f}"]
        for role, key in shown.values():
            values = [[step[role][key] for step in steps] for steps in seeds]
            first = np.mean([steps[:5] for steps in values])
            last = np.mean([steps[-5:] for steps in values])
            only_traces = name == "grpo" and role == "aggregation"
            cells.append("-" if only_traces else f"{first:.2f} → {last:.2f}")
        lines.append([raw.LABELS[name], *cells])
    return markdown(lines)


# ---- The credits ---------------------------------------------------------------------------------


def response(setting=SETTING[0], tokens=SETTING[1]):
    """How often an aggregation is right, by how many of its four candidates are."""
    lines = [["right candidates", "0", "1", "2", "3", "4"]]
    untrained = json.loads((raw.RESULTS / "gradient_noise.json").read_text())["start"]["curve"]
    lines.append(["untrained", *(f"{share:.2f}" for share in untrained)])
    curves = {}
    if raw.SHOWN_VERSION == 1:  # a running mean, kept in training
        for name, seeds in trainings(setting, tokens).items():
            curves[name] = np.mean([steps[-1]["curve"] for steps in seeds], axis=0)
    else:
        for name, seeds in raw.load_runs(setting, int(tokens)).items():
            right, total = np.sum([row["response"] for row in seeds.values()], axis=0)
            curves[name] = right / np.maximum(total, 1)
    for name in RIVALS:
        if name in curves and name not in ("base", "grpo"):
            curve = curves[name]
            lines.append([raw.LABELS[name], *(f"{share:.2f}" for share in curve)])
    return markdown(lines)


NOISE_LABELS = {
    "set, K=4 N2=4": "set credit, K = 4, N2 = 4",
    "set, K=8 N2=2": "set credit, K = 8, N2 = 2",
    "set, K=16 N2=1": "set credit, K = 16, N2 = 1",
    "curve + residual": "curve credit + residual, λ = 1",
    "curve + residual / 4": "curve credit + residual, λ = 1/4",
    "curve": "curve credit",
    "pass@4": "pass credit",
    "trace": "trace credit",
}


def noise(policy):
    """Noise and direction of every credit's gradient: "start" or "after training"."""
    lines = [["credit", *raw.NOISE_MEASURES]]
    for (measured_on, credit), values in raw.noise_of_credits().items():
        if measured_on == policy.replace("-", " "):
            cells = [
                f"{value:.3g} ({low:.3g} to {high:.3g})" for value, low, high in values.values()
            ]
            lines.append([NOISE_LABELS[credit], *cells])
    return markdown(lines)


# ---- Other programs ------------------------------------------------------------------------------


def default():
    """Held-out scores of the default run, before training and after it, and of GRPO's: the mean
    over seeds, and from the lowest to the highest."""
    columns = {"untrained": [], "GRPO": [], "SPIRAL": []}
    for folder in sorted((raw.RESULTS / "default").glob("*-*")):
        start, *_, end = raw.read_rows(folder / "evaluation.jsonl")
        method = "GRPO" if folder.name.startswith("grpo") else "SPIRAL"
        columns["untrained"].append(start)
        columns[method].append(end)
    lines = [["", *columns]]
    for name in columns["SPIRAL"][0]:
        if name in ("policy", "problems"):
            continue
        line = [name]
        for scores in columns.values():
            values = [score[name] for score in scores]
            cell = f"{sum(values) / len(values):.2f}"
            if max(values) > min(values):
                cell += f" ({min(values):.2f} to {max(values):.2f})"
            line.append(cell)
        lines.append(line)
    return markdown(lines)


def default_tuning():
    """The vote of 8 aggregations on validation problems, by learning rate and search weight."""
    scores = {}
    for row in raw.read_rows(raw.RESULTS / "default" / "validation.jsonl"):
        scores[row["lr"], row["search_weight"]] = row["vote of 8 aggregations"]
    weights = ("0.2", "0.5", "1")
    lines = [["learning rate", *(f"weight {weight}" for weight in weights)]]
    for lr in ("5e-5", "1e-4", "2e-4"):
        cells = []
        for weight in weights:
            known = (lr, weight) in scores
            cells.append(f"{scores[lr, weight]:.3f}" if known else "not evaluated")
        lines.append([lr, *cells])
    return markdown(lines)


def real_model_scores():
    """{run: [the scores of each seed]} of the real model, its validation seeds left out."""
    found = {}
    rows = raw.read_rows(raw.RESULTS / "real_model.jsonl")
    rows = raw.of_version(rows, raw.SHOWN_VERSION)
    for row in sorted(rows, key=lambda row: row["seed"]):
        if row["seed"] >= 100:
            continue
        scores = dict(row["scores"])
        scores["emergent"] /= scores["hopeless sets"]  # of the sets without a right trace
        found.setdefault(row["name"].removeprefix("spiral "), []).append(scores)
    return found


REAL_MODEL = {
    "one trace (pass@1)": "pass@1",
    "one of 8 traces (pass@8)": "pass@8",
    "vote of 8 traces": "majority@8",
    "one aggregation of 4 traces": "aggregate@4",
    "right, though all 4 traces are wrong": "emergent",
    "**vote of 8 aggregations**": "vote of aggregations",  # since version 2
    "one answer after 1 step": "rsa step 1",  # in version 1
    "entropy of traces": "entropy",
    "traces cut off": "truncated",
}


def real_model_measures(found):
    """Those of REAL_MODEL that the rows have."""
    scores = next(iter(found.values()))[0]
    return {text: key for text, key in REAL_MODEL.items() if key in scores}


def real_model(*names):
    """The real model's scores, ± the 95% interval over seeds alone. No names: all runs."""
    found = real_model_scores()
    names = names or RIVALS
    columns = []
    for name in [name for name in names if name in found]:
        column = {"(seeds)": f"{raw.LABELS[name]} ({len(found[name])})"}
        for text, key in real_model_measures(found).items():
            mean, half = raw.student_interval([scores[key] for scores in found[name]])
            column[text] = f"{mean:.2f}" if half is None else f"{mean:.2f} ± {half:.2f}"
        columns.append(column)
    return markdown(transpose(columns))


def real_model_differences(reference):
    """Every run of the real model minus the reference, seed by seed."""
    found = real_model_scores()
    columns = []
    for name in [name for name in RIVALS if name in found and name not in ("base", reference)]:
        pairs = list(zip(found[name], found[reference], strict=True))
        column = {"(seeds)": f"{raw.LABELS[name]} ({len(pairs)})"}
        for text, key in real_model_measures(found).items():
            changes = [ours[key] - theirs[key] for ours, theirs in pairs]
            mean, half = raw.student_interval(changes)
            column[text] = f"{mean:+.2f} ± {half:.2f}"
        columns.append(column)
    return markdown(transpose(columns))


def bench_rows():
    found = json.loads((raw.RESULTS / "bench_cpu.json").read_text())["rows"]
    return {row["case"]: row for row in found}


def bench():
    """Every case of bench.py."""
    lines = [["case", "ratio", "tokens/s here", "tokens/s of the alternative"]]
    for case, row in bench_rows().items():
        if case == "memory":
            ours, theirs = row["bytes"]
            case = "memory of 4096 log-probs, 151,936 words"
            cells = [f"{row['ratio']:.0f}", f"{ours / 1e6:.0f} MB", f"{theirs / 1e9:.1f} GB"]
        else:
            low, high = min(row["ratios"]), max(row["ratios"])
            cells = [f"{row['ratio']:.2f} ({low:.2f} to {high:.2f})"]
            cells += [f"{row['ours']:.0f}", f"{row['theirs']:.0f}"]
        lines.append([case, *cells])
    return markdown(lines)


def speed():
    """The main cases in words: for the project's first page."""
    cases = bench_rows()
    rollout = cases["rollout"]
    low, high = min(rollout["ratios"]), max(rollout["ratios"])
    batches = [f"{cases[f'batch {size}']['ratio']:.1f}" for size in (16, 64, 256)]
    updates = [f"{cases[f'update N2=8, {size}']['ratio']:.1f}" for size in ("64-256", "256-1024")]
    return markdown(
        [
            ["", "times as fast"],
            ["sampling of a default step", f"{rollout['ratio']:.1f} ({low:.1f} to {high:.1f})"],
            ["sampling 16 / 64 / 256 completions of uneven length", " / ".join(batches)],
            [
                "update on 8 aggregations of traces of 64 to 256 / 256 to 1024 tokens",
                " / ".join(updates),
            ],
        ]
    )


def trl():
    """One GRPO step of a real model, here and in TRL. Means, and from the least to the most."""
    found = raw.read_rows(raw.RESULTS / "bench_trl.jsonl")
    lines = [["", "steps measured", "seconds", "tokens", "tokens/s", "peak memory, GB"]]
    for step, text in (("ours", "here"), ("trl", "TRL")):
        rows = [row for row in found if row["step"] == step]
        line = [text, str(len(rows))]
        columns = (
            [row["seconds"] for row in rows],
            [row["tokens"] for row in rows],
            [row["tokens"] / row["seconds"] for row in rows],
            [row["memory"] / 1e9 for row in rows],
        )
        for values, digits in zip(columns, (1, 0, 0, 1), strict=True):
            mean, low, high = (f"{f(values):.{digits}f}" for f in (np.mean, min, max))
            line.append(mean if low == high else f"{mean} ({low} to {high})")
        lines.append(line)
    return markdown(lines)


# ---- Filling pages -------------------------------------------------------------------------------

TABLES = {
    "levels": levels,
    "differences": differences,
    "votes": votes,
    "budget": budget,
    "lattice": lattice,
    "variants": variants,
    "summary": summary,
    "tuning": tuning,
    "training": training,
    "response": response,
    "noise": noise,
    "default": default,
    "default_tuning": default_tuning,
    "real_model": real_model,
    "real_model_differences": real_model_differences,
    "bench": bench,
    "speed": speed,
    "trl": trl,
}


def table(words):
    """The table that the words of a marker ask for."""
    name, *arguments = words
    if name not in TABLES:
        raise ValueError(f"no table {name!r}; there are {', '.join(TABLES)}")
    return TABLES[name](*arguments)


def fill(text):
    """The page with every table between its markers made anew."""
    pattern = r"(<!-- table: (.*?) -->\n).*?(<!-- /table -->)"

    def replacement(match):
        opening, words, closing = match.groups()
        return f"{opening}{table(words.split())}\n{closing}"

    return re.sub(pattern, replacement, text, flags=re.DOTALL)
