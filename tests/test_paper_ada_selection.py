"""The AdaSelection experiment: its ranks and targets, and that it runs, stops and goes on."""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from fastsel.compare.run import MethodWeights, Point, Run

ROOT = Path(__file__).resolve().parent.parent
PAPERS = ROOT / "bench" / "papers"


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(PAPERS))
    return importlib.import_module("ada_selection_report")


def run(
    strategy: str, values: list[float], *, seed: int = 0, accuracy: bool = True, share: float = 1.0
) -> Run:
    """A run evaluated once a second: a step a second, 100 samples a step at full share."""
    points = tuple(
        Point(i, round(100 * share * i), float(i), 1 - value if accuracy else value,
              accuracy=value if accuracy else None)
        for i, value in enumerate(values)
    )  # fmt: skip
    seconds = {
        "load": 0.0,
        "prepare": 0.0,
        "score": 0.0,
        "choose": 0.0,
        "train": points[-1].seconds,
    }
    names = tuple(strategy.partition(":")[2].split("+"))
    even = (1 / len(names),) * len(names)
    weights = MethodWeights(names, (0, 1), (even, even)) if ":" in strategy else None
    return Run(strategy, seed, "finished", points, seconds, 1.0, 0.5, 0, weights)


def test_equal_values_share_a_rank_and_diverged_runs_come_last(report: Any) -> None:
    values = {"a": 0.5, "b": 0.9, "c": 0.5, "d": None, "e": 0.1}
    assert report.rank_of(values, True) == {"b": 1, "a": 2.5, "c": 2.5, "e": 4, "d": 5}
    assert report.rank_of(values, False) == {"e": 1, "a": 2.5, "c": 2.5, "b": 4, "d": 5}


def test_targets_are_parts_of_the_way_without_sampling(report: Any) -> None:
    assert report.target_of(run("full", [0.1, 0.5, 0.9, 0.7]), 0.5) == pytest.approx(0.5)
    losses = run("full", [4.0, 1.0, 2.0], accuracy=False)
    assert report.target_of(losses, 0.8) == pytest.approx(4 - 0.8 * 3)


def test_reach_interpolates_accuracies_and_losses(report: Any) -> None:
    assert report.reach(run("a", [0.0, 0.4, 0.8], share=0.5), 0.6) == pytest.approx((75, 1.5))
    assert report.reach(run("a", [4.0, 2.0, 1.0], accuracy=False), 1.5) == pytest.approx((150, 1.5))
    assert report.reach(run("a", [0.0, 0.4]), 0.6) is None
    assert report.reach(run("a", [math.nan, math.nan], accuracy=False), 0.6) is None


@pytest.fixture
def results(report: Any) -> dict[str, Any]:
    """One task, two rates, two seeds: sampled runs are the better the later in `METHODS`."""
    runs: list[dict[str, Any]] = [
        {"task": "t", "rate": None, "run": run("full", [0.0, 0.8], seed=s)} for s in range(2)
    ]
    for rate in (0.1, 0.5):
        for place, method in enumerate(list(report.METHODS)[1:]):
            sound = method != "coreset2"  # a model of NaN guesses, and may guess well
            for seed in range(2):
                end = 0.1 + 0.1 * place if sound else 0.99
                one = run(method, [0.0, end], seed=seed, share=rate)
                one = one if sound else dataclasses.replace(one, status="diverged")
                runs.append({"task": "t", "rate": rate, "run": one})
    task = {"kind": "classification", "model": "linear", "budget": "1steps", "batch_size": 100,
            "train_rows": 1000, "test_rows": 100}  # fmt: skip
    return {
        "cpu": "a processor", "gpu": None, "device": "cpu", "processes": 2, "torch": "2.10",
        "commit": "0123456789abc+changes", "date": "2026-01-01", "command": "python x", "seeds": 2,
        "rates": [0.1, 0.5], "tasks": {"t": task}, **report.collect(runs),
    }  # fmt: skip


