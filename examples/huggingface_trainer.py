"""The Hugging Face Trainer on handwritten digits, with a vision transformer made from scratch.

Run it with ``python examples/huggingface_trainer.py``.
"""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.utils.data import Dataset
from transformers import TrainingArguments, ViTConfig, ViTForImageClassification

from fastsel.integrations.transformers import SelectiveTrainer


class Digits(Dataset[dict[str, Tensor]]):
    """Some of the digits, as dicts of what the model's forward takes."""

    def __init__(self, rows: slice) -> None:
        pixels, labels = load_digits(return_X_y=True)
        images = torch.tensor(pixels, dtype=torch.float32) / 16
        self.images, self.labels = images.view(-1, 1, 8, 8)[rows], torch.tensor(labels)[rows]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        return {"pixel_values": self.images[row], "labels": self.labels[row]}


def main(epochs: int = 15) -> float:
    """Trains and gives the accuracy on the last 297 digits."""
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=8,
        patch_size=2,
        num_channels=1,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_labels=10,
    )
    model = ViTForImageClassification(config)

    def accuracy_of(prediction: Any) -> dict[str, float]:
        right = prediction.predictions.argmax(1) == prediction.label_ids
        return {"accuracy": float(right.mean())}

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            per_device_train_batch_size=64,
            num_train_epochs=epochs,
            learning_rate=3e-3,
            lr_scheduler_type="constant",
            save_strategy="no",
            report_to="none",
            use_cpu=True,
        )
        trainer = SelectiveTrainer(
            model,
            arguments,
            train_dataset=Digits(slice(1500)),
            eval_dataset=Digits(slice(1500, None)),
            compute_metrics=accuracy_of,
            selector="grad_norm",
            rate=0.5,
        )
        trainer.train()
        accuracy: float = trainer.evaluate()["eval_accuracy"]
    print(f"{trainer.selection.switch}, accuracy {accuracy:.3f}")
    return accuracy


if __name__ == "__main__":
    main()
