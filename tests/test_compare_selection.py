"""What `fastsel compare` shows of the inside: phases, reference losses, method weights, switch."""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from compare_samples import losses, settings, small, table
from torch import nn

from fastsel.compare import write_report
from fastsel.compare.dress import DRESS, label_of, style_of
from fastsel.compare.plots import figures, render
from fastsel.compare.references import cross_fitted_losses
from fastsel.compare.run import MethodWeights, Run, SwitchDecision, SwitchRecord
from fastsel.compare.strategies import STRATEGIES
from fastsel.compare.table import notes
from fastsel.compare.timing import Clock
from fastsel.compare.training import Training, _thinned, train_run
from fastsel.data import Dataset

MIXTURE = "adaselection:big_loss+small_loss"


class FakeTime:
    """A clock that moves by one second at every look."""

    def __init__(self) -> None:
        self.looks = itertools.count(1)

    def perf_counter(self) -> float:
        return float(next(self.looks))

    def process_time(self) -> float:
        return 0.0


# ---- the clock ---------------------------------------------------------------------------------


def test_every_second_belongs_to_one_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastsel.compare.timing.time", FakeTime())
    clock = Clock("cpu")
    with clock.phase("train"):  # looks: begin 1, score 2 to 3, choose 4 to 5, end 6
        with clock.phase("score"):
            pass
        with clock.phase("choose"):
            pass
    assert clock.seconds == {"load": 0, "prepare": 0, "score": 1, "choose": 1, "train": 3}
    with clock.phase("load"):  # looks: begin 7, now 8, end 9; outside of phases no time passes
        assert clock.now == 6
    assert clock.total == 7


def test_a_phase_that_fails_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastsel.compare.timing.time", FakeTime())
    clock = Clock("cpu")
    with pytest.raises(RuntimeError), clock.phase("train"), clock.phase("score"):
        raise RuntimeError
    with clock.phase("load"):
        pass
    assert clock.seconds == {"load": 1, "prepare": 0, "score": 1, "choose": 0, "train": 2}


@pytest.mark.parametrize("strategy", ["full", "big_loss", "importance", "auto"])
def test_phases_are_those_of_the_strategy(strategy: str) -> None:
    data = table()
    seconds = train_run(data, settings(data), strategy, 0).seconds
    spent = {phase for phase, value in seconds.items() if value > 0}
    assert spent == {"load", "train"} | (set() if strategy == "full" else {"score", "choose"})


# ---- reference losses --------------------------------------------------------------------------


def reference(data: Dataset) -> torch.Tensor:
    plan = settings(data)
    return cross_fitted_losses(data, plan, nn.CrossEntropyLoss(), 0, Clock("cpu"))[0]


def test_no_row_is_judged_by_a_model_that_learnt_from_it() -> None:
    data = table()
    before = reference(data)
    assert before.shape == data.train_target.shape and bool(before.isfinite().all())
    # Turn one label around: its own judge has not seen it, so the judge's two class probabilities
    # for that row are the same as before and add up to 1.
    row = 7
    turned = data.train_target.clone()
    turned[row] = 1 - turned[row]
    after = reference(dataclasses.replace(data, train_target=turned))
    together = torch.exp(-before[row]) + torch.exp(-after[row])
    # Two float32 losses near 1, each rounded to about 1e-7.
    assert float(together) == pytest.approx(1.0, abs=1e-6)
    # The other half was judged by a model that did learn from it.
    assert 0 < int((after != before).sum()) - 1 <= math.ceil(len(before) / 2)


def test_rho_loss_goes_by_the_prepared_losses() -> None:
    data = table()
    training = Training(data, settings(data), "rho_loss", 0)
    training.prepare()
    assert training.selective is not None and training.reference is not None
    ids = torch.arange(32)
    step = training.selective
    scores = step.score(data.train_inputs[ids], data.train_target[ids], ids)
    assert scores is not None and scores.reference_loss is not None
    assert torch.equal(scores.reference_loss, training.reference[ids])
    assert bool((training.reference != 0).all())