def test_tables(report: Any, results: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "deep" / "results.json"
    report.write_results(results, path)
    saved = json.loads(path.read_text())
    assert saved == json.loads(json.dumps(results))
    table = report.Table(saved)
    ranks = table.ranks("t")
    # 0.1 to 0.9 in this order, without sampling 0.8 beside coreset1's 0.9 and grad_norm's 0.8.
    assert ranks["coreset1"] == [1, 1] and ranks["full"] == ranks["grad_norm"] == [2.5, 2.5]
    assert ranks["coreset2"] == [11, 11] and ranks["adaselection:big_loss+small_loss"] == [10, 10]
    # To 0.64: 0.64 / 0.9 of its samples at each rate, over 0.64 / 0.8 of all of them.
    ratio, reached, runs = table.to_target("t", "coreset1", "samples_to", 0.8)
    assert (reached, runs) == (4, 4)
    # Samples are whole numbers: of 7.1 and 35.6, up to 1.5 % off.
    assert ratio == pytest.approx(0.8 / 0.9 * math.sqrt(0.1 * 0.5), rel=0.015)
    assert table.to_target("t", "uniform", "samples_to", 0.8) == (None, 0, 4)
    # Its seconds are of half a run, as it were.
    assert all(math.isnan(seconds) for seconds in table.averages("t", "seconds")["coreset2"])
    text = report.tables(saved)
    assert "commit 0123456789 with changes" in text and "diverged" in text and "**90.00**" in text
    assert all(name in text for name in report.METHODS.values())


def test_figures(report: Any, results: dict[str, Any]) -> None:
    figures = importlib.import_module("ada_selection_figures")
    drawn = figures.draw(report.Table(results))
    assert set(drawn) == {"rates", "time", "mixtures", "weights"}
    assert all(png.startswith(b"\x89PNG") for png in drawn.values())


def test_the_page_takes_the_tables(
    report: Any, results: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert report._BEGIN in report.PAGE.read_text() and report._END in report.PAGE.read_text()
    page = tmp_path / "page.md"
    page.write_text(f"before\n{report._BEGIN}\nold\n{report._END}\nafter\n")
    monkeypatch.setattr(report, "PAGE", page)
    report.write_results(results, tmp_path / "results.json")
    report.write_report(tmp_path / "results.json", page=True)
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    assert report.tables(results) in text


def test_a_job_that_fails_ends_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(PAPERS))
    side_by_side = importlib.import_module("side_by_side")
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        side_by_side.run(_divide, [1, 0, 2], processes=2, on_message=lambda message: None)
    told: list[Any] = []
    found = side_by_side.run(_divide, [4, 1, 2], processes=2, on_message=told.append)
    assert found == [0.25, 1.0, 0.5] and sorted(told) == [1, 2, 4]


def _divide(job: int, tell: Any) -> float:
    tell(job)
    return 1 / job


def test_it_runs_stops_and_goes_on(tmp_path: Path) -> None:
    command = [sys.executable, str(PAPERS / "ada_selection.py"), "--quick", "--out", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    while len(list(tmp_path.glob("*/runs/*.json"))) < 2 and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    out, error = process.communicate(timeout=120)
    assert process.returncode == 130, out + error
    assert "finished runs are kept in" in error and "Traceback" not in error
    kept = {path.name for path in tmp_path.glob("*/runs/*.json")}
    assert 2 <= len(kept) < 84 and not (tmp_path / "ada_selection.json").exists()
    again = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert again.returncode == 0, again.stderr
    assert "[84/84]" in again.stdout and "Average rank over the rates" in again.stdout
    results = json.loads((tmp_path / "ada_selection.json").read_text())
    assert results["command"] == "python bench/papers/ada_selection.py --quick"
    assert results["commit"] and results["torch"] and len(results["rows"]) == 2 * (1 + 10 * 2)
    assert all(len(row["metric"]) == 2 for row in results["rows"])
    # Alone, AdaBoost ranks as big loss does.
    end = {(r["task"], r["rate"], r["strategy"]): r["metric"] for r in results["rows"]}
    assert all(end[t, r, "adaboost"] == end[t, r, "big_loss"] for t, r, s in end if s == "adaboost")
    reported = subprocess.run(
        [*command, "--report"], capture_output=True, text=True, env=environment
    )
    assert reported.returncode == 0 and reported.stdout in again.stdout
