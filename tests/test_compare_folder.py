"""The output folder of `fastsel compare`: resume, Ctrl-C, checkpoints, report; nothing lost."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from compare_samples import losses, small, table

from fastsel.compare import CompareError, write_report
from fastsel.compare.events import Event, RunFinished, RunProgress, RunReused, RunStarted
from fastsel.compare.store import MARKER, write_json
from fastsel.compare.training import Training

MORE = ("full", "uniform", "big_loss", "auto", "adaselection:big_loss+small_loss")


def events_of(run: Callable[[Callable[[Event], None]], object]) -> list[Event]:
    seen: list[Event] = []
    run(seen.append)
    return [event for event in seen if not isinstance(event, RunProgress)]


def run_file(out: Path, name: str, suffix: str = "json") -> Path:
    (found,) = (out / "runs").glob(f"{name}-*.{suffix}")
    return found


def test_results_are_complete_json(tmp_path: Path) -> None:
    result = small(tmp_path)
    saved = json.loads((tmp_path / "results.json").read_text())
    assert saved["format"] == "fastsel-compare" and saved["complete"] is True
    assert len(saved["runs"]) == 6 and len(result.rows) == 3
    assert saved["settings"]["budget"] == "24 steps" and saved["settings"]["lr"] == 0.01
    assert saved["goal"]["test_loss"] == {str(seed): goal for seed, goal in result.goals.items()}
    assert {"cpu", "gpu"} <= set(saved["machine"]) and saved["conclusion"] == result.conclusion
    names = [p.name for p in (tmp_path / "runs").iterdir()]
    assert all(re.fullmatch(r"[a-z_]+-[01]-[0-9a-f]{12}\.json", name) for name in names)
    assert {name.rpartition("-")[0] for name in names} == {
        f"{name}-{seed}" for name in ("full", "uniform", "big_loss") for seed in (0, 1)
    }


def test_a_rerun_takes_over_finished_runs(tmp_path: Path) -> None:
    first = small(tmp_path)
    events = events_of(lambda listen: small(tmp_path, on_event=listen))
    assert sum(isinstance(event, RunReused) for event in events) == 6
    assert not any(isinstance(event, RunStarted) for event in events)
    # More seeds and strategies: only what is new is trained.
    more = events_of(lambda listen: small(tmp_path, seeds=3, strategies=MORE, on_event=listen))
    assert sum(isinstance(event, RunReused) for event in more) == 6
    assert sum(isinstance(event, RunFinished) for event in more) == 9
    names = {path.name.rpartition("-")[0] for path in (tmp_path / "runs").iterdir()}
    assert "adaselection.big_loss+small_loss-2" in names  # not every disk takes a colon
    assert small(tmp_path, seeds=3, strategies=MORE).interrupted is False
    assert small(tmp_path).runs == first.runs


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_other_settings_and_data_are_said_and_replace_no_run(tmp_path: Path) -> None:
    first = small(tmp_path)
    kept = files_of(tmp_path / "runs")
    events = events_of(lambda listen: small(tmp_path, batch_size=16, on_event=listen))
    why = [event.why for event in events if isinstance(event, RunStarted)]
    assert len(why) == 6 and set(why) == {"batch_size 32 -> 16; the earlier run is kept"}
    # Another table of the same name; the closest earlier runs are those of the same batch size.
    other = dataclasses.replace(table(rows=300), name="halves")
    events = events_of(lambda listen: small(tmp_path, other, on_event=listen))
    why = [event.why for event in events if isinstance(event, RunStarted)]
    assert len(why) == 6 and all(w.startswith("other data") for w in why)
    assert not any("batch_size" in w for w in why)
    after = files_of(tmp_path / "runs")
    assert len(after) == 18 and after.items() >= kept.items()
    # Back to the first: all of it is there, and results.json tells of it again.
    assert small(tmp_path).runs == first.runs
    saved = json.loads((tmp_path / "results.json").read_text())
    assert saved["settings"]["batch_size"] == 32 and saved["data"]["fingerprint"] == (
        first.fingerprint
    )


def test_the_rate_does_not_matter_to_the_plain_step(tmp_path: Path) -> None:
    small(tmp_path)
    events = events_of(lambda listen: small(tmp_path, rate=0.5, on_event=listen))
    assert {e.run.strategy for e in events if isinstance(e, RunReused)} == {"full"}


def test_a_damaged_run_file_is_redone(tmp_path: Path) -> None:
    small(tmp_path)
    run_file(tmp_path, "full-0").write_text("{")
    events = events_of(lambda listen: small(tmp_path, on_event=listen))
    started = [event for event in events if isinstance(event, RunStarted)]
    assert [(e.strategy, e.seed, e.why) for e in started] == [
        ("full", 0, "the saved file cannot be read")
    ]


def stop_at(
    strategy: str, seed: int, kind: type[RunStarted | RunProgress]
) -> Callable[[Event], None]:
    def listen(event: Event) -> None:
        if isinstance(event, kind) and (event.strategy, event.seed) == (strategy, seed):
            raise KeyboardInterrupt

    return listen


def test_ctrl_c_keeps_what_is_finished(tmp_path: Path) -> None:
    whole = small(tmp_path / "whole")
    stopped = small(tmp_path / "stopped", on_event=stop_at("big_loss", 0, RunStarted))
    assert stopped.interrupted and [r.strategy for r in stopped.runs] == ["full", "uniform"]
    saved = json.loads((tmp_path / "stopped" / "results.json").read_text())
    assert saved["complete"] is False and len(saved["runs"]) == 2
    write_report(stopped)
    resumed = small(tmp_path / "stopped")
    assert not resumed.interrupted
    assert resumed.runs[:2] == stopped.runs
    assert [losses(r) for r in resumed.runs] == [losses(r) for r in whole.runs]


def test_ctrl_c_still_shows_later_runs_of_an_earlier_time(tmp_path: Path) -> None:
    whole = small(tmp_path)
    run_file(tmp_path, "uniform-0").unlink()
    stopped = small(tmp_path, on_event=stop_at("uniform", 0, RunStarted))
    assert stopped.interrupted and stopped.runs == whole.runs[:1] + whole.runs[2:]


def test_ctrl_c_before_anything_is_finished(tmp_path: Path) -> None:
    stopped = small(tmp_path, on_event=stop_at("full", 0, RunStarted))
    assert stopped.interrupted and not stopped.runs and "No verdict" in stopped.conclusion
    assert write_report(stopped).is_file()


def test_a_long_run_goes_on_from_its_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = small(tmp_path / "whole")
    monkeypatch.setattr("fastsel.compare.runner._PROGRESS_SECONDS", 0.0)
    steps = 0

    def stop_midway(event: Event) -> None:
        nonlocal steps
        steps += isinstance(event, RunProgress) and event.strategy == "uniform"
        if steps == 15:
            raise KeyboardInterrupt

    small(tmp_path / "cut", checkpoint_seconds=0.0, on_event=stop_midway)
    assert run_file(tmp_path / "cut", "uniform-0", "ckpt").is_file()
    first: list[int] = []

    def watch(event: Event) -> None:
        if isinstance(event, RunStarted) and event.resumed:
            first.append(-1)
        if isinstance(event, RunProgress) and event.strategy == "uniform" and event.seed == 0:
            first.append(event.step)

    resumed = small(tmp_path / "cut", on_event=watch)
    assert first[:2] == [-1, 15]  # the fifteenth step was cut before its checkpoint
    assert [losses(r) for r in resumed.runs] == [losses(r) for r in whole.runs]
    assert not list((tmp_path / "cut" / "runs").glob("*.ckpt"))


def test_a_checkpoint_of_other_settings_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastsel.compare.runner._PROGRESS_SECONDS", 0.0)
    small(tmp_path, checkpoint_seconds=0.0, on_event=stop_at("full", 0, RunProgress))
    small(tmp_path, checkpoint_seconds=0.0, on_event=stop_at("uniform", 0, RunProgress))
    events = events_of(lambda listen: small(tmp_path, lr=0.5, on_event=listen))
    assert not any(event.resumed for event in events if isinstance(event, RunStarted))


def test_a_folder_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text("mine")
    with pytest.raises(CompareError, match=r"holds results\.json that fastsel compare did not"):
        small(tmp_path)
    assert (tmp_path / "results.json").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


@pytest.mark.parametrize("task", ["classification", "regression"])
def test_every_file_that_is_written_is_refused_from_somebody_else(
    tmp_path: Path, task: str
) -> None:
    write_report(small(tmp_path / "ours", table(task), seeds=1))
    written = {path.name for path in (tmp_path / "ours").iterdir()} - {MARKER}
    assert len(written) == 8  # runs, results.json, report.html, five curves
    for name in written:
        theirs = tmp_path / name
        theirs.mkdir()
        (theirs / name).write_text("mine")
        with pytest.raises(CompareError, match=f"holds {re.escape(name)} that fastsel compare"):
            small(theirs)
        assert (theirs / name).read_text() == "mine"


@pytest.mark.parametrize(("umask", "mode"), [(0o077, 0o600), (0o002, 0o664)])
def test_files_follow_the_umask(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        write_json(tmp_path / "values.json", {"a": 1})
    finally:
        os.umask(before)
    assert (tmp_path / "values.json").stat().st_mode & 0o777 == mode
    assert [path.name for path in tmp_path.iterdir()] == ["values.json"]


def test_an_unwritable_folder_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    started: list[Event] = []
    with pytest.raises(CompareError, match="cannot write to the output folder"):
        small(tmp_path / "file" / "out", on_event=started.append)
    assert not started


# ---- the report --------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["classification", "regression"])
def test_the_report_needs_nothing_else(tmp_path: Path, task: str) -> None:
    data = dataclasses.replace(table(task), name="<b>&name", note="<script>alert(1)</script>")
    path = write_report(small(tmp_path, data))
    text = path.read_text()
    assert "<script" not in text and "<b>&name" not in text and "&lt;b&gt;&amp;name" in text
    assert "http:" not in text and "https:" not in text and 'src="data:image/png' in text
    metric = "accuracy" if task == "classification" else "rmse"
    for name in ("loss-steps", "loss-seconds", f"{metric}-steps", f"{metric}-seconds", "step-time"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_a_diverged_run_is_shown_and_the_rest_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Training.step

    def break_big_loss(training: Training) -> None:
        step(training)
        if training.strategy == "big_loss" and training.steps == 9:
            with torch.no_grad():
                next(training.model.parameters()).fill_(math.nan)

    monkeypatch.setattr(Training, "step", break_big_loss)
    result = small(tmp_path)
    row = next(row for row in result.rows if row.strategy == "big_loss")
    assert row.verdict == "diverged (2 of 2)" and row.final_loss is None
    assert len(result.runs) == 6
    assert "diverged (2 of 2)" in write_report(result).read_text()
    saved = json.loads((tmp_path / "results.json").read_text())
    assert any(p["test_loss"] is None for run in saved["runs"] for p in run["curve"])
