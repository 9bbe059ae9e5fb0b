"""Reference losses from a model and from a table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import assert_same_bits
from torch import Tensor, nn
from torch.nn import functional as F

from fastsel.scores import Scores
from fastsel.select import ReferenceLosses, ReferenceModel, RhoLoss

N, B = 20, 6


def make_model() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(N, 4, generator=generator)
    return inputs, torch.randint(0, 3, (N,), generator=generator)


def test_a_model_gives_its_losses_and_stays_as_it_was() -> None:
    model = make_model().train()
    inputs, target = data()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    losses = ReferenceModel(model, nn.CrossEntropyLoss()).losses(inputs, target)
    assert model.training
    assert model[2].training
    for key, value in model.state_dict().items():
        assert_same_bits(value, before[key])
    assert all(parameter.grad is None for parameter in model.parameters())
    model.eval()
    expected = F.cross_entropy(model(inputs), target, reduction="none").detach()
    assert not losses.requires_grad
    # Two float32 cross-entropies.
    torch.testing.assert_close(losses, expected, rtol=3e-6, atol=1e-7)


def test_the_criterion_is_the_references_own_or_the_batchs() -> None:
    model, (inputs, target) = make_model(), data()
    mine, given = nn.CrossEntropyLoss(), nn.CrossEntropyLoss(label_smoothing=0.3)
    own = ReferenceModel(model, mine).losses(inputs, target, None, given)
    assert torch.equal(own, ReferenceModel(model, mine).losses(inputs, target))
    lent = ReferenceModel(model).losses(inputs, target, None, given)
    assert torch.equal(lent, ReferenceModel(model, given).losses(inputs, target))
    assert not torch.equal(lent, own)
    with pytest.raises(ValueError, match="ReferenceModel: criterion must be given"):
        ReferenceModel(model).losses(inputs, target)


def test_inputs_of_several_tensors() -> None:
    class Two(nn.Module):
        def forward(self, first: Tensor, second: Tensor) -> Tensor:
            return first + 2 * second

    inputs, target = torch.randn(N, 3), torch.randint(0, 3, (N,))
    reference = ReferenceModel(Two(), nn.CrossEntropyLoss())
    expected = reference.losses((inputs, inputs), target)
    assert torch.equal(reference.losses({"second": inputs, "first": inputs}, target), expected)


def test_a_table_gives_what_the_model_gave(tmp_path: Path) -> None:
    model, (inputs, target) = make_model(), data()
    criterion = nn.CrossEntropyLoss()
    batches = [(inputs[i : i + B], target[i : i + B]) for i in range(0, N, B)]
    table = ReferenceLosses.of(model, criterion, batches)
    assert table.table.shape == (N,)
    ids = torch.tensor([3, 19, 0, 3])
    losses = table.losses(None, target[ids], ids)
    by_model = ReferenceModel(model, criterion).losses(inputs[ids], target[ids])
    # Matrix products may sum in another order for another batch size.
    torch.testing.assert_close(losses, by_model, rtol=1e-5, atol=1e-6)
    for name in ("losses.npy", "losses.pt"):
        table.save(tmp_path / name)
        assert_same_bits(ReferenceLosses(tmp_path / name).table, table.table)
        assert_same_bits(ReferenceLosses(str(tmp_path / name)).table, table.table)


def test_a_table_of_ones_own() -> None:
    values = np.linspace(0, 1, N)
    table = ReferenceLosses(values)
    values[:] = 7.0  # the table is a copy
    assert table.table.dtype == torch.float32
    losses = table.losses(None, torch.zeros(2), torch.tensor([19, 0]))
    assert losses.tolist() == [1.0, 0.0]
    half = ReferenceLosses(torch.ones(3, dtype=torch.float16, requires_grad=True))
    assert half.table.dtype == torch.float32
    assert not half.table.requires_grad


@pytest.mark.parametrize("kind", ["model", "table"])
def test_references_complete_scores(kind: str) -> None:
    model, (inputs, target) = make_model(), data()
    criterion = nn.CrossEntropyLoss()
    reference: ReferenceModel | ReferenceLosses = ReferenceModel(model)
    if kind == "table":
        reference = ReferenceLosses.of(model, criterion, [(inputs, target)])
    loss = torch.rand(N)
    ids = torch.arange(N)
    scores = reference.add_to(Scores(loss=loss, batch_size=N), inputs, target, ids, criterion)
    assert scores.loss is loss
    assert scores.reference_loss is not None
    expected = (loss - scores.reference_loss).topk(5).indices.sort().values
    assert torch.equal(RhoLoss(0.25)(scores), expected)


def test_a_broken_reference_puts_its_sample_last() -> None:
    table = ReferenceLosses(torch.tensor([0.0, float("nan"), -float("inf"), 1.0]))
    ids = torch.arange(4)
    scores = table.add_to(Scores(loss=torch.ones(4)), None, ids, ids)
    selector = RhoLoss(0.5)
    assert selector(scores).tolist() == [0, 3]
    assert selector.excluded == 2


@pytest.mark.parametrize(
    ("losses", "error", "text"),
    [
        (torch.ones(3, dtype=torch.int64), TypeError, r"floating-point .*, got torch\.int64"),
        (np.ones(3, dtype=np.int32), TypeError, r"got torch\.int32"),
        ([1.0], TypeError, "got list"),
        (torch.ones(2, 2), ValueError, r"must be \[N\], N at least 1, got \[2, 2\]"),
        (torch.ones(0), ValueError, r"got \[0\]"),
        ("losses.csv", ValueError, r"must end in \.npy or \.pt, got 'losses\.csv'"),
    ],
)
def test_tables_that_are_none(losses: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=f"^ReferenceLosses: .*{text}"):
        ReferenceLosses(losses)


def test_files_that_hold_no_table(tmp_path: Path) -> None:
    torch.save({"losses": torch.ones(3)}, tmp_path / "dict.pt")
    with pytest.raises(TypeError, match=r"ReferenceLosses: losses must be .*, got dict"):
        ReferenceLosses(tmp_path / "dict.pt")
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="allow_pickle"):
        ReferenceLosses(tmp_path / "objects.npy")
    with pytest.raises(FileNotFoundError):
        ReferenceLosses(tmp_path / "nothing.pt")
    with pytest.raises(ValueError, match=r"must end in \.npy or \.pt"):
        ReferenceLosses(torch.ones(2)).save(tmp_path / "table.txt")


@pytest.mark.parametrize(
    ("ids", "error", "text"),
    [
        (None, ValueError, "ids must be given"),
        (torch.ones(2), TypeError, r"int64 tensor, got torch\.float32"),
        (torch.tensor([0]), ValueError, r"B = 2 as target, got shape \[1\]"),
        (torch.tensor([0, 3]), IndexError, r"ids must be in \[0, 3\), got 3"),
        (torch.tensor([-1, 0]), IndexError, r"ids must be in \[0, 3\), got -1"),
    ],
)
def test_bad_ids(ids: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=f"^ReferenceLosses: .*{text}"):
        ReferenceLosses(torch.ones(3)).losses(None, torch.zeros(2), ids)


def test_bad_models() -> None:
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got function"):
        ReferenceModel(F.relu)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="criterion must be callable, got str"):
        ReferenceModel(nn.Linear(1, 1), "mse")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="ReferenceModel: autocast_dtype must be"):
        ReferenceModel(nn.Linear(1, 1), autocast_dtype=torch.float64)
    with pytest.raises(ValueError, match="batches must hold at least one batch"):
        ReferenceLosses.of(nn.Linear(1, 1), nn.MSELoss(), [])
