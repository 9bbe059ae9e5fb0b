"""`fastsel compare`: fair runs, exact resume, an honest verdict, and a folder nobody loses."""

from __future__ import annotations

import dataclasses
import io
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from fastsel.compare import CompareError, Comparison, compare, parse_budget, write_report
from fastsel.compare.budget import Budget, default_budget
from fastsel.compare.events import Event, RunFinished, RunProgress, RunReused, RunStarted
from fastsel.compare.models import make_model, resolve_model
from fastsel.compare.run import BatchOrder, Run, Training, train_run
from fastsel.compare.settings import STRATEGIES, Settings, complete
from fastsel.data import Dataset
from fastsel.data.dataset import split_dataset


def table(task: str = "classification", rows: int = 400) -> Dataset:
    """A small, learnable table: two noisy classes, or a noisy plane."""
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(rows, 4)).astype(np.float32)
    score = inputs @ np.array([2.0, -1.0, 0.5, 0.0]) + rng.normal(size=rows) * 0.3
    if task == "regression":
        return split_dataset("plane", inputs, 50 + 10 * score, task="regression")
    classes = ("low", "high")
    return split_dataset(
        "halves", inputs, (score > 0).astype(np.int64), task="classification", classes=classes
    )


def settings(data: Dataset, **changes: object) -> Settings:
    base: dict[str, object] = {
        "strategies": STRATEGIES, "seeds": 1, "model": "linear", "budget": "24steps", "rate": 0.25,
        "batch_size": 32, "lr": None, "device": "cpu", "threads": None, "evaluations": 6,
        "test_rows": 50,
    }  # fmt: skip
    return complete(data, **(base | changes))  # type: ignore[arg-type]


def small(out: Path, data: Dataset | None = None, **changes: object) -> Comparison:
    base: dict[str, object] = {
        "model": "linear", "budget": "24steps", "batch_size": 32, "evaluations": 6, "seeds": 2,
        "strategies": ("full", "uniform", "big_loss"),
    }  # fmt: skip
    return compare(data or table(), out=out, **(base | changes))  # type: ignore[arg-type]


def losses(run: Run) -> list[float]:
    return [point.test_loss for point in run.curve]


# ---- settings ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2000steps", Budget(2000, "steps")),
        ("1_000 Steps", Budget(1000, "steps")),
        ("1step", Budget(1, "steps")),
        ("1.5epochs", Budget(1.5, "epochs")),
        ("100000samples", Budget(100_000, "samples")),
        ("30s", Budget(30, "seconds")),
        ("2min", Budget(120, "seconds")),
        ("1h", Budget(3600, "seconds")),
    ],
)
def test_parse_budget(text: str, expected: Budget) -> None:
    assert parse_budget(text) == expected
    assert parse_budget(str(expected)) == expected


@pytest.mark.parametrize("text", ["", "10", "steps", "-5steps", "0steps", "1.5steps", "5 parsecs"])
def test_parse_budget_refuses(text: str) -> None:
    with pytest.raises(CompareError, match="budget must be"):
        parse_budget(text)


def test_epochs_become_steps_and_the_default_is_bounded() -> None:
    assert Budget(1.5, "epochs").in_steps(11) == Budget(17, "steps")
    assert [default_budget(n).amount for n in (1, 11, 20, 10_000)] == [200, 220, 400, 600]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"strategies": ("uniform", "best")}, "strategies must be .* got uniform, best"),
        ({"strategies": ()}, "got none"),
        ({"strategies": ("uniform", "uniform")}, "each once"),
        ({"rate": 0.0}, "rate must be above 0 and at most 1, got 0.0"),
        ({"rate": 1.5}, "rate must be"),
        ({"rate": math.nan}, "rate must be"),
        ({"lr": -1.0}, "lr must be above 0, got -1.0"),
        ({"seeds": 0}, "seeds must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"threads": 0}, "threads must be at least 1"),
        ({"model": "vgg"}, "model must be auto, linear, .* got 'vgg'"),
        ({"model": "cnn"}, "model cnn needs images, halves is a table"),
        ({"device": "tpu"}, "device must be cpu or cuda"),
        ({"model": "mlp", "rate": 0.01}, "batch norm, which needs two"),
    ],
)
def test_bad_settings(changes: dict[str, object], message: str) -> None:
    with pytest.raises(CompareError, match=message):
        settings(table(), **changes)


# ---- models ------------------------------------------------------------------------------------


def images(side: int, channels: int = 3) -> Dataset:
    rng = np.random.default_rng(0)
    pixels = rng.normal(size=(40, channels, side, side)).astype(np.float32)
    return split_dataset(
        "images", pixels, np.arange(40) % 10, task="classification",
        classes=tuple(map(str, range(10))),
    )  # fmt: skip


