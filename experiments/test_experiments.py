"""Tests of the scripts beside it: each in miniature, and every table of the pages.

python -m pytest experiments
"""

import itertools
import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
import bench  # noqa: E402
import gradient_noise  # noqa: E402
import plot  # noqa: E402
import real_model  # noqa: E402
import robustness  # noqa: E402
import rows as raw  # noqa: E402
import study  # noqa: E402
import tables  # noqa: E402
import warm_start  # noqa: E402

import spiral  # noqa: E402
from experiments import credits  # noqa: E402

# ---- Pages ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", plot.PAGES, ids=lambda page: f"{page.parent.name}/{page.name}")
def test_every_table_of_the_pages_is_that_of_the_raw_rows(page):
    assert tables.fill(page.read_text()) == page.read_text()


def test_a_number_typed_by_hand_is_found():
    page = HERE / "STUDY.md"
    typed = page.read_text().replace("0.846 ± 0.036", "0.856 ± 0.036")
    assert typed != page.read_text()
    assert tables.fill(typed) == page.read_text()


def test_every_marker_is_closed_and_names_a_table():
    for page in plot.PAGES:
        text = page.read_text()
        assert text.count("<!-- table: ") == text.count("<!-- /table -->")
    with pytest.raises(ValueError, match="no table 'levles'"):
        tables.table(["levles", "short"])


def test_links_and_figures_of_the_pages_exist():
    for page in [page for page in plot.PAGES if page.is_relative_to(HERE)]:
        for link in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
            if link.startswith("http"):
                continue
            target = (page.parent / link).resolve()
            in_progress = target == HERE.parent / "math_task" / "README.md"
            assert target.exists() or in_progress, f"{page.name}: {link}"


def test_figures_are_made_of_the_raw_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(plot, "FIGURES", tmp_path)
    plot.draw_pass_at_k()
    plot.draw_vote()
    plot.draw_noise()
    plot.draw_real_model()
    made = {path.name for path in tmp_path.iterdir()}
    assert made == {path.name for path in (HERE / "figures").iterdir()}


