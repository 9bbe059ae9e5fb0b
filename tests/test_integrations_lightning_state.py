"""What `SelectiveCallback` leaves behind: the module as it was, and a state to resume from."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from integration_samples import RATE, B, K, assert_same_weights, samples
from lightning_samples import Module, callback, fit, loader
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from fastsel.integrations.lightning import SelectiveCallback
from fastsel.select import AdaSelection, LossMemory, Uniform


def test_the_module_is_as_it_was_after_the_fit() -> None:
    module = Module()
    selective = callback()
    fit(module, loader(), selective)
    assert "training_step" not in vars(module)
    assert not module._forward_hooks
    fit(module, loader(), selective)  # and once more
    assert module.sizes == [K, K]


def test_the_module_is_as_it_was_after_an_exception() -> None:
    class Failing(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            raise RuntimeError("out of luck")

    module = Failing()
    with pytest.raises(RuntimeError, match="out of luck"):
        fit(module, loader(), callback())
    assert "training_step" not in vars(module)


def test_a_training_step_of_the_instance_comes_back() -> None:
    module = Module()
    own = module.training_step
    module.__dict__["training_step"] = own
    fit(module, loader(), callback())
    assert vars(module)["training_step"] is own
    assert module.sizes == [K]


def resumable() -> SelectiveCallback:
    selector = AdaSelection(("big_loss", "small_loss", "uniform"), rate=RATE)
    memory = LossMemory(3 * B)
    return callback(selector, ids_key=2, memory=memory, scoring_every=2)


def drawing() -> SelectiveCallback:
    return callback(Uniform(RATE, generator=torch.Generator().manual_seed(5)), ids_key=2)


@pytest.mark.parametrize("make", [resumable, drawing])
def test_a_resumed_fit_goes_on_as_the_uninterrupted_one(make: Any, tmp_path: Path) -> None:
    data = DataLoader(TensorDataset(*samples(3), torch.arange(3 * B)), batch_size=B)
    whole = Module()
    fit(whole, data, make(), max_epochs=2)
    fit(Module(), data, make()).save_checkpoint(tmp_path / "half.ckpt")
    resumed, selective = Module(), make()
    fit(resumed, data, selective, max_epochs=2, ckpt_path=tmp_path / "half.ckpt")
    assert len(resumed.batches) == 3
    assert_same_weights(resumed, whole)
    for one, other in zip(resumed.batches, whole.batches[3:], strict=True):
        assert torch.equal(one[2], other[2])


def test_a_state_of_another_selector_is_refused_and_changes_nothing() -> None:
    selective, other = callback(), callback("small_loss")
    before = other.state_dict()
    with pytest.raises(ValueError, match="'small_loss', got that of 'big_loss'"):
        other.load_state_dict(selective.state_dict())
    with pytest.raises(ValueError, match="state must have 'ranks'"):
        other.load_state_dict({})
    assert other.state_dict() == before


def test_the_callback_can_be_copied_and_keeps_no_module_alive() -> None:
    selective = callback()
    fit(Module(), loader(), selective)
    assert not any(isinstance(part, Module) for part in vars(selective.selection.scorer).values())
    assert copy.deepcopy(selective).selection.steps == 1
