"""Tests of the scripts beside it: each in miniature, and the tables in the READMEs."""

import json
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

import spiral  # noqa: E402


def test_intervals_hold_seeds_and_problems():
    seeds, problems = np.arange(5.0)[:, None], np.arange(1000.0)[None] % 7
    mean, half = plot.interval(seeds + 0 * problems)  # Student's t of 4 degrees of freedom
    assert (mean, half) == (2, pytest.approx(2.776 * (2.5 / 5) ** 0.5, rel=0.01))
    _, other = plot.interval(0 * seeds + problems)
    assert other == pytest.approx(1.96 * (problems.var() / 1000) ** 0.5, rel=0.01)


def test_pass_curves_and_the_traces_needed():
    row = {"evaluation": {"traces": 16}, "lattice": False, "right": [0, 3, 16]}
    for curve, right in zip(plot.pass_curve(row), row["right"], strict=True):
        assert curve == pytest.approx([spiral.pass_at_k(16, right, 2**i) for i in range(5)])
    theirs = np.tile(np.arange(7) / 10, (2, 3, 1))
    assert plot.factor(theirs + 0.3, theirs, 64) == "8.00 (8.00 to 8.00)"


@pytest.mark.parametrize("readme", [HERE.parent / "README.md", HERE / "README.md"])
def test_every_table_in_the_readmes_is_that_of_the_raw_files(readme):
    assert plot.fill(readme.read_text()) == readme.read_text()


def test_noise_of_unbiased_credits_is_measured_around_the_true_gradient(tmp_path, monkeypatch):
    monkeypatch.setattr(gradient_noise, "RESULT", tmp_path / "noise.json")
    monkeypatch.setattr(gradient_noise, "DRAWS", 4)
    monkeypatch.setattr(sys, "argv", ["", "--sizes", "2", "2", "--name=start"])
    gradient_noise.main()
    found = json.loads(gradient_noise.RESULT.read_text())["start"]
    assert 1 < found["lattice_bias"]["trace"][0] < 8 / 7  # N1 / (N1 - 1): tokens fully spread
    for name in ("set, K=8 N2=2", "curve + residual"):
        for _, squared, along, true in found["credits"][name]:
            assert [squared, along] == pytest.approx([true, true], rel=1e-3, abs=1e-3)


def test_robustness():
    found = robustness.kill(1)
    assert found["same"] == found["runs"]


def test_bench(tmp_path):
    bench.main(["--quick", "--cases=rollout,update", f"--out={tmp_path}"])
    rows = json.loads((tmp_path / "bench_cpu_quick.json").read_text())["rows"]
    assert len(rows) == 4


@pytest.mark.parametrize("path", [*(HERE.parent / "presets").glob("*.args")])
def test_presets(path):
    assert spiral.parse_config([f"@{path}"]).lora_rank


def test_the_tables_of_the_real_model_are_those_of_the_raw_rows():
    rows, few = real_model.read_rows()[:18], ("base", "grpo", "spiral curve", "spiral pass")
    shown = real_model.table(rows, few, ("pass@1", "aggregate@4", "rsa step 1"))
    assert shown in (HERE.parent / "README.md").read_text()
    assert real_model.table(rows) in (HERE / "README.md").read_text()


def test_real_model(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(real_model, "ROWS", tmp_path / "rows.jsonl")
    monkeypatch.setattr(real_model, "RIVALS", {"base": {}, "spiral curve": {}})
    shutil.copytree(spiral.TINY, tmp_path / "smollm2")
    options = ["--tokens=9", "--problems=2", "--max_aggregation_tokens=4", f"--out={tmp_path}"]
    real_model.main(options)
    rows = real_model.read_rows()
    assert len(rows) == 6 and rows[1]["steps"][0]["tokens"] >= 9 and not rows[0]["steps"]
    real_model.main(options)  # all done
    assert real_model.read_rows() == rows
    real_model.main(["--report"])
    assert "| pass@1 |" in capsys.readouterr().out and (tmp_path / "rows.png").exists()