def test_curves_of_runs(tmp_path):
    runs = [raw.RESULTS / "default" / f"seed-{seed}" for seed in (0, 1)]
    plot.draw_curves(runs, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 10_000


# ---- Rows and statistics -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
def test_rows_come_back_and_an_unfinished_line_is_left_out(tmp_path, name):
    path = tmp_path / name
    assert raw.read_rows(path) == []
    raw.append_row(path, {"step": 1})
    raw.append_row(path, {"step": 2})
    assert raw.read_rows(path) == [{"step": 1}, {"step": 2}]
    if path.suffix != ".gz":
        with path.open("a") as file:
            file.write('{"step": 3')
        assert raw.read_rows(path) == [{"step": 1}, {"step": 2}]


def test_every_trained_policy_of_the_study_has_its_training_rows():
    trained = {
        (row["folder"], row["tokens"]) for row in raw.read_rows(raw.STUDY / "training.jsonl.gz")
    }
    evaluated = raw.read_rows(raw.STUDY / "evaluation.jsonl.gz")
    needed = {(row["folder"], row["tokens"]) for row in evaluated if row["tokens"]}
    assert needed == trained
    old = raw.of_version(evaluated, 1)
    assert len(old) == 85
    assert len({(row["folder"], row["tokens"]) for row in old if row["tokens"]}) == 69


def test_interval_over_seeds_is_students_t():
    seeds = np.arange(5.0)[:, None]
    values = np.repeat(seeds, 1000, axis=1)
    mean, half = raw.interval(values)
    assert mean == 2
    assert half == pytest.approx(2.776 * (2.5 / 5) ** 0.5, rel=0.01)


def test_interval_over_problems_is_normal():
    problems = np.arange(1000.0) % 7
    _, half = raw.interval(np.repeat(problems[None], 5, axis=0))
    assert half == pytest.approx(1.96 * (problems.var() / 1000) ** 0.5, rel=0.01)


def test_pass_curve_is_the_mean_over_all_subsets():
    row = {"evaluation": {"traces": 8}, "lattice": False, "right": [0, 3, 8]}
    for curve, right in zip(raw.pass_curve(row), row["right"], strict=True):
        traces = [True] * right + [False] * (8 - right)
        expected = []
        for k in (1, 2, 4, 8):
            subsets = itertools.combinations(traces, k)
            expected.append(np.mean([any(subset) for subset in subsets]))
        assert curve == pytest.approx(expected)


def test_traces_needed():
    theirs = np.tile(np.arange(7) / 10, (2, 3, 1))  # rises by 0.1 whenever k doubles
    ours = theirs + 0.3  # so theirs at 64 is ours at 8
    assert raw.traces_needed(ours, theirs, k=64) == "8.00 (8.00 to 8.00)"
    assert raw.traces_needed(theirs, ours + 1, k=64) == "-"  # never reached


def test_the_untrained_policy_is_paired_with_every_seed():
    runs = {"base": {0: 10}, "set": {0: 1, 1: 2, 4: 3}, "grpo": {1: 5, 4: 6}}
    ours, theirs = raw.paired(runs, names=["set", "base"], measure=lambda row: [row])
    assert ours.tolist() == [[1], [2], [3]]
    assert theirs.tolist() == [[10], [10], [10]]
    ours, theirs = raw.paired(runs, names=["set", "grpo"], measure=lambda row: [row])
    assert ours.tolist() == [[2], [3]]
    assert theirs.tolist() == [[5], [6]]


def test_votes_and_budgets_of_a_row():
    row = {
        "evaluation": {"traces": 4},
        "right_answers": [[1], []],
        "traces": [[0, 1, 1, -1], [-1, -1, -1, -1]],
        "trace_tokens": [40, 80],
        "pipelines": {
            "2": {"answers": [[[0, 1], [-1, -1]], [[1, 1], [0, 0]]], "tokens": [[4, 8], [6, 6]]}
        },
    }
    assert raw.votes_of_traces(row).tolist() == [[0.5, 0.5, 1], [0, 0, 0]]
    points = raw.budget_points(row)
    tokens, right = points["vote of 4 traces"]
    assert tokens == 60
    assert right.tolist() == [1, 0]
    tokens, right = points["2 traces, 0 x 2 aggregations, a vote"]
    assert tokens == 6
    assert right.tolist() == [0, 0]
    tokens, right = points["2 traces, 1 x 2 aggregations, a vote"]
    assert tokens == 12
    assert right.tolist() == [1, 0]


# ---- The study, in miniature ---------------------------------------------------------------------


@pytest.fixture
def small_study(tmp_path, monkeypatch):
    """Arguments of study.py, and the folders of its runs and rows."""
    monkeypatch.setattr(raw, "STUDY", tmp_path / "rows")
    monkeypatch.setattr(raw, "SHOWN_VERSION", raw.VERSION)
    options = ["--quick", "--problems=2", "--rivals=none,curve", "--populations=4:1,8:1"]
    options += ["--tokens=400", "--every=200", "--options=--problems=1 --max-draws=1"]
    args = study.parse_arguments([*options, "--lrs=1e-4", "--weights=0.2"])
    (tmp_path / "rows").mkdir()
    return args, tmp_path / "runs", tmp_path / "rows"


def do(pieces, runs, results):
    for piece in pieces:
        (runs / piece["folder"]).mkdir(parents=True, exist_ok=True)
        assert study.do_piece(piece, runs, results) == 0


def test_study(small_study):
    args, runs, results = small_study
    pieces = [*study.pieces_of_main(args, results)]
    do(pieces, runs, results)
    rows = raw.read_rows(results / "evaluation.jsonl.gz")
    made = [(row["run"], row["tokens"]) for row in rows]
    assert made == [("base", 0), ("none", 200), ("none", 400), ("curve", 200), ("curve", 400)]
    assert [
        study.rows_done(results) >= {row["id"] for row in study.rows_of_piece(piece)}
        for piece in pieces
    ] == [True] * 3
    do(pieces, runs, results)  # nothing is done twice
    assert len(raw.read_rows(results / "evaluation.jsonl.gz")) == 5

    task = study.tasks.make_task("countdown")
    used = task.problems("test", 4, 0)
    fresh = task.problems("test", 6, 0)[4:]
    assert all(problem not in used for problem in fresh)  # --skip 4, as QUICK says
    for row in rows:
        pairs = zip(row["traces"], row["right_answers"], row["right"])
        for answers, right, count in pairs:
            assert sum(answer in right for answer in answers) == count
        of_eight = row["pipelines"]["8"]["answers"]
        for step, votes in zip(of_eight, row["votes"][0]):
            for answers, right, vote in zip(step, row["right_answers"], votes):
                assert (raw.most_frequent(answers) in right) == vote

    for name in ("levels", "votes", "budget", "response", "training"):
        shown = tables.table([name, "short", "400"])
        assert raw.LABELS["none"] in shown
    assert raw.LABELS["curve"] in tables.differences("none", "short", "400")


def test_rows_of_another_version_are_neither_shown_nor_gone_on_from(small_study, monkeypatch):
    args, _, results = small_study
    piece, *_ = study.pieces_of_main(args, results)
    row = next(study.rows_of_piece(piece))
    raw.append_row(results / "evaluation.jsonl.gz", row)
    assert raw.load_runs(tokens=0)
    monkeypatch.setattr(raw, "VERSION", raw.VERSION + 1)
    newer, *_ = study.pieces_of_main(args, results)
    assert newer["folder"] != piece["folder"]
    assert next(study.rows_of_piece(newer))["id"] not in study.rows_done(results)
    monkeypatch.setattr(raw, "SHOWN_VERSION", raw.VERSION)
    assert not raw.load_runs(tokens=0)


def test_a_rival_names_its_weight_or_was_tuned(small_study):
    args, _, results = small_study
    args.lrs = "5e-5,1e-4"
    args.weights = "0.05,0.2"
    assert len(study.choices(args, "set")) == 4
    assert [*study.choices(args, "set=0.3")] == ["set 5e-5 0.3", "set 1e-4 0.3"]
    assert [*study.choices(args, "none")] == ["none 5e-5 0", "none 1e-4 0"]
    with pytest.raises(ValueError, match="set wasn't tuned"):
        study.tuned_options(args, "set", results)
    args.lrs = "1e-4"
    expected = ["--lr", "1e-4", "--search-weight", "0.3", "--search-credit", "set"]
    assert study.tuned_options(args, "set=0.3", results) == expected


# ---- One answer for each set ---------------------------------------------------------------------


def test_a_baseline_of_other_sets_is_unbiased():
    """Enumerates all traces and answers of a toy: 3 traces, all 3 sets of 2, an answer for each."""
    sets = [(0, 1), (0, 2), (1, 2)]
    logits = torch.tensor([-0.7, 0.2, 1.1], dtype=torch.float64)  # of right, by right candidates
    right_chance = logits.sigmoid()
    estimate = torch.zeros(3, dtype=torch.float64)
    true = torch.zeros(3, dtype=torch.float64)
    for traces in itertools.product((0, 1), repeat=3):
        chance = np.prod([0.3 if trace else 0.7 for trace in traces])
        counts = [traces[i] + traces[j] for i, j in sets]
        for count in counts:
            true[count] += chance / 3 * right_chance[count] * (1 - right_chance[count])
        for rewards in itertools.product((0.0, 1.0), repeat=3):
            advantages = credits.other_sets_advantages(torch.tensor(rewards).double()[:, None])
            joint = chance
            for count, reward in zip(counts, rewards):
                joint = joint * (right_chance[count] if reward else 1 - right_chance[count])
            for count, reward, advantage in zip(counts, rewards, advantages[:, 0]):
                estimate[count] += joint * advantage * (reward - right_chance[count])
    assert torch.allclose(estimate, true)


# ---- Scripts that call spiral.py, in miniature ---------------------------------------------------


def test_noise_of_unbiased_credits_is_measured_around_the_true_gradient(tmp_path, monkeypatch):
    monkeypatch.setattr(gradient_noise, "RESULT", tmp_path / "noise.json")
    monkeypatch.setattr(gradient_noise, "DRAWS", 4)
    monkeypatch.setattr(sys, "argv", ["", "--sizes", "2", "2", "--name=start"])
    gradient_noise.main()
    found = json.loads(gradient_noise.RESULT.read_text())["start"]
    slope, _ = found["lattice_bias"]["trace"]
    assert 1 < slope < 8 / 7  # N1 / (N1 - 1), which fully spread tokens would have
    for name in ("set, K=8 N2=2", "curve + residual"):
        for _, squared_mean, along, true in found["credits"][name]:
            assert squared_mean == pytest.approx(true, rel=1e-3, abs=1e-3)
            assert along == pytest.approx(true, rel=1e-3, abs=1e-3)


def test_the_tokenizer_of_tiny_is_made_again(tmp_path):
    warm_start.write_tokenizer(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / name).read_bytes() == (spiral.TINY / name).read_bytes()


def test_warm_start(tmp_path):
    options = ["--steps=1", "--pool=5", "--documents", "2", "2", f"--out={tmp_path}"]
    warm_start.main(options)
    policy = spiral.load_policy(spiral.Config(model=str(tmp_path)))
    assert policy.tokenizer.eos_ids == {1274}
    text = policy.tokenizer.decode(policy.tokenizer.encode("Answer: 3*(7+5)"))
    assert text == "Answer: 3*(7+5)"


def test_robustness():
    counts = robustness.kill_runs(1)
    assert counts["same"] == counts["runs"]


def test_bench(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "TURNS", 1)
    bench.main(["--quick", "--cases=rollout,update", f"--out={tmp_path}"])
    result = json.loads((tmp_path / "bench_cpu_quick.json").read_text())
    assert len(result["rows"]) == 4


def test_real_model(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(real_model, "ROWS", tmp_path / "rows.jsonl")
    monkeypatch.setattr(real_model, "RIVALS", {"base": {}, "spiral curve": {}})
    shutil.copytree(spiral.TINY, tmp_path / "smollm2")
    options = ["--tokens=9", "--problems=2", "--max-aggregation-tokens=4", f"--out={tmp_path}"]
    real_model.main(options)
    made = raw.read_rows(real_model.ROWS)
    assert len(made) == 6
    untrained, trained, *_ = made
    assert untrained["steps"] == []
    assert trained["steps"][0]["tokens"] >= 9
    assert trained["scores"].keys() >= set(tables.REAL_MODEL.values()) - {"rsa step 1"}
    monkeypatch.setattr(raw, "SHOWN_VERSION", raw.VERSION)
    monkeypatch.setattr(raw, "RESULTS", tmp_path)
    shutil.copy(real_model.ROWS, tmp_path / "real_model.jsonl")
    assert "vote of 8 aggregations" in tables.real_model()

    real_model.main(options)  # all done
    assert raw.read_rows(real_model.ROWS) == made
    real_model.main(["--transcripts"])
    assert "==== spiral curve ====" in capsys.readouterr().out
