"""Tests of the scripts beside it."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
import gradient_noise  # noqa: E402
import plot  # noqa: E402

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
    monkeypatch.setattr(sys, "argv", ["gradient_noise.py", "--sizes", "2", "2"])
    gradient_noise.main()
    found = json.loads(gradient_noise.RESULT.read_text())["start"]["credits"]
    for name in ("set, K=8 N2=2", "curve + residual"):
        for _, squared, along, true in found[name]:
            assert [squared, along] == pytest.approx([true, true], rel=1e-3, abs=1e-3)