def test_models_have_the_published_sizes() -> None:
    def parameters(name: str, data: Dataset) -> int:
        return sum(p.numel() for p in make_model(name, data, 0).parameters())

    # ResNet-18 with the CIFAR stem and ten classes: 11.17 M, the count commonly reported.
    assert parameters("resnet18", images(32)) == 11_173_962
    widths = [4, 2048, 512, 128, 2]
    dense = sum((a + 1) * b for a, b in zip(widths, widths[1:], strict=False))
    assert parameters("mlp", table()) == dense + 2 * (2048 + 512 + 128)


@pytest.mark.parametrize("name", ["linear", "mlp", "cnn", "resnet18"])
def test_models_map_a_batch_to_logits(name: str) -> None:
    data = images(16)
    assert make_model(name, data, 0)(data.train_inputs[:4]).shape == (4, 10)


def test_regression_models_give_one_number_a_row() -> None:
    data = table("regression")
    assert make_model("mlp", data, 0)(data.train_inputs[:4]).shape == (4,)


def test_weights_depend_on_the_seed_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one, same, other = (make_model("mlp", table(), seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(one[key], same[key]) for key in one)
    assert not torch.equal(one["1.weight"], other["1.weight"])


def test_auto_model() -> None:
    assert resolve_model("auto", images(8)) == "cnn"
    assert resolve_model("auto", images(4)) == "mlp"
    assert resolve_model("auto", table()) == "mlp"


# ---- one run -----------------------------------------------------------------------------------


def test_batches_visit_every_row_once_an_epoch() -> None:
    batches = BatchOrder(10, 3, seed=0)
    epoch = torch.cat([batches.next_batch() for _ in range(3)])
    assert len(set(epoch.tolist())) == 9
    again = BatchOrder(10, 3, seed=0)
    assert torch.equal(epoch, torch.cat([again.next_batch() for _ in range(3)]))
    state = again.state_dict()
    ahead = [batches.next_batch() for _ in range(7)]
    resumed = BatchOrder(10, 3, seed=9)
    resumed.load_state_dict(state)
    assert all(torch.equal(a, resumed.next_batch()) for a in ahead)


@pytest.mark.parametrize("task", ["classification", "regression"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_run_learns_is_counted_and_repeats(task: str, strategy: str) -> None:
    data = table(task)
    run = train_run(data, settings(data), strategy, 0)
    assert [p.step for p in run.curve] == [0, 4, 8, 12, 16, 20, 24]
    assert run.final.samples == 24 * (32 if strategy == "full" else 8)
    assert all(a.seconds < b.seconds for a, b in zip(run.curve, run.curve[1:], strict=False))
    assert math.isclose(sum(run.seconds.values()), run.final.seconds, rel_tol=1e-9)
    assert losses(run) == losses(train_run(data, settings(data), strategy, 0))
    if strategy != "small_loss":  # which need not learn anything
        assert run.final.test_loss < run.curve[0].test_loss
    assert (run.final.accuracy is None) == (run.final.r2 is not None)


def test_strategies_share_weights_and_batches() -> None:
    data = table()
    runs = [train_run(data, settings(data), name, 3) for name in STRATEGIES]
    assert len({run.curve[0].test_loss for run in runs}) == 1
    trainings = [Training(data, settings(data), name, 3) for name in STRATEGIES]
    orders = [[t.batches.next_batch().tolist() for _ in range(20)] for t in trainings]
    assert all(order == orders[0] for order in orders)


def test_choosing_everything_is_the_plain_step() -> None:
    data = table()
    whole = settings(data, rate=1.0)
    assert losses(train_run(data, whole, "uniform", 0)) == losses(train_run(data, whole, "full", 0))


def test_regression_is_reported_in_its_own_units() -> None:
    data = table("regression")
    final = train_run(data, settings(data), "full", 0).final
    assert final.rmse is not None and final.r2 is not None
    assert math.isclose(final.rmse, math.sqrt(final.test_loss) * data.target_std, rel_tol=1e-9)
    assert data.target_std > 10  # so that the units show


def test_a_resumed_run_is_the_same_run() -> None:
    data = table()
    for strategy in ("uniform", "grad_norm", "full"):
        saved = io.BytesIO()

        def save(training: Training, saved: io.BytesIO = saved) -> None:
            if training.steps == 10:
                torch.save(training.state_dict(), saved)

        whole = train_run(data, settings(data), strategy, 0, on_step=save)
        saved.seek(0)
        state = torch.load(saved, weights_only=True)
        resumed = train_run(data, settings(data), strategy, 0, state=state)
        assert losses(resumed) == losses(whole)
        assert resumed.curve[:3] == whole.curve[:3]  # the clock goes on, too


def test_a_run_that_diverges_says_so_and_stops() -> None:
    data = table("regression")
    inputs = data.train_inputs.clone()
    inputs[0] = math.inf
    broken = dataclasses.replace(data, train_inputs=inputs)
    run = train_run(broken, settings(data), "full", 0)
    assert run.status == "diverged" and run.final.step < 24
    assert not math.isfinite(run.final.test_loss)
    assert json.dumps(run.to_json(), allow_nan=False)
    assert math.isnan(Run.from_json(run.to_json()).final.test_loss)


def test_other_budgets() -> None:
    data = table()
    run = train_run(data, settings(data, budget="80samples"), "uniform", 0)
    assert run.final.samples == 80 and run.final.step == 10
    run = train_run(data, settings(data, budget="0.02s"), "uniform", 0)
    assert run.final.seconds >= 0.02 and len(run.curve) >= 2


# ---- the folder --------------------------------------------------------------------------------


def events_of(run: Callable[[Callable[[Event], None]], object]) -> list[Event]:
    seen: list[Event] = []
    run(seen.append)
    return [event for event in seen if not isinstance(event, RunProgress)]


def test_results_are_complete_json(tmp_path: Path) -> None:
    result = small(tmp_path)
    saved = json.loads((tmp_path / "results.json").read_text())
    assert saved["format"] == "fastsel-compare" and saved["complete"] is True
    assert len(saved["runs"]) == 6 and len(result.rows) == 3
    assert saved["settings"]["budget"] == "24 steps" and saved["settings"]["lr"] == 0.01
    assert saved["goal"]["test_loss"] == {str(seed): goal for seed, goal in result.goals.items()}
    assert {"cpu", "gpu"} <= set(saved["machine"]) and saved["conclusion"] == result.conclusion
    assert sorted(p.name for p in (tmp_path / "runs").iterdir()) == sorted(
        f"{name}-{seed}.json" for name in ("full", "uniform", "big_loss") for seed in (0, 1)
    )


def test_a_rerun_takes_over_finished_runs(tmp_path: Path) -> None:
    first = small(tmp_path)
    events = events_of(lambda listen: small(tmp_path, on_event=listen))
    assert sum(isinstance(event, RunReused) for event in events) == 6
    assert not any(isinstance(event, RunStarted) for event in events)
    # More seeds and strategies: only what is new is trained.
    more = events_of(
        lambda listen: small(tmp_path, seeds=3, strategies=STRATEGIES, on_event=listen)
    )
    assert sum(isinstance(event, RunReused) for event in more) == 6
    assert sum(isinstance(event, RunFinished) for event in more) == 9
    assert small(tmp_path).runs == first.runs


def test_other_settings_are_redone_and_said(tmp_path: Path) -> None:
    small(tmp_path)
    events = events_of(lambda listen: small(tmp_path, batch_size=16, on_event=listen))
    redone = [event.redone for event in events if isinstance(event, RunStarted)]
    assert len(redone) == 6 and set(redone) == {"batch_size 32 -> 16"}
    events = events_of(lambda listen: small(tmp_path, table("regression"), on_event=listen))
    assert all("other data" in e.redone for e in events if isinstance(e, RunStarted))
    # The rate does not matter to the plain step.
    small(tmp_path)
    events = events_of(lambda listen: small(tmp_path, rate=0.5, on_event=listen))
    assert {e.run.strategy for e in events if isinstance(e, RunReused)} == {"full"}


def test_a_damaged_run_file_is_redone(tmp_path: Path) -> None:
    small(tmp_path)
    (tmp_path / "runs" / "full-0.json").write_text("{")
    events = events_of(lambda listen: small(tmp_path, on_event=listen))
    started = [event for event in events if isinstance(event, RunStarted)]
    assert [(e.strategy, e.seed, e.redone) for e in started] == [
        ("full", 0, "the saved file cannot be read")
    ]


def stop_at(strategy: str, seed: int, kind: type) -> Callable[[Event], None]:
    def listen(event: Event) -> None:
        run = getattr(event, "run", event)
        if isinstance(event, kind) and (run.strategy, run.seed) == (strategy, seed):
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
    assert (tmp_path / "cut" / "runs" / "uniform-0.ckpt").is_file()
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
    assert "http:" not in text and "https:" not in text and "src=\"data:image/png" in text
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