def test_a_budget_of_seconds_bounds_the_preparation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastsel.compare.timing.time", FakeTime())
    data = table()
    training = Training(data, settings(data, budget="200s"), "rho_loss", 0)
    training.prepare()
    # Twice a tenth of it; with the looks at the clock before, between and after.
    assert 40 <= training.clock.seconds["prepare"] <= 50


# ---- samples left out --------------------------------------------------------------------------


def test_samples_left_out_are_counted_and_said(tmp_path: Path) -> None:
    data = table()
    inputs = data.train_inputs.clone()
    inputs[:3] = math.inf  # three rows whose loss is NaN, whatever the weights
    broken = dataclasses.replace(data, train_inputs=inputs)
    result = small(tmp_path, broken, strategies=("uniform", "big_loss", MIXTURE), seeds=1)
    excluded = {run.strategy: run.excluded for run in result.runs}
    # 24 batches of 32 of 320 rows: 2.4 epochs, so each broken row came twice or three times.
    assert 6 <= excluded["big_loss"] == excluded[MIXTURE] <= 9
    saved = json.loads((tmp_path / "results.json").read_text())
    assert {run["strategy"]: run["excluded"] for run in saved["runs"]} == excluded
    said = f"big_loss kept {excluded['big_loss']} samples out of its choices: their scores"
    assert any(note.startswith(said) for note in notes(result))


# ---- method weights ----------------------------------------------------------------------------


def test_method_weights_are_recorded_over_the_steps() -> None:
    data = table()
    run = train_run(data, settings(data), MIXTURE, 0)
    found = run.method_weights
    assert found is not None and found.methods == ("big_loss", "small_loss")
    assert found.steps == tuple(range(25)) and found.weights[0] == (0.5, 0.5)
    # Six digits each.
    assert all(sum(row) == pytest.approx(1.0, abs=2e-6) for row in found.weights)
    assert len(set(found.weights)) > 20
    assert train_run(data, settings(data), "big_loss", 0).method_weights is None


