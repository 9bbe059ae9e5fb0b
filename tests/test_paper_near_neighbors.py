"""The near-neighbour experiment: that it runs and goes on, and what its table says."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "bench" / "papers" / "near_neighbors.py"


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    return importlib.import_module("near_neighbors_report")


def start(folder: Path, *arguments: str) -> str:
    """The script's output."""
    words = [sys.executable, str(SCRIPT), "--quick", "--seeds", "1", "--out", str(folder)]
    done = subprocess.run([*words, *arguments], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_it_runs_and_goes_on(tmp_path: Path) -> None:
    first = start(tmp_path)
    assert first.count("finished earlier") == 0
    assert "digits, linear: NN-50 over NN-0" in first
    results = json.loads((tmp_path / "near_neighbors.json").read_text())
    assert len(results["runs"]) == 10
    for figure in (1, 3, 4, 7):
        image = tmp_path / f"near_neighbors-figure{figure}.png"
        assert image.read_bytes().startswith(b"\x89PNG")
    kept = sorted(tmp_path.glob("4_*.json"))
    kept[0].unlink()
    again = start(tmp_path)
    assert again.count("finished earlier") == 9
    repeated = json.loads((tmp_path / "near_neighbors.json").read_text())
    assert repeated["runs"] == results["runs"]  # the same seed gives the same run
    assert start(tmp_path, "--report").startswith(results["cpu"])


def runs_of(figure: int, strategy: str, losses: list[list[float]]) -> list[dict[str, Any]]:
    """Runs as they are kept, one a seed."""
    job = {"figure": figure, "strategy": strategy, "dataset": "d", "model": "m", "steps": 4}
    return [{"job": {**job, "seed": s}, "losses": one, "norms": [1.0]} for s, one in
            enumerate(losses)]  # fmt: skip


def test_ratios_and_verdicts(report: Any) -> None:
    ours = runs_of(4, "NN-50", [[2.0, 1.0, 0.3], [2.0, 1.0, 5.0]])
    theirs = runs_of(4, "NN-0", [[2.0, 2.0, 2.0], [2.0, 3.0, 1.0]])
    assert report.ratio(ours, theirs, 2) == pytest.approx(((0.75 + 0.6) / 2, 0.6, 0.75))
    mean, low, high = report.ratio(ours, theirs, None)
    assert (mean, low, high) == pytest.approx(((0.55 + 8 / 6) / 2, 0.55, 8 / 6))
    assert report.verdict(0.8, 0.9, "below") == "agrees"
    assert report.verdict(0.8, 0.9, "above") == "does not agree"
    assert report.verdict(1.1, 1.2, "above") == "agrees"
    assert report.verdict(0.9, 1.1, "below") == "seeds differ"
    results = {
        "gpu": None, "cpu": "a processor", "torch": "2", "commit": "abc", "date": "today",
        "command": "python x", "minutes": 1, "runs": [*ours, *theirs],
    }  # fmt: skip
    assert "| 4 | d, m: NN-50 over NN-0, the first 80 iterations |" in report.tables(results)


def test_the_page_has_its_place(report: Any) -> None:
    text = report.PAGE.read_text()
    assert report.BEGIN in text
    assert report.END in text
