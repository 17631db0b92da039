"""Tests of the scripts beside it: each in miniature, and every table of the pages.

python -m pytest experiments
"""

import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
import bench  # noqa: E402
import gradient_noise  # noqa: E402
import plot  # noqa: E402
import real_model  # noqa: E402
import robustness  # noqa: E402
import rows as raw  # noqa: E402
import tables  # noqa: E402

import spiral  # noqa: E402

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
    assert len(trained) == 69
    assert len(evaluated) == 85


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


def test_pass_curve_is_that_of_spiral():
    row = {"evaluation": {"traces": 16}, "lattice": False, "right": [0, 3, 16]}
    for curve, right in zip(raw.pass_curve(row), row["right"], strict=True):
        expected = [spiral.pass_at_k(16, right, k) for k in (1, 2, 4, 8, 16)]
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


def test_robustness():
    counts = robustness.kill_runs(1)
    assert counts["same"] == counts["runs"]


def test_bench(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "TURNS", 1)
    bench.main(["--quick", "--cases=rollout,update", f"--out={tmp_path}"])
    result = json.loads((tmp_path / "bench_cpu_quick.json").read_text())
    assert len(result["rows"]) == 4


@pytest.mark.parametrize("path", sorted((HERE.parent / "presets").glob("*.args")))
def test_presets(path):
    assert spiral.parse_config([f"@{path}"]).lora_rank


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
    assert trained["scores"].keys() >= set(tables.REAL_MODEL.values())

    real_model.main(options)  # all done
    assert raw.read_rows(real_model.ROWS) == made
    real_model.main(["--transcripts"])
    assert "==== spiral curve ====" in capsys.readouterr().out
