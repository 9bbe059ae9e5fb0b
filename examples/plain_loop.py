"""A plain training loop on handwritten digits, trained on the better half of each batch.

Run it with ``python examples/plain_loop.py``.
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import nn

import fastsel


def main(epochs: int = 15) -> float:
    """Trains, says when choosing paid, and gives the accuracy on the last 297 digits."""
    torch.manual_seed(0)
    pixels, labels = load_digits(return_X_y=True)
    inputs, target = torch.tensor(pixels, dtype=torch.float32) / 16, torch.tensor(labels)
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    step = fastsel.SelectiveStep(model, nn.CrossEntropyLoss(), optimizer, "grad_norm", rate=0.5)

    for _ in range(epochs):
        for rows in torch.randperm(1500).split(128):
            step(inputs[rows], target[rows])

    for step_number, select, share, cost in step.switch.decisions:
        verdict = "choose" if select else "do not choose"
        print(f"from step {step_number}: {verdict}, for share is {share:.2f} and cost {cost:.2f}")
    with torch.no_grad():
        accuracy = float((model(inputs[1500:]).argmax(1) == target[1500:]).float().mean())
    print(f"accuracy {accuracy:.3f}")
    return accuracy


if __name__ == "__main__":
    main()
