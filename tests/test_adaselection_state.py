"""AdaSelection's state and its records: they resume exactly, and show how the weights moved."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import assert_same_bits
from select_samples import batch, squared_loss

from fastsel.select import AdaSelection, BigLoss, plot_weights

# ---- state ----


def doubtful() -> AdaSelection:
    return AdaSelection(
        ("big_loss", "margin", squared_loss), rate=0.3, beta=0.9, curriculum_power=None,
        standardize=False, record_every=2,
    )  # fmt: skip


def test_resumes_bit_for_bit() -> None:
    whole, first = doubtful(), doubtful()
    for i in range(7):
        assert torch.equal(whole(batch(i)), first(batch(i)))
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = AdaSelection(("big_loss", "margin", squared_loss), rate=0.5)
    second(batch(100))
    pointers = second._method_weights.data_ptr(), second._step.data_ptr()
    second.load_state_dict(torch.load(file, weights_only=True))
    # In place: a captured graph would go on reading the same memory.
    assert pointers == (second._method_weights.data_ptr(), second._step.data_ptr())
    assert (second.rate, second.beta, second.curriculum_power) == (0.3, 0.9, None)
    assert not second.standardize
    assert second.excluded == first.excluded
    for i in range(7, 12):
        assert torch.equal(second(batch(i)), whole(batch(i)))
    ours, theirs = second.state_dict(), whole.state_dict()
    for name in ("method_weights", "method_losses", "step"):
        assert_same_bits(ours[name], theirs[name])
    for mine, other in zip(second.history(), whole.history(), strict=True):
        assert_same_bits(mine, other)
    assert second.record_every == 2


def test_a_state_is_a_copy() -> None:
    selector = AdaSelection(rate=0.5)
    selector(batch(0))
    state = selector.state_dict()
    before = state["method_losses"].clone()
    selector(batch(1))
    assert torch.equal(state["method_losses"], before)
    assert state["step"].item() == 1


def changed(state: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {**state, **changes}


def test_states_that_cannot_be_resumed() -> None:
    selector = doubtful()
    for i in range(3):
        selector(batch(i))
    before = selector.state_dict()
    other = AdaSelection(("big_loss", "small_loss"), rate=0.9)
    other(batch(0))
    for state, text in [
        (other.state_dict(), r"over big_loss, margin, squared_loss, got one over big_loss, small_"),
        (BigLoss(0.9).state_dict(), "of the selector 'adaselection', got that of 'big_loss'"),
        (changed(before, method_weights=torch.ones(2)), r"method_weights must be a tensor \[3\]"),
        (changed(before, step=torch.ones(1)), r"step must be a tensor \[1\] of torch.int64"),
        (changed(before, rate=0.0), "rate must be in"),
        (changed(before, beta=-1.0), "beta must be finite and at least 0, got -1.0"),
        (changed(before, beside=before["beside"][:1]), "state must be of 2 methods beside"),
        (changed(before, beside=before["beside"][::-1]), "of the selector 'margin', got that of"),
        (
            changed(before, history={**before["history"], "weights": torch.ones(5, 2)}),
            r"history must be steps \[T\] and weights \[T, 3\]",
        ),
        ({k: v for k, v in before.items() if k != "step"}, "must have step"),
    ]:
        with pytest.raises(ValueError, match=text):
            selector.load_state_dict(state)
        after = selector.state_dict()
        assert after.keys() == before.keys()
        for name in ("method_weights", "method_losses", "step"):
            assert_same_bits(after[name], before[name])
        assert (after["rate"], after["beta"], after["excluded"]) == (
            before["rate"], before["beta"], before["excluded"]
        )  # fmt: skip
        assert_same_bits(after["history"]["weights"], before["history"]["weights"])


# ---- weights over time ----


def test_history() -> None:
    selector = AdaSelection(rate=0.5, record_every=3)
    every = AdaSelection(rate=0.5, record_every=1)
    followed = []
    for i in range(8):
        selector(batch(i))
        every(batch(i))
        followed.append(list(selector.weights.values()))
    steps, weights = every.history()
    assert steps.tolist() == list(range(1, 9))
    assert weights.tolist() == followed
    steps, weights = selector.history()
    # The end of every window of three, and where it is now.
    assert steps.tolist() == [3, 6, 8]
    assert weights.tolist() == [followed[2], followed[5], followed[7]]


def test_history_keeps_the_last_records(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastsel.select import adaselection
    from fastsel.select.history import WeightHistory

    monkeypatch.setattr(
        adaselection, "WeightHistory", lambda every, methods: WeightHistory(every, methods, 4)
    )
    selector = AdaSelection(rate=0.5, record_every=2)
    for i in range(15):
        selector(batch(i))
    steps, weights = selector.history()
    assert steps.tolist() == [10, 12, 14, 15]
    assert weights[-1].tolist() == list(selector.weights.values())


def test_history_is_off_and_can_be_turned_on() -> None:
    selector = AdaSelection(rate=0.5)
    selector(batch(0))
    with pytest.raises(ValueError, match="history needs a selector with record_every of at least"):
        selector.history()
    selector.record_every = 1
    selector(batch(1))
    assert selector.history()[0].tolist() == [2]
    selector.record_every = 0
    assert selector.record_every == 0
    with pytest.raises(ValueError, match="record_every must be an int of at least 0, got -1"):
        selector.record_every = -1


def test_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    selector = AdaSelection(rate=0.5, record_every=1)
    with pytest.raises(ValueError, match="history must hold at least one record"):
        plot_weights(selector)
    for i in range(5):
        selector(batch(i))
    figure = plot_weights(selector, tmp_path / "weights.png")
    assert (tmp_path / "weights.png").read_bytes().startswith(b"\x89PNG")
    lines = figure.axes[0].lines
    assert [line.get_label() for line in lines] == list(selector.names)
    for m, line in enumerate(lines):
        assert list(line.get_xdata()) == [1, 2, 3, 4, 5]
        assert list(line.get_ydata()) == selector.history()[1][:, m].tolist()
    named = plot_weights(selector.history(), methods=list("abcd"))
    assert [line.get_label() for line in named.axes[0].lines] == list("abcd")
    with pytest.raises(ValueError, match="methods must be 4 names, got none"):
        plot_weights(selector.history())
    with pytest.raises(ValueError, match="methods must be 4 names, got 1"):
        plot_weights(selector.history(), methods=("a",))
