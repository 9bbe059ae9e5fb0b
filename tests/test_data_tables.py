"""The user's own CSV, Parquet and NPZ files: read right, or refused with one clear sentence."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

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


@pytest.mark.parametrize("name", ["M.NPZ", "U.Csv", "U.CSV.GZ", "P.PARQUET"])
def test_endings_in_capitals(tmp_path: Path, name: str) -> None:
    pandas = pytest.importorskip("pandas")
    pytest.importorskip("pyarrow")
    frame = pandas.DataFrame({"x": np.linspace(0, 1, 40), "y": [0, 1] * 20})
    path = tmp_path / name
    if name == "M.NPZ":
        with path.open("wb") as stream:
            np.savez(stream, x=frame[["x"]], y=frame["y"])
    elif name == "P.PARQUET":
        frame.to_parquet(path)
    else:
        text = frame.to_csv(index=False).encode()
        path.write_bytes(gzip.compress(text) if name == "U.CSV.GZ" else text)
    table = data.load(path, target="y")
    assert table.name == name[0] and len(table.classes) == 2


# ---- scaling: float32 comes last ---------------------------------------------------------------


@pytest.mark.parametrize(
    "column",
    [
        1_700_000_000 + np.arange(40),
        2**53 - 40 + np.arange(40),
        2**60 + 256 * np.arange(40),
        np.arange(40) * 1e300,
        np.arange(40) * 1e-300,
        1e15 + np.arange(40) / 4,
    ],
    ids=["seconds", "exact", "beyond exact", "huge", "tiny", "fractions"],
)
@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_columns_far_from_one_keep_their_digits(tmp_path: Path, column: np.ndarray) -> None:
    """An offset or a unit changes nothing: these are 0..39 to the model, as feature and target."""
    lines = ["x,y", *(f"{value!r},{value!r}" for value in column.tolist())]
    (tmp_path / "t.csv").write_text("\n".join(lines))
    np.savez(tmp_path / "t.npz", x=column[:, None], y=column)
    for file, target in (("t.csv", "y"), ("t.npz", None)):
        table = data.load(tmp_path / file, target=target, task="regression")
        rows = len(table.train_target)
        for parts in (
            (table.train_inputs[:, 0], table.test_inputs[:, 0]),
            (table.train_target, table.test_target),
        ):
            scaled = torch.cat(parts).numpy()
            ranks = scaled.argsort().argsort()
            expected = (ranks - ranks[:rows].mean()) / ranks[:rows].std()
            # The last bit of float32 at values up to 2.
            np.testing.assert_allclose(scaled, expected, rtol=0, atol=2.4e-7)
        assert table.target_mean == pytest.approx(column[ranks[:rows]].astype(float).mean())
        assert table.target_std == pytest.approx(ranks[:rows].std() * float(np.ptp(column)) / 39)


def test_constant_columns_become_zeros(tmp_path: Path) -> None:
    x = np.column_stack([np.full(40, 0.1), np.full(40, 1.7e9), np.arange(40)])
    np.savez(tmp_path / "t.npz", x=x, y=np.arange(40) % 2)
    table = data.load(tmp_path / "t.npz")
    assert not table.train_inputs[:, :2].any() and not table.test_inputs[:, :2].any()
    assert len(table.train_inputs[:, 2].unique()) == 32


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_columns_that_float32_cannot_hold_are_named(tmp_path: Path) -> None:
    index = np.arange(40)
    wide = np.where(index % 2, 1.7e308, -1.7e308)
    lines = ["x,wide,y", *(f"{i},{w!r},{i % 3}" for i, w in zip(index, wide.tolist(), strict=True))]
    (tmp_path / "t.csv").write_text("\n".join(lines))
    with pytest.raises(DataError, match="columns wide have values too far apart"):
        data.load(tmp_path / "t.csv", target="y")
    with pytest.raises(DataError, match="the target's values are too far apart"):
        data.load(tmp_path / "t.csv", target="wide", task="regression")
    rows = np.column_stack([index, index * 0.5])
    np.savez(tmp_path / "s.npz", x_train=rows, y_train=index % 2, x_test=rows * [1, 1e300],
             y_test=index % 2)  # fmt: skip
    with pytest.raises(DataError, match="columns 1 have values too far apart"):
        data.load(tmp_path / "s.npz")


@pytest.mark.parametrize("first", [2**53, -(2**53) - 39, 2**62])
def test_whole_numbers_that_float64_merges_are_refused(tmp_path: Path, first: int) -> None:
    ids, other = [first + i for i in range(40)], [i % 3 for i in range(40)]
    lines = ["id,x,y", *(f"{a},{i},{b}" for i, (a, b) in enumerate(zip(ids, other, strict=True)))]
    (tmp_path / "t.csv").write_text("\n".join(lines))
    with pytest.raises(DataError, match="column id has whole numbers beyond"):
        data.load(tmp_path / "t.csv", target="y")
    with pytest.raises(DataError, match="target 'id' has whole numbers beyond"):
        data.load(tmp_path / "t.csv", target="id")
    np.savez(tmp_path / "t.npz", x=np.array(ids)[:, None], y=other)
    with pytest.raises(DataError, match="array 'x' has whole numbers beyond"):
        data.load(tmp_path / "t.npz")


# ---- files that are refused --------------------------------------------------------------------


def damaged(raw: bytes) -> bytes:
    """A compressed file whose middle is overwritten."""
    return raw[: len(raw) // 2] + b"\xff" * 40 + raw[len(raw) // 2 + 40 :]


def test_damaged_files_are_named(tmp_path: Path) -> None:
    text = write_csv(tmp_path / "t.csv", rows=400).read_bytes()
    (tmp_path / "z.csv.gz").write_bytes(damaged(gzip.compress(text)))
    (tmp_path / "cut.csv.gz").write_bytes(gzip.compress(text)[:900])
    (tmp_path / "long.csv").write_text("x,y\n" + "1" * 131_073 + ",2\n" + "1,2\n" * 20)
    np.savez_compressed(tmp_path / "d.npz", x=np.random.default_rng(0).normal(size=(400, 2)))
    (tmp_path / "z.npz").write_bytes(damaged((tmp_path / "d.npz").read_bytes()))
    encrypted = bytearray((tmp_path / "d.npz").read_bytes())
    encrypted[encrypted.index(b"PK\x01\x02") + 8] |= 1  # the central directory's flag
    (tmp_path / "e.npz").write_bytes(encrypted)
    for name in ("z.csv.gz", "cut.csv.gz", "long.csv", "z.npz", "e.npz"):
        with pytest.raises(DataError, match=f"cannot read .*{name}"):
            data.load(tmp_path / name, target="y")


def test_a_single_array_is_no_npz(tmp_path: Path) -> None:
    with (tmp_path / "t.npz").open("wb") as stream:
        np.save(stream, np.ones((40, 2)))
    with pytest.raises(DataError, match=r"t\.npz is a single array \(\.npy\)"):
        data.load(tmp_path / "t.npz")


def published(**changes: np.ndarray) -> dict[str, np.ndarray]:
    rows = np.arange(200.0).reshape(100, 2)
    split = {"x_train": rows[:60], "y_train": np.arange(60) % 2, "x_test": rows[60:],
             "y_test": np.arange(40) % 2}  # fmt: skip
    return split | changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"y_train": np.arange(50) % 2, "y_test": np.arange(50) % 2},
         "60 inputs but 50 targets in x_train and y_train"),
        ({"y_test": np.arange(39) % 2}, "40 inputs but 39 targets in x_test and y_test"),
        ({"x_test": np.ones((40, 3))}, r"train part are \[60, 2\], of the test part \[40, 3\]"),
        ({"x_test": np.ones((40, 8, 8))}, r"train part are \[60, 2\], of the test part \[40, 1, 8"),
        ({"y_test": np.ones((40, 2))}, r"target 'y_test' must be \[N\], got \[40, 2\]"),
        ({"y_test": np.array(1)}, r"target 'y_test' must be \[N\], got \[\]"),
        ({"y_test": np.array(["a", "b"] * 20)}, "y_train holds int64, y_test <U1: not alike"),
        ({"y_test": np.full(40, np.nan)}, "'y_test' has missing or infinite"),
        ({"x_train": np.zeros((60, 8, 8), np.uint8), "x_test": np.zeros((40, 8, 8))},
         "x_train holds uint8, x_test float64: not alike"),
        ({"x_test": np.ones((0, 2)), "y_test": np.ones(0)}, "the test part is empty"),
        ({"x_test": np.ones((40, 0))}, r"'x_test' has shape \[40, 0\]"),
    ],
)  # fmt: skip
def test_published_parts_are_checked_one_by_one(
    tmp_path: Path, changes: dict[str, np.ndarray], message: str
) -> None:
    np.savez(tmp_path / "t.npz", **published(**changes))  # type: ignore[arg-type]
    with pytest.raises(DataError, match=message):
        data.load(tmp_path / "t.npz")


def test_published_split_is_taken_as_it_is(tmp_path: Path) -> None:
    """Also with one target part `[N]` and the other `[M, 1]`, and other widths of integers."""
    y_test = (np.arange(40, dtype=np.int8) % 3 % 2)[:, None]
    np.savez(tmp_path / "t.npz", **published(y_test=y_test))  # type: ignore[arg-type]
    table = data.load(tmp_path / "t.npz")
    assert table.train_target.tolist() == [i % 2 for i in range(60)]
    assert table.test_target.tolist() == y_test[:, 0].tolist()


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