def test_long_runs_are_recorded_less_often() -> None:
    data = table()
    plan = settings(data, budget="1000steps")
    assert Training(data, plan, MIXTURE, 0).record_every == 5
    plan = settings(data, budget="8000samples")  # 1000 steps of 8
    assert Training(data, plan, MIXTURE, 0).record_every == 5
    short, long = (_thinned(list(range(0, n, 10))) for n in (4000, 9000))
    assert short == list(range(0, 4000, 10)) and len(long) <= 400
    assert set(long[: len(short) // 4]) <= set(short)  # so that seeds can be drawn together


# ---- the switch --------------------------------------------------------------------------------


STEPS = 800


def automatic(data: Dataset, **options: Any) -> Run:
    return train_run(data, settings(data, budget=f"{STEPS}steps"), "auto", 0, **options)


def test_the_switch_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    # Steps of either kind then take one second: choosing cannot pay.
    monkeypatch.setattr("fastsel.select.clock.time", FakeTime())
    data = table()
    run = automatic(data)
    assert run.switch is not None and run.method_weights is not None
    first, *later = run.switch.decisions
    assert not first.select and first.cost == 1.0 and 0 < first.share < 1 and not later
    assert run.switch.steps == run.method_weights.steps == tuple(range(0, STEPS + 1, 4))
    assert run.switch.share[0] is None and run.switch.share[-1] is not None
    assert run.switch.chose == 0.0
    trials = 6  # which train on 8 of 32
    assert run.final.samples == trials * 8 + (STEPS - trials) * 32
    assert not any(map(run.switch.selecting, range(STEPS)))


def test_a_resumed_switch_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastsel.select.clock.time", FakeTime())
    data = table()
    saved = io.BytesIO()

    def save(training: Training) -> None:
        if training.steps == 10:  # in the middle of its first trials
            torch.save(training.state_dict(), saved)

    whole = automatic(data, on_step=save)
    saved.seek(0)
    resumed = automatic(data, state=torch.load(saved, weights_only=True))
    assert losses(resumed) == losses(whole)
    assert (resumed.switch, resumed.method_weights) == (whole.switch, whole.method_weights)


def test_only_auto_may_leave_choosing_alone() -> None:
    data = table()
    for strategy in (name for name in STRATEGIES if name not in ("full", "auto")):
        step = Training(data, settings(data), strategy, 0).selective
        assert step is not None and step.switch.force == "select"


def test_decisions_hold_until_the_next() -> None:
    decisions = (SwitchDecision(40, True, 0.9, 0.5), SwitchDecision(90, False, 0.4, 0.5))
    switch = SwitchRecord(0.5, decisions, (), (), ())
    assert [switch.selecting(step) for step in (0, 39, 40, 89, 90, 500)] == [
        False, False, True, True, False, False
    ]  # fmt: skip


def test_records_survive_the_file() -> None:
    weights = MethodWeights(("a", "b"), (0, 5), ((0.5, 0.5), (0.25, 0.75)))
    decisions = (SwitchDecision(40, True, 0.9, 0.5),)
    switch = SwitchRecord(0.25, decisions, (0, 5), (None, 0.5), (None, 1.5))
    data = table()
    run = train_run(data, settings(data), "uniform", 0)
    full = dataclasses.replace(run, excluded=3, method_weights=weights, switch=switch)
    for one in (run, full):
        assert Run.from_json(json.loads(json.dumps(one.to_json()))) == one


# ---- figures -----------------------------------------------------------------------------------


def test_figures_of_the_inside(tmp_path: Path) -> None:
    strategies = ("full", "uniform", "auto", MIXTURE)
    result = small(tmp_path, strategies=strategies, budget="60steps")
    assert [f.stem for f in figures(result)][-2:] == ["method-weights", "switch"]
    assert figures(result)[-2].panels == ("auto", MIXTURE)
    text = write_report(result).read_text()
    assert text.count("<figure>") == 7 and "The switch chooses while the share" in text
    assert (tmp_path / "switch.png").is_file()
    # A call that has none of this to show leaves none of it behind.
    plain = small(tmp_path, strategies=strategies[:2], budget="60steps")
    text = write_report(plain).read_text()
    assert text.count("<figure>") == 5 and "The switch" not in text
    assert not (tmp_path / "switch.png").exists()
    assert not (tmp_path / "method-weights.png").exists()


def test_the_switch_is_drawn_where_it_chose(tmp_path: Path) -> None:
    result = small(tmp_path, strategies=("uniform", "auto"), budget="60steps")

    def chosen(run: Run) -> Run:
        if run.switch is None:
            return run
        decisions = (SwitchDecision(20, True, 0.9, 0.5), SwitchDecision(50, False, 0.4, 0.5))
        return dataclasses.replace(run, switch=dataclasses.replace(run.switch, decisions=decisions))

    def drawn(runs: tuple[Run, ...]) -> bytes:
        return render(figures(result)[-1], dataclasses.replace(result, runs=runs), "dark")

    assert drawn(tuple(map(chosen, result.runs))) != drawn(result.runs)


@pytest.mark.parametrize("theme", DRESS)
def test_no_two_lines_look_alike(theme: str) -> None:
    mixtures = tuple(f"adaselection:big_loss+{name}" for name in ("uniform", "margin", "coreset1"))
    strategies = (*STRATEGIES, *mixtures)
    styles = [style_of(name, strategies, theme) for name in strategies]
    assert len({(style.color, style.dashes) for style in styles}) == len(styles)


def test_long_names_break() -> None:
    assert label_of("adaselection:big_loss+small_loss+uniform", 26) == (
        "adaselection: big_loss +\nsmall_loss + uniform"
    )
    assert label_of("grad_norm", 11) == "grad_norm"
