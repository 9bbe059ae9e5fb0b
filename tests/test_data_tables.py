"""The user's own CSV, Parquet and NPZ files: read right, or refused with one clear sentence."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastsel import data
from fastsel.data import DataError
from fastsel.data.tables import detect_header


def write_csv(path: Path, rows: int = 40, header: str = "a,b,label", extra: str = "") -> Path:
    rng = np.random.default_rng(0)
    lines = [header] if header else []
    for i in range(rows):
        lines.append(f"{rng.normal():.4f},{rng.normal():.4f},{i % 3}")
    path.write_text("\n".join(lines) + "\n" + extra)
    return path


def test_csv_classification(tmp_path: Path) -> None:
    table = data.load(write_csv(tmp_path / "t.csv"), target="label")
    assert table.name == "t" and table.task == "classification"
    assert table.features == ("a", "b") and table.classes == ("0", "1", "2")


def test_csv_gz_without_header_and_with_semicolons(tmp_path: Path) -> None:
    text = write_csv(tmp_path / "t.csv", header="").read_text().replace(",", ";")
    (tmp_path / "u.csv.gz").write_bytes(gzip.compress(text.encode()))
    table = data.load(tmp_path / "u.csv.gz", target="2")
    assert table.name == "u" and table.features == ("0", "1") and "No header" in table.note


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([["a", "b"], ["1", "2"]], True),
        ([["id", "2020"], ["1", "2"]], True),
        ([["5.1", "setosa"], ["4.9", "setosa"]], False),
        ([["1", "2"], ["3", "4"]], False),
        ([["", "a"], ["0", "1"]], True),
        ([["", "1"], ["2", "3"]], False),
    ],
)
def test_detect_header(rows: list[list[str]], expected: bool) -> None:
    assert detect_header(rows) is expected


@pytest.mark.parametrize(
    ("values", "task", "classes"),
    [
        (["yes", "no"] * 20, "classification", ("no", "yes")),
        (list(range(40)), "regression", ()),
        ([0.5, 1.5] * 20, "regression", ()),
        ([1.0, 2.0] * 20, "classification", ("1", "2")),
        ([True, False] * 20, "classification", ("False", "True")),
    ],
)
def test_task_is_seen_from_the_target(
    tmp_path: Path, values: list[object], task: str, classes: tuple[str, ...]
) -> None:
    lines = ["x,y", *(f"{i * 0.5},{value}" for i, value in enumerate(values))]
    (tmp_path / "t.csv").write_text("\n".join(lines))
    table = data.load(tmp_path / "t.csv", target="y")
    assert table.task == task and table.classes == classes


def test_task_overrides(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "t.csv")
    assert data.load(path, target="label", task="regression").task == "regression"


def test_an_unnamed_row_index_is_left_out(tmp_path: Path) -> None:
    lines = [",x,y", *(f"{i},{i * 0.5},{i % 2}" for i in range(40))]
    (tmp_path / "t.csv").write_text("\n".join(lines))
    table = data.load(tmp_path / "t.csv", target="y")
    assert table.features == ("x",) and "counts the rows" in table.note


def test_parquet(tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(
        {"x": np.linspace(0, 1, 40), "flag": [True, False] * 20, "y": [0, 1] * 20}
    )
    frame.to_parquet(tmp_path / "t.parquet")
    table = data.load(tmp_path / "t.parquet", target="y")
    assert table.features == ("x", "flag") and table.task == "classification"


def test_npz_layouts(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (40, 8, 8, 3), dtype=np.uint8), np.arange(40) % 4
    np.savez(tmp_path / "i.npz", x=images, y=labels)
    assert data.load(tmp_path / "i.npz").train_inputs.shape[1:] == (3, 8, 8)
    np.savez(tmp_path / "t.npz", x=rng.normal(size=(40, 5)), price=rng.normal(size=40))
    assert data.load(tmp_path / "t.npz", target="price").task == "regression"
    np.savez(tmp_path / "s.npz", x_train=images, y_train=labels, x_test=images[:10] // 2,
             y_test=labels[:10])  # fmt: skip
    assert len(data.load(tmp_path / "s.npz").test_target) == 10


@pytest.mark.parametrize(
    ("text", "target", "message"),
    [
        ("", "y", "is empty"),
        ("x,y\n", "y", "needs at least 10 rows, got 0"),
        ("x,y\n1,2\n", "y", "needs at least 10 rows, got 1"),
        ("x,y\n" + "1,2\n" * 20, "y", "single value|single class"),
        ("x,y\n" + "1,2\n3,4\n" * 20, "z", "no column 'z'.*Columns: x, y"),
        ("price,y\n" + "1,2\n3,4\n" * 20, "pric", "Did you mean price"),
        ("x,y\n" + "1,2\n3,4\n" * 20, None, "--target: x, y"),
        ("x,y\n" + "1,2\n,4\n" * 20, "y", r"missing values in x \(20 of 40 rows\)"),
        ("x,t,y\n" + "1,red,2\n3,blue,4\n" * 20, "y", r"not numbers: t \(e\.g\. 'red'\)"),
        ("x,x,y\n" + "1,2,3\n" * 20, "y", "columns named twice: x"),
        ("x,y\n" + "inf,2\n3,4\n" * 20, "y", "column x has infinite values"),
        ("y\n" + "1\n2\n" * 20, "y", "single column"),
        ("x,y\n" + "".join(f"{i},name{i}\n" for i in range(40)), "y", "too many for classes"),
        ("x,y\n" + "1,a\n2,b\n" * 20, "y", "only 2 of 40 rows are distinct"),
    ],
)  # fmt: skip
def test_bad_csv(tmp_path: Path, text: str, target: str | None, message: str) -> None:
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(DataError, match=message):
        data.load(tmp_path / "t.csv", target=target)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": np.ones((40, 2))}, "no target array 'y'.*Arrays: x"),
        ({"y": np.arange(40)}, "no input array 'x'"),
        ({"x": np.ones((40, 2)), "y": np.arange(39)}, "40 inputs but 39 targets"),
        ({"x": np.ones((40, 2, 2, 2)), "y": np.arange(40)}, r"shape \[40, 2, 2, 2\]"),
        ({"x": np.full((40, 2), np.nan), "y": np.arange(40)}, "missing or infinite"),
        ({"x": np.array(["a"] * 40), "y": np.arange(40)}, "expected numbers"),
        ({"x": np.array([None] * 40), "y": np.arange(40)}, "allow_pickle"),
    ],
)
def test_bad_npz(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    np.savez(tmp_path / "t.npz", **arrays)
    with pytest.raises(DataError, match=message):
        data.load(tmp_path / "t.npz")
