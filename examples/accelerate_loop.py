"""Hugging Face Accelerate on handwritten digits, with accumulation and gradient clipping.

Run it with ``accelerate launch examples/accelerate_loop.py``.
"""

from __future__ import annotations

import torch
from accelerate import Accelerator
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fastsel.integrations.accelerate import accelerated_step


def main(epochs: int = 15, *, cpu: bool = False) -> float:
    """Trains and gives the accuracy on the last 297 digits."""
    accelerator = Accelerator(gradient_accumulation_steps=2, cpu=cpu)
    torch.manual_seed(0)
    pixels, labels = load_digits(return_X_y=True)
    inputs, target = torch.tensor(pixels, dtype=torch.float32) / 16, torch.tensor(labels)
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    loader = DataLoader(TensorDataset(inputs[:1500], target[:1500]), batch_size=64, shuffle=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    step = accelerated_step(
        accelerator,
        model,
        nn.CrossEntropyLoss(),
        optimizer,
        "grad_norm",
        rate=0.5,
        max_grad_norm=1.0,
    )

    for _ in range(epochs):
        for batch_inputs, batch_target in loader:
            with accelerator.accumulate(model):
                step(batch_inputs, batch_target)

    with torch.no_grad():
        predicted = model(inputs[1500:].to(accelerator.device)).argmax(1).cpu()
    accuracy = float((predicted == target[1500:]).float().mean())
    accelerator.print(f"{step.switch}, accuracy {accuracy:.3f}")
    return accuracy


if __name__ == "__main__":
    main()
