"""`load`: one door for named sets and files."""

from __future__ import annotations

import difflib
from pathlib import Path

from fastsel.data.dataset import DataError, Dataset, Task
from fastsel.data.named import RECIPES, Split, load_named
from fastsel.data.tables import SUFFIXES, load_table, table_suffix

NAMES = ("digits", *RECIPES)


def load(
    name_or_path: str | Path,
    *,
    target: str | None = None,
    task: Task | None = None,
    data_dir: str | Path | None = None,
    seed: int = 0,
    test_fraction: float = 0.2,
) -> Dataset:
    """Load a named set or a CSV, Parquet or NPZ file, split and standardised.

    Named sets are looked up in `data_dir` (else `$FASTSEL_DATA_DIR`), then in the user's cache,
    and downloaded from their public homes only if neither has them; digits ships with
    scikit-learn. Files need `target`, the column (or array) to predict: text, booleans, or whole
    numbers with at most 20 distinct values mean classification, anything else regression;
    `task` overrides. A published split (mnist, fashion-mnist, cifar10, or an .npz with `x_train`,
    `y_train`, `x_test` and `y_test`) is taken as it is; in a split made here rows with equal
    features never end up on both sides.

    Args:
        name_or_path: One of `NAMES`, or a path that ends in .csv, .csv.gz, .parquet or .npz.
        target: Column name of a file; in a CSV without header its column number, from 0.
        task: "classification" or "regression"; by default decided from the target.
        data_dir: Folder searched first.
        seed: Seed of the split, where the set has no published one.
        test_fraction: Share of the distinct rows held out, between 0 and 1.

    Returns:
        The data set.

    Raises:
        DataError: Unknown name, missing file or column, text columns, missing values, too few
            rows, a single class, no connection. The message says what to do.

    Example:
        >>> from fastsel import data
        >>> data.load("digits").num_outputs
        10
    """
    if not 0 < test_fraction < 1:
        raise DataError(f"load: test_fraction must be between 0 and 1, got {test_fraction}")
    short = short_name(name_or_path)
    if short in NAMES and not table_suffix(str(name_or_path)):
        if target is not None:
            raise DataError(f"{short} has its own target: leave --target away (it is for files)")
        data = load_named(short, data_dir, Split(test_fraction, seed))
        if task is not None and task != data.task:
            raise DataError(f"{short} is a {data.task} set, not {task}")
        return data
    path = Path(name_or_path).expanduser()
    return load_table(path, target=target, task=task, test_fraction=test_fraction, seed=seed)


def short_name(name_or_path: str | Path) -> str:
    """The name a data set goes by: that of a named set, or a file's name without its ending.

    Raises:
        DataError: Neither a known name nor an existing file of a known kind.
    """
    name = str(name_or_path)
    if suffix := table_suffix(name):
        path = Path(name).expanduser()
        if not path.is_file():
            raise DataError(f"no such file: {path}")
        return path.name[: -len(suffix)]
    key = name.lower().replace("_", "-")
    if key in NAMES:
        return key
    close = difflib.get_close_matches(key, NAMES, n=1)
    hint = f" Did you mean {close[0]}?" if close else ""
    raise DataError(
        f"unknown data set {name!r}.{hint} Known: {', '.join(NAMES)}; "
        f"or give a file that ends in {', '.join(SUFFIXES)}"
    )
