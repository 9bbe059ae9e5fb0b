"""What the tests of the Lightning adapter share: a module that keeps its batches, and its fit."""

from __future__ import annotations

import warnings
from typing import Any

import lightning.pytorch as pl
import torch
from integration_samples import RATE, B, network, samples
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset

from fastsel.integrations.lightning import SelectiveCallback
from fastsel.select.selector import Selector


class Module(pl.LightningModule):
    """A classifier that keeps what its training step is given."""

    def __init__(self, *, calls_forward: bool = True) -> None:
        super().__init__()
        self.net = network()
        self.calls_forward = calls_forward
        self.batches: list[Any] = []

    def forward(self, inputs: Tensor) -> Tensor:
        logits: Tensor = self.net(inputs)
        return logits

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.batches.append(batch)
        if isinstance(batch, dict):
            inputs, target = batch["x"], batch["y"]
        else:
            inputs, target = batch[:2]
        loss = F.cross_entropy(self(inputs) if self.calls_forward else self.net(inputs), target)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    @property
    def sizes(self) -> list[int]:
        """How many samples each step was given."""
        return [len(batch["x"] if isinstance(batch, dict) else batch[0]) for batch in self.batches]


class Rows(Dataset[Any]):
    """Rows of any kind, which the loader's default collation puts together."""

    def __init__(self, rows: list[Any]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        return self.rows[index]


def loader(batches: int = 1) -> DataLoader[Any]:
    return DataLoader(TensorDataset(*samples(batches)), batch_size=B)


def callback(selector: Any = "big_loss", rate: Any = RATE, **kwargs: Any) -> SelectiveCallback:
    if isinstance(selector, Selector):
        rate = None
    return SelectiveCallback(
        nn.CrossEntropyLoss(), selector, rate, **{"switch": "select", **kwargs}
    )


def trainer(*callbacks: Any, flavour: Any = pl, **kwargs: Any) -> Any:
    defaults = {
        "max_epochs": 1, "accelerator": "cpu", "logger": False, "enable_checkpointing": False,
        "enable_progress_bar": False, "enable_model_summary": False, "log_every_n_steps": 1,
    }  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return flavour.Trainer(callbacks=list(callbacks), **{**defaults, **kwargs})


def fit(module: Any, data: Any, *callbacks: Any, ckpt_path: Any = None, **kwargs: Any) -> Any:
    made = trainer(*callbacks, **kwargs)
    with warnings.catch_warnings():  # about the number of workers, and torch's own deprecations
        warnings.simplefilter("ignore")
        made.fit(module, data, ckpt_path=ckpt_path)
    return made
