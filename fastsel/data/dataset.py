"""The `Dataset` every loader returns, and the two steps they share: splitting and scaling."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Task = Literal["classification", "regression"]
Array = npt.NDArray[Any]

# Below this nothing can be said about a split, let alone about a strategy.
MIN_ROWS = 10


class DataError(ValueError):
    """The data cannot be used as given; the message says what is wrong and what to do."""


def shorten(names: list[str], limit: int = 12) -> str:
    """Join names for a message, with a count in place of those beyond the limit."""
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"


def check_lengths(source: str | Path, inputs: Array, target: Array, where: str = "") -> None:
    """Refuse inputs `[N, ...]` and target `[M]` that do not belong together.

    Raises:
        DataError: N and M differ.
    """
    if len(inputs) != len(target):
        raise DataError(f"{source}: {len(inputs):,} inputs but {len(target):,} targets{where}")


@dataclass(frozen=True)
class Dataset:
    """A data set, split and scaled, ready to train on.

    Attributes:
        name: Short name, used for output folders and headings.
        task: "classification" or "regression".
        train_inputs: float32 `[N, D]` for tables, `[N, C, H, W]` for images.
        train_target: int64 class numbers `[N]`, or float32 `[N]` standardised with
            `target_mean` and `target_std`.
        test_inputs: As `train_inputs`, `[M, ...]`.
        test_target: As `train_target`, `[M]`.
        features: Names of the columns; empty for images.
        classes: Class names in the order of the class numbers; empty for regression.
        note: Where the data come from, their licence, how they were split, what was left out.
        target_mean: Mean of the train target in its own units (regression).
        target_std: Standard deviation of the train target in its own units (regression).
    """

    name: str
    task: Task
    train_inputs: Tensor
    train_target: Tensor
    test_inputs: Tensor
    test_target: Tensor
    features: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()
    note: str = ""
    target_mean: float = 0.0
    target_std: float = 1.0

    @property
    def num_outputs(self) -> int:
        """Outputs a model needs: one per class, or one for a regression."""
        return len(self.classes) if self.task == "classification" else 1

    @property
    def is_image(self) -> bool:
        """Whether the inputs are `[N, C, H, W]` images."""
        return self.train_inputs.ndim == 4

    def fingerprint(self) -> str:
        """SHA-256 over task, shapes and every byte of the four tensors: the data's identity."""
        digest = hashlib.sha256(f"{self.task} {self.classes}".encode())
        for tensor in (self.train_inputs, self.train_target, self.test_inputs, self.test_target):
            array = tensor.detach().cpu().contiguous().numpy()
            digest.update(f"{array.dtype} {array.shape}".encode())
            digest.update(array.reshape(-1).view(np.uint8).data)
        return digest.hexdigest()


def row_groups(inputs: Array) -> Array:
    """Number the distinct rows of inputs `[N, ...]`: `[N]`, equal exactly where rows are equal."""
    flat = np.ascontiguousarray(inputs.reshape(len(inputs), -1))
    if flat.dtype.kind == "f":
        flat = flat + np.zeros((), flat.dtype)  # -0.0 becomes 0.0: equal values, equal bytes
    rows = flat.view(np.dtype((np.void, flat.dtype.itemsize * flat.shape[1]))).reshape(-1)
    return np.unique(rows, return_inverse=True)[1].reshape(-1)


def split_rows(
    inputs: Array, target: Array, *, task: Task, test_fraction: float, seed: int
) -> tuple[Array, Array]:
    """Split rows at random so that train and test share no row.

    Rows equal in all features form a group and a group goes to one side, whatever its targets.
    Classification is stratified: each class gives its share of groups (a group counts for the
    class of its first row), so rare classes are on both sides where they have two groups.

    Args:
        inputs: `[N, ...]`.
        target: `[N]`.
        task: "classification" or "regression".
        test_fraction: Share of the groups that goes to the test part, between 0 and 1.
        seed: The same seed gives the same split.

    Returns:
        Row numbers of the train part and of the test part, each ascending.

    Raises:
        DataError: A side would be empty.
    """
    groups = row_groups(inputs)
    first = np.unique(groups, return_index=True)[1]  # [G] first row of each group
    rng = np.random.default_rng(seed)
    strata = np.zeros(len(first), np.int64) if task == "regression" else target[first]
    in_test = np.zeros(len(first), bool)
    for stratum in np.unique(strata):
        members = np.flatnonzero(strata == stratum)
        wanted = round(test_fraction * len(members))
        # Two groups or more: one on each side at least. A lone group can only be learnt from.
        wanted = min(max(wanted, 1), len(members) - 1)
        in_test[rng.permutation(members)[:wanted]] = True
    test = in_test[groups]
    if test.all() or not test.any():
        raise DataError(
            f"cannot split: only {len(first)} of {len(inputs)} rows are distinct, and train and "
            "test must not share a row"
        )
    return np.flatnonzero(~test), np.flatnonzero(test)


