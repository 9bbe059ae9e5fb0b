"""The user's own files: CSV, Parquet and NPZ, checked column by column."""

from __future__ import annotations

import csv
import difflib
import gzip
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from fastsel.data.dataset import (
    MIN_ROWS,
    Array,
    DataError,
    Dataset,
    Task,
    make_dataset,
    split_dataset,
)
from fastsel.data.formats import reading
from fastsel.data.optional import require

SUFFIXES = (".csv", ".csv.gz", ".parquet", ".npz")
# A whole-number target with more distinct values than this is taken for a quantity.
MAX_INTEGER_CLASSES = 20
_HEADER_SAMPLE = 100


def load_table(
    path: Path, *, target: str | None, task: Task | None, test_fraction: float, seed: int
) -> Dataset:
    """Load a CSV, Parquet or NPZ file; see `fastsel.data.load`.

    Raises:
        DataError: With the columns, rows or arrays that are at fault.
    """
    if path.suffix == ".npz":
        return _load_npz(path, target, task, test_fraction, seed)
    name = path.name.removesuffix(".gz").rsplit(".", 1)[0]
    frame, note = _read_csv(path) if path.suffix != ".parquet" else (_read_parquet(path), "")
    _check_columns(frame, path)
    column = _target_column(frame, path, target)
    _check_values(frame, path, column)
    values = frame.pop(column)
    labels, classes, task = encode_target(values.to_numpy(), path, column, task)
    inputs = frame.to_numpy(np.float64).astype(np.float32)
    return split_dataset(
        name, inputs, labels, task=task, features=tuple(map(str, frame.columns)),
        classes=classes, note=f"{path.name}, target {column!r}. {note}".strip(),
        test_fraction=test_fraction, seed=seed,
    )  # fmt: skip


