"""The parsers of the original formats: IDX, CIFAR-10 archives and tables of numbers."""

from __future__ import annotations

import gzip
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from data_samples import idx_bytes, write_cifar

from fastsel.data import DataError
from fastsel.data.formats import read_cifar10, read_idx, read_numbers


@pytest.mark.parametrize("dtype", ["uint8", "int32", "float32"])
@pytest.mark.parametrize("compress", [False, True])
def test_read_idx(tmp_path: Path, dtype: str, compress: bool) -> None:
    array = np.arange(24).reshape(2, 3, 4).astype(dtype)
    raw = idx_bytes(array)
    path = tmp_path / "file"
    path.write_bytes(gzip.compress(raw) if compress else raw)
    assert (read_idx(path) == array).all()


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "not an IDX file"),
        (b"<html>", "not an IDX file"),
        (idx_bytes(np.zeros((2, 3), np.uint8))[:-1], "announces 6 bytes, the file has 5"),
        (idx_bytes(np.zeros((2, 3), np.uint8)) + b"x", "announces 6 bytes, the file has 7"),
    ],
)
def test_read_idx_refuses_damage(tmp_path: Path, raw: bytes, message: str) -> None:
    path = tmp_path / "file"
    path.write_bytes(raw)
    with pytest.raises(DataError, match=message):
        read_idx(path)


def test_read_cifar10(tmp_path: Path) -> None:
    records = write_cifar(tmp_path / "c.tar.gz", np.random.default_rng(0))
    arrays = read_cifar10(tmp_path / "c.tar.gz")
    assert arrays["x_train"].shape == (40, 3, 32, 32)
    assert (arrays["y_test"] == np.arange(8)).all()
    third = records["data_batch_2.bin"][0]
    assert (arrays["x_train"][8] == third[1:].reshape(3, 32, 32)).all()


def test_read_cifar10_names_a_missing_batch(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "c.tar.gz", "w:gz"):
        pass
    with pytest.raises(DataError, match=r"missing data_batch_1\.bin"):
        read_cifar10(tmp_path / "c.tar.gz")


def test_read_numbers_from_zip_gzip_and_text(tmp_path: Path) -> None:
    text = b"1\t2\t3\n4\t5\t6\n"
    (tmp_path / "plain").write_bytes(text)
    (tmp_path / "gz").write_bytes(gzip.compress(text))
    with zipfile.ZipFile(tmp_path / "zip", "w") as archive:
        archive.writestr("folder/table.txt.gz", gzip.compress(text))
    for name in ("plain", "gz", "zip"):
        table = read_numbers(tmp_path / name, "table.txt", columns=3, separator=r"\s+")
        assert table.tolist() == [[1, 2, 3], [4, 5, 6]]
    with pytest.raises(DataError, match="expected 4 columns, got 3"):
        read_numbers(tmp_path / "plain", "table.txt", columns=4, separator=r"\s+")
    with pytest.raises(DataError, match=r"no other\.txt in it"):
        read_numbers(tmp_path / "zip", "other.txt", columns=3)


def test_read_numbers_of_a_gzip_that_was_cut(tmp_path: Path) -> None:
    """The first part of a large download serves as long as it holds the rows asked for."""
    values = np.random.default_rng(0).normal(size=(20_000, 4)).round(6)
    raw = gzip.compress("\n".join(",".join(map(str, row)) for row in values).encode())
    (tmp_path / "cut.csv.gz").write_bytes(raw[: len(raw) // 2])
    table = read_numbers(tmp_path / "cut.csv.gz", "", columns=4, max_rows=5_000)
    assert np.array_equal(table, values[:5_000].astype(np.float32))