def _scale(train: Array, test: Array) -> tuple[Tensor, Tensor, Array, Array]:
    """Standardise with train statistics: per column, for images per channel.

    Everything but the result is float64. Values are taken relative to the first row and in units
    of the largest distance from it: times near 1.7e9 keep their digits, squares neither overflow
    nor vanish, and a column that is constant in the train part is exactly zero there.

    Args:
        train: `[N]`, `[N, D]` or `[N, C, H, W]`.
        test: The same with M rows.

    Returns:
        Both parts as float32, not finite where float32 cannot hold them; mean and standard
        deviation of the train part (1 where it is constant), with the reduced axes kept.
    """
    axes = (0, 2, 3) if train.ndim == 4 else (0,)
    origin = train[:1, :, :1, :1] if train.ndim == 4 else train[:1]
    with np.errstate(over="ignore", invalid="ignore"):  # the caller refuses what is not finite
        parts = [np.subtract(part, origin, dtype=np.float64) for part in (train, test)]
        unit = np.abs(parts[0]).max(axis=axes, keepdims=True)
        unit[unit == 0] = 1.0
        for part in parts:
            part /= unit
        mean = parts[0].mean(axis=axes, keepdims=True)
        std = parts[0].std(axis=axes, keepdims=True)
        std[std == 0] = 1.0
        scaled = (torch.from_numpy(((part - mean) / std).astype(np.float32)) for part in parts)
        return next(scaled), next(scaled), origin + unit * mean, unit * std


def _check_scaled(name: str, features: tuple[str, ...], train: Tensor, test: Tensor) -> None:
    """Refuse scaled inputs that are not finite, by the names of their columns."""
    finite = [part.isfinite().transpose(0, 1).flatten(1).all(1) for part in (train, test)]  # [D]
    bad = (~(finite[0] & finite[1])).nonzero().flatten().tolist()
    if bad:
        kind = "channels" if train.ndim == 4 else "columns"
        raise DataError(
            f"{name}: {kind} {shorten([features[i] if features else str(i) for i in bad])} have "
            "values too far apart to be standardised in float32. Rescale (for example by the "
            "logarithm) or drop them first"
        )


def make_dataset(
    name: str,
    train: tuple[Array, Array],
    test: tuple[Array, Array],
    *,
    task: Task,
    features: tuple[str, ...] = (),
    classes: tuple[str, ...] = (),
    note: str = "",
) -> Dataset:
    """Build a `Dataset` from split arrays: checks them, scales them, turns them into tensors.

    Args:
        name: Name of the data set.
        train: Inputs `[N, D]` or `[N, C, H, W]` and target `[N]` (class numbers or values).
        test: The same for the test part.
        task: "classification" or "regression".
        features: Column names.
        classes: Class names, in the order of the class numbers.
        note: Source, licence and split, for the report.

    Raises:
        DataError: Too few rows, another number of targets than of inputs in a part, parts
            of different shapes, a single class or value, values that are not finite, as given
            or once scaled.
    """
    if len(train[0]) + len(test[0]) < MIN_ROWS:
        raise DataError(
            f"{name}: needs at least {MIN_ROWS} rows, got {len(train[0]) + len(test[0])}"
        )
    for part, (inputs, target) in (("train", train), ("test", test)):
        check_lengths(name, inputs, target, f" in the {part} part")
        if not len(inputs):
            raise DataError(f"{name}: the {part} part is empty")
        if not (np.isfinite(inputs).all() and np.isfinite(target).all()):
            raise DataError(f"{name}: the {part} part holds values that are not finite (NaN, inf)")
    if train[0].shape[1:] != test[0].shape[1:]:
        raise DataError(
            f"{name}: inputs of the train part are {list(train[0].shape)}, of the test part "
            f"{list(test[0].shape)}: they may differ in the number of rows only"
        )
    distinct = len(np.unique(train[1]))
    if distinct < 2:
        what = "class" if task == "classification" else "value"
        raise DataError(f"{name}: the target has a single {what}: there is nothing to learn")
    train_inputs, test_inputs, *_ = _scale(train[0], test[0])
    _check_scaled(name, features, train_inputs, test_inputs)
    mean, std = 0.0, 1.0
    if task == "regression":
        train_target, test_target, means, stds = _scale(train[1], test[1])
        mean, std = means.item(), stds.item()
        if not (train_target.isfinite().all() and test_target.isfinite().all()):
            raise DataError(
                f"{name}: the target's values are too far apart to be standardised in float32"
            )
    else:
        train_target, test_target = (
            torch.from_numpy(part[1].astype(np.int64)) for part in (train, test)
        )
    return Dataset(
        name, task, train_inputs, train_target, test_inputs, test_target,
        features=features, classes=classes, note=note, target_mean=mean, target_std=std,
    )  # fmt: skip


def split_dataset(
    name: str,
    inputs: Array,
    target: Array,
    *,
    task: Task,
    features: tuple[str, ...] = (),
    classes: tuple[str, ...] = (),
    note: str = "",
    test_fraction: float = 0.2,
    seed: int = 0,
) -> Dataset:
    """Split with `split_rows`, then `make_dataset`; the note is completed with the split.

    Args:
        name: Name of the data set.
        inputs: `[N, D]` or `[N, C, H, W]`.
        target: `[N]`.
        task: "classification" or "regression".
        features: Column names.
        classes: Class names.
        note: Source and licence.
        test_fraction: Share of the distinct rows held out.
        seed: Seed of the split.

    Raises:
        DataError: See `make_dataset` and `split_rows`.
    """
    check_lengths(name, inputs, target)
    if len(inputs) < MIN_ROWS:
        raise DataError(f"{name}: needs at least {MIN_ROWS} rows, got {len(inputs)}")
    if len(np.unique(target)) < 2:
        what = "class" if task == "classification" else "value"
        raise DataError(f"{name}: the target has a single {what}: there is nothing to learn")
    train, test = split_rows(inputs, target, task=task, test_fraction=test_fraction, seed=seed)
    split = (
        f"Random split (seed {seed}): {len(train):,} train and {len(test):,} test rows; "
        "rows with equal features stay on one side."
    )
    return make_dataset(
        name, (inputs[train], target[train]), (inputs[test], target[test]),
        task=task, features=features, classes=classes, note=f"{note} {split}".strip(),
    )  # fmt: skip
