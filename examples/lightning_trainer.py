"""Lightning on handwritten digits: one callback, and the module stays as it is.

Run it with ``python examples/lightning_trainer.py``.
"""

from __future__ import annotations

import lightning.pytorch as pl
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fastsel.integrations.lightning import SelectiveCallback


class Digits(pl.LightningModule):
    """Any classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits ``[B, 10]``."""
        logits: Tensor = self.net(inputs)
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The textbook step: it never learns that its batch was chosen."""
        inputs, target = batch
        return nn.functional.cross_entropy(self(inputs), target)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam."""
        return torch.optim.Adam(self.parameters(), lr=1e-3)


def main(epochs: int = 15) -> float:
    """Trains and gives the accuracy on the last 297 digits."""
    torch.manual_seed(0)
    pixels, labels = load_digits(return_X_y=True)
    inputs, target = torch.tensor(pixels, dtype=torch.float32) / 16, torch.tensor(labels)
    loader = DataLoader(TensorDataset(inputs[:1500], target[:1500]), batch_size=128, shuffle=True)
    module = Digits()
    callback = SelectiveCallback(nn.CrossEntropyLoss(), "grad_norm", rate=0.5)
    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=[callback],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, loader)

    with torch.no_grad():
        accuracy = float((module(inputs[1500:]).argmax(1) == target[1500:]).float().mean())
    print(f"{callback.selection.switch}, accuracy {accuracy:.3f}")
    return accuracy


if __name__ == "__main__":
    main()
