"""What `SelectiveCallback` says to bad arguments, batches and modules."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from integration_samples import RATE, B, K, samples
from lightning_samples import Module, callback, fit, loader
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fastsel.integrations.lightning import SelectiveCallback
from fastsel.select import BigLoss, ImportanceSampling, LossMemory


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="'importance' gives weights, which the framework's own"):
        callback(ImportanceSampling(RATE))
    with pytest.raises(ValueError, match="rate must be given"):
        SelectiveCallback(nn.CrossEntropyLoss(), "big_loss")
    with pytest.raises(TypeError, match="criterion must be callable"):
        SelectiveCallback(None, "big_loss", RATE)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="no_such_option"):
        callback(no_such_option=1)
    with pytest.raises(ValueError, match="needs a reference"):
        callback("rho_loss")


def test_weights_that_come_unannounced_are_refused_in_the_step() -> None:
    class Late(BigLoss):
        def select(self, scores: Any) -> Any:
            return super().select(scores)._replace(weights=torch.ones(K))

    with pytest.raises(ValueError, match="gives weights"):
        fit(Module(), loader(), callback(Late(RATE)))


def test_bad_batches_are_named() -> None:
    three = DataLoader(TensorDataset(*samples(), torch.arange(B)), batch_size=B)
    with pytest.raises(ValueError, match="tuple or list of two, inputs and target, got 3"):
        fit(Module(), three, callback())
    with pytest.raises(ValueError, match="no ids at ids_key 'row'"):
        fit(Module(), loader(), callback(ids_key="row"))
    short = callback(batch_to_inputs_and_target=lambda batch: (batch[0], batch[1][:5]))
    with pytest.raises(ValueError, match="SelectiveCallback: inputs must have the first dimension"):
        fit(Module(), loader(), short)


def test_a_memory_needs_a_training_step_that_calls_forward() -> None:
    data = DataLoader(TensorDataset(*samples(), torch.arange(B)), batch_size=B)
    selective = callback(ids_key=2, memory=LossMemory(B))
    with pytest.raises(ValueError, match="memory needs the output of the training forward"):
        fit(Module(calls_forward=False), data, selective)


def test_a_module_that_iterates_by_itself_is_refused() -> None:
    class Iterating(Module):
        def training_step(self, dataloader_iter: Any) -> Tensor:  # type: ignore[override]
            raise AssertionError("never called")

    with pytest.raises(ValueError, match="takes a dataloader_iter"):
        fit(Iterating(), loader(), callback())
