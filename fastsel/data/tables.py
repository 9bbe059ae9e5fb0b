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
    check_lengths,
    make_dataset,
    shorten,
    split_dataset,
)
from fastsel.data.formats import read_npz, reading
from fastsel.data.optional import require

SUFFIXES = (".csv", ".csv.gz", ".parquet", ".npz")
# A whole-number target with more distinct values than this is taken for a quantity.
MAX_INTEGER_CLASSES = 20
_HEADER_SAMPLE = 100
# float64 holds every whole number up to this one.
_MAX_EXACT = 2**53
_MERGED = "has whole numbers beyond 2**53 that float64 cannot tell apart: subtract a constant first"


def table_suffix(name: str) -> str:
    """The one of `SUFFIXES` that a file name ends in, in any case of letters; "" if in none."""
    return next((suffix for suffix in SUFFIXES if name.lower().endswith(suffix)), "")


def load_table(
    path: Path, *, target: str | None, task: Task | None, test_fraction: float, seed: int
) -> Dataset:
    """Load a CSV, Parquet or NPZ file; see `fastsel.data.load`.

    Raises:
        DataError: With the columns, rows or arrays that are at fault.
    """
    suffix = table_suffix(path.name)
    if suffix == ".npz":
        return _load_npz(path, target, task, test_fraction, seed)
    frame, note = (_read_parquet(path), "") if suffix == ".parquet" else _read_csv(path)
    _check_columns(frame, path)
    column = _target_column(frame, path, target)
    _check_values(frame, path, column)
    values = frame.pop(column)
    labels, classes, task = encode_target(values.to_numpy(), path, column, task)
    return split_dataset(
        path.name[: -len(suffix)], frame.to_numpy(np.float64), labels, task=task,
        features=tuple(map(str, frame.columns)),
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
        DataError: Text asked for as regression, a text column that is an identifier, or whole
            numbers that differ but are equal as float64.
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
        if _merges(values):
            raise DataError(f"{source}: target {column!r} {_MERGED}")
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
    if table_suffix(path.name) == ".csv.gz":
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


def _target_column(frame: Any, path: Path, target: str | None) -> str:
    columns = list(frame.columns)
    if target is None:
        raise DataError(f"{path}: name the column to predict with --target: {shorten(columns)}")
    if target in columns:
        return target
    close = difflib.get_close_matches(target, columns, n=1)
    hint = f" Did you mean {close[0]}?" if close else ""
    raise DataError(f"{path}: no column {target!r}.{hint} Columns: {shorten(columns)}")


def _check_values(frame: Any, path: Path, target: str) -> None:
    missing = frame.isna().sum()
    missing = missing[missing > 0]
    if len(missing):
        listed = [
            f"{column} ({count:,} of {len(frame):,} rows)" for column, count in missing.items()
        ]
        raise DataError(
            f"{path}: missing values in {shorten(listed)}. Fill them or drop those rows first"
        )
    # Booleans count as 0 and 1; dates and text do not.
    text = [
        f"{column} (e.g. {str(frame[column].iloc[0])[:20]!r})"
        for column in frame.columns
        if column != target and frame[column].dtype.kind not in "iufb"
    ]
    if text:
        raise DataError(
            f"{path}: these columns are not numbers: {shorten(text)}. Encode or drop them first"
        )
    for column in frame.columns:
        if frame[column].dtype.kind == "f" and not np.isfinite(frame[column].to_numpy()).all():
            raise DataError(f"{path}: column {column} has infinite values")
        if column != target and _merges(frame[column].to_numpy()):  # class numbers may be any
            raise DataError(f"{path}: column {column} {_MERGED}")


def _merges(values: Array) -> bool:
    """Whether whole numbers that differ would be equal as float64."""
    if values.dtype.kind not in "iu" or not values.size:
        return False
    if int(values.min()) >= -_MAX_EXACT and int(values.max()) <= _MAX_EXACT:
        return False
    distinct = np.unique(values)
    return len(np.unique(distinct.astype(np.float64))) < len(distinct)


def _as_inputs(array: Array, path: Path, key: str) -> Array:
    """Give an NPZ array as `[N, D]` or, for images, `[N, C, H, W]`: float32 if that is exact."""
    if array.dtype.kind not in "iufb":
        raise DataError(f"{path}: array {key!r} holds {array.dtype}, expected numbers")
    if _merges(array):
        raise DataError(f"{path}: array {key!r} {_MERGED}")
    exact = np.float32 if np.can_cast(array.dtype, np.float32) else np.float64
    scaled = array.astype(exact) / (255 if array.dtype == np.uint8 and array.ndim > 2 else 1)
    if not np.isfinite(scaled).all():
        raise DataError(f"{path}: array {key!r} has missing or infinite values")
    if array.ndim == 2 and array.shape[1]:
        return scaled
    if array.ndim == 3 and array[:1].size:
        return scaled[:, None]
    if array.ndim == 4 and array.shape[1] in (1, 3):
        return scaled
    if array.ndim == 4 and array.shape[3] in (1, 3):
        return np.ascontiguousarray(scaled.transpose(0, 3, 1, 2))
    raise DataError(
        f"{path}: array {key!r} has shape {list(array.shape)}; expected [N, D], [N, H, W], "
        "[N, C, H, W] or [N, H, W, C] with 1 or 3 channels"
    )


def _as_target(array: Array, path: Path, key: str) -> Array:
    """Give an NPZ array `[N]` or `[N, 1]` as `[N]`."""
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim != 1:
        raise DataError(f"{path}: target {key!r} must be [N], got {list(array.shape)}")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise DataError(f"{path}: array {key!r} has missing or infinite values")
    return array


def _load_npz(
    path: Path, target: str | None, task: Task | None, test_fraction: float, seed: int
) -> Dataset:
    arrays = read_npz(path)
    listed = shorten([f"{key} {list(array.shape)}" for key, array in arrays.items()])
    published = target is None and {"x_train", "y_train", "x_test", "y_test"} <= set(arrays)
    pairs = [("x", target or "y")]
    if published:
        pairs = [("x_train", "y_train"), ("x_test", "y_test")]
    key = pairs[0][1]
    if key not in arrays:
        raise DataError(f"{path}: no target array {key!r} (--target names it). Arrays: {listed}")
    if pairs[0][0] not in arrays:
        raise DataError(f"{path}: no input array 'x'. Arrays: {listed}")
    parts = [(_as_inputs(arrays[x], path, x), _as_target(arrays[y], path, y)) for x, y in pairs]
    for (inputs, labels), names in zip(parts, pairs, strict=True):
        check_lengths(path, inputs, labels, f" in {' and '.join(names)}. Arrays: {listed}")
    if published:
        _check_alike(path, arrays)
    labels = np.concatenate([part[1] for part in parts])
    if len(labels) < MIN_ROWS:
        raise DataError(f"{path}: needs at least {MIN_ROWS} rows, got {len(labels)}")
    codes, classes, task = encode_target(labels, path, key, task)
    name = path.name[: -len(".npz")]
    train = parts[0][0]
    if not published:
        return split_dataset(
            name, train, codes, task=task, classes=classes,
            note=f"{path.name}, target {key!r}.", test_fraction=test_fraction, seed=seed,
        )  # fmt: skip
    rows, test = len(train), parts[1][0]
    return make_dataset(
        name, (train, codes[:rows]), (test, codes[rows:]), task=task, classes=classes,
        note=f"{path.name}: split as it comes, {rows:,} train and {len(test):,} test rows.",
    )  # fmt: skip


def _check_alike(path: Path, arrays: dict[str, Array]) -> None:
    """Refuse a published split of which only one part holds images of bytes, or only one text."""
    # Images of bytes count in 255ths; text and numbers make no common classes.
    kinds = [("y", np.number)] + ([("x", np.uint8)] if arrays["x_train"].ndim > 2 else [])
    for what, kind in kinds:
        one, other = arrays[f"{what}_train"].dtype, arrays[f"{what}_test"].dtype
        if np.issubdtype(one, kind) != np.issubdtype(other, kind):
            raise DataError(f"{path}: {what}_train holds {one}, {what}_test {other}: not alike")
