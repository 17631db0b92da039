"""Every script in miniature."""

import json
import shutil
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
import bench  # noqa: E402
import real_model  # noqa: E402
import robustness  # noqa: E402

import spiral  # noqa: E402


def test_robustness(tmp_path):
    found = robustness.kill(1)
    assert found["same"] == found["runs"]
    robustness.main(["fuzz", "--count=50", f"--out={tmp_path}"])
    found = json.loads((tmp_path / "robustness_fuzz.json").read_text())
    assert all(found[task]["exceptions"] == 0 for task in ("Countdown", "Arithmetic", "Math"))


def test_bench(tmp_path):
    bench.main(["--quick", "--cases=rollout,update", f"--out={tmp_path}"])
    rows = json.loads((tmp_path / "bench_cpu.json").read_text())["rows"]
    assert [row["case"] for row in rows][:1] == ["rollout"] and len(rows) == 4


@pytest.mark.parametrize("path", [*HERE.glob("*.args")])
def test_presets(path):
    assert spiral.parse_config([f"@{path}"]).lora_rank


def test_real_model(tmp_path, monkeypatch, capsys):
    pytest.importorskip("peft"), pytest.importorskip("matplotlib")
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