def encode_target(
    values: Array, source: Path, column: str, task: Task | None
) -> tuple[Array, tuple[str, ...], Task]:
    """Decide the task and turn a target column into class numbers or values.

    Args:
        values: `[N]`, any type.
        source: File, for messages.
        column: Column, for messages.
        task: Given task, or None to decide.

    Returns:
        int64 class numbers and the class names, or float64 values and (); and the task.

    Raises:
        DataError: Text asked for as regression, or a text column that is an identifier.
    """
    numeric = values.dtype.kind in "iuf"
    distinct = np.unique(values) if numeric else np.unique(values.astype(str))
    if task is None:
        whole = numeric and bool((values == np.floor(values)).all())
        few = len(distinct) <= min(MAX_INTEGER_CLASSES, len(values) // 2)
        task = "classification" if not numeric or (whole and few) else "regression"
    if task == "regression":
        if not numeric:
            raise DataError(f"{source}: column {column!r} is text, regression needs numbers")
        return values.astype(np.float64), (), task
    if len(distinct) > len(values) // 2:
        raise DataError(
            f"{source}: column {column!r} has {len(distinct):,} distinct values in "
            f"{len(values):,} rows: too many for classes"
        )
    codes = np.searchsorted(distinct, values if numeric else values.astype(str))
    names = [f"{value:g}" if numeric else str(value) for value in distinct]
    return codes.astype(np.int64), tuple(names), task


def _open_text(path: Path) -> TextIO:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8-sig", newline="")
    return path.open(encoding="utf-8-sig", newline="")


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def detect_header(rows: list[list[str]]) -> bool:
    """Whether the first of some CSV rows names the columns.

    It does if none of its cells is a number, or if a cell that is no number stands over a
    column of numbers (so "id,2020,2021" over numbers is a header, "5.1,3.5,setosa" is not).
    """
    first, rest = rows[0], rows[1:]
    if not any(_is_number(cell) for cell in first):
        return True
    for i, cell in enumerate(first):
        below = [row[i] for row in rest if i < len(row) and row[i].strip()]
        if cell.strip() and not _is_number(cell) and below and all(map(_is_number, below)):
            return True
    return False


def _read_csv(path: Path) -> tuple[Any, str]:
    pandas = require("pandas", "reading tables")

    def read(path: Path) -> tuple[Any, bool]:
        with _open_text(path) as stream:
            line = stream.readline()
            while line and not line.strip():
                line = stream.readline()
            separator = max(",;\t", key=line.count)
            stream.seek(0)
            rows = []
            for row in csv.reader(stream, delimiter=separator):
                rows += [row] if any(cell.strip() for cell in row) else []
                if len(rows) > _HEADER_SAMPLE:
                    break
        if not rows:
            raise DataError(f"{path} is empty")
        header = detect_header(rows)
        if header and len(set(rows[0])) < len(rows[0]):
            twice = sorted({cell for cell in rows[0] if rows[0].count(cell) > 1})
            raise DataError(f"{path}: columns named twice: {', '.join(twice)}")
        with _open_text(path) as stream:
            # low_memory=False: types are inferred from whole columns, not chunk by chunk.
            frame = pandas.read_csv(
                stream, sep=separator, header=0 if header else None, low_memory=False,
                index_col=False, skipinitialspace=True,
            )  # fmt: skip
        return frame, header

    frame, header = reading(path, read)
    frame.columns = [str(column).strip() for column in frame.columns]
    note = "" if header else "No header found: columns are numbered from 0."
    first = frame.columns[0]
    if first == "Unnamed: 0" and len(frame) and frame[first].tolist() == list(range(len(frame))):
        # What pandas writes as its index: a row number would give sorted files away.
        frame = frame.drop(columns=first)
        note = "Left out: the unnamed first column, which counts the rows."
    return frame, note


def _read_parquet(path: Path) -> Any:
    pandas = require("pandas", "reading tables")
    require("pyarrow", "reading Parquet files")
    frame = reading(path, lambda p: pandas.read_parquet(p, engine="pyarrow"))
    frame.columns = [str(column) for column in frame.columns]
    return frame.reset_index(drop=True)


def _check_columns(frame: Any, path: Path) -> None:
    if not len(frame.columns):
        raise DataError(f"{path} is empty")
    if len(frame) < MIN_ROWS:
        raise DataError(f"{path}: needs at least {MIN_ROWS} rows, got {len(frame)}")
    if len(frame.columns) < 2:
        raise DataError(f"{path} has a single column: nothing to predict the target from")


def _shorten(names: list[str], limit: int = 12) -> str:
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"


def _target_column(frame: Any, path: Path, target: str | None) -> str:
    columns = list(frame.columns)
    if target is None:
        raise DataError(f"{path}: name the column to predict with --target: {_shorten(columns)}")
    if target in columns:
        return target
    close = difflib.get_close_matches(target, columns, n=1)
    hint = f" Did you mean {close[0]}?" if close else ""
    raise DataError(f"{path}: no column {target!r}.{hint} Columns: {_shorten(columns)}")


def _check_values(frame: Any, path: Path, target: str) -> None:
    missing = frame.isna().sum()
    missing = missing[missing > 0]
    if len(missing):
        listed = [
            f"{column} ({count:,} of {len(frame):,} rows)" for column, count in missing.items()
        ]
        raise DataError(
            f"{path}: missing values in {_shorten(listed)}. Fill them or drop those rows first"
        )
    # Booleans count as 0 and 1; dates and text do not.
    text = [
        f"{column} (e.g. {str(frame[column].iloc[0])[:20]!r})"
        for column in frame.columns
        if column != target and frame[column].dtype.kind not in "iufb"
    ]
    if text:
        raise DataError(
            f"{path}: these columns are not numbers: {_shorten(text)}. Encode or drop them first"
        )
    for column in frame.columns:
        if frame[column].dtype.kind == "f" and not np.isfinite(frame[column].to_numpy()).all():
            raise DataError(f"{path}: column {column} has infinite values")


def _as_inputs(array: Array, path: Path, key: str) -> Array:
    """Give an NPZ array as `[N, D]` or, for images, `[N, C, H, W]`, float32."""
    if array.dtype.kind not in "iufb":
        raise DataError(f"{path}: array {key!r} holds {array.dtype}, expected numbers")
    scaled = array.astype(np.float32) / (255 if array.dtype == np.uint8 and array.ndim > 2 else 1)
    if array.ndim == 2:
        return scaled
    if array.ndim == 3:
        return scaled[:, None]
    if array.ndim == 4 and array.shape[1] in (1, 3):
        return scaled
    if array.ndim == 4 and array.shape[3] in (1, 3):
        return np.ascontiguousarray(scaled.transpose(0, 3, 1, 2))
    raise DataError(
        f"{path}: array {key!r} has shape {list(array.shape)}; expected [N, D], [N, H, W], "
        "[N, C, H, W] or [N, H, W, C] with 1 or 3 channels"
    )


def _load_npz(
    path: Path, target: str | None, task: Task | None, test_fraction: float, seed: int
) -> Dataset:
    def read(path: Path) -> dict[str, Array]:
        with np.load(path, allow_pickle=False) as file:
            return {key: file[key] for key in file.files}

    arrays = reading(path, read)
    listed = _shorten([f"{key} {list(array.shape)}" for key, array in arrays.items()])
    published = target is None and {"x_train", "y_train", "x_test", "y_test"} <= set(arrays)
    key = "y_train" if published else target or "y"
    if key not in arrays:
        raise DataError(f"{path}: no target array {key!r} (--target names it). Arrays: {listed}")
    labels = np.concatenate([arrays["y_train"], arrays["y_test"]]) if published else arrays[key]
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim != 1:
        raise DataError(f"{path}: target {key!r} must be [N], got {list(labels.shape)}")
    x_keys = ["x_train", "x_test"] if published else ["x"]
    if not published and "x" not in arrays:
        raise DataError(f"{path}: no input array 'x'. Arrays: {listed}")
    parts = [_as_inputs(arrays[x], path, x) for x in x_keys]
    if sum(map(len, parts)) != len(labels):
        raise DataError(
            f"{path}: {sum(map(len, parts)):,} inputs but {len(labels):,} targets. Arrays: {listed}"
        )
    for values, what in ((labels, key), *zip(parts, x_keys, strict=True)):
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            raise DataError(f"{path}: array {what!r} has missing or infinite values")
    if len(labels) < MIN_ROWS:
        raise DataError(f"{path}: needs at least {MIN_ROWS} rows, got {len(labels)}")
    codes, classes, task = encode_target(labels, path, key, task)
    if not published:
        return split_dataset(
            path.stem, parts[0], codes, task=task, classes=classes,
            note=f"{path.name}, target {key!r}.", test_fraction=test_fraction, seed=seed,
        )  # fmt: skip
    rows = len(parts[0])
    return make_dataset(
        path.stem, (parts[0], codes[:rows]), (parts[1], codes[rows:]), task=task, classes=classes,
        note=f"{path.name}: split as it comes, {rows:,} train and {len(parts[1]):,} test rows.",
    )  # fmt: skip
