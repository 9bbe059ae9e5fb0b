"""Parsers of the files data come in: IDX, CIFAR records, plain number tables, NPZ archives."""

from __future__ import annotations

import csv
import gzip
import io
import itertools
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, TypeVar, cast

import numpy as np

from fastsel.data.dataset import Array, DataError, shorten
from fastsel.data.optional import require

Parsed = TypeVar("Parsed")

# The third byte of an IDX file's magic number; all values are big-endian.
_IDX_DTYPES = {8: ">u1", 9: ">i1", 11: ">i2", 12: ">i4", 13: ">f4", 14: ">f8"}
_CIFAR_SHAPE = (3, 32, 32)

# What parsers raise on files that are damaged or something else than their name says; RuntimeError
# is `zipfile`'s word for encrypted members and (NotImplementedError) unknown compressions.
DAMAGE = (
    OSError, EOFError, KeyError, ValueError, TypeError, RuntimeError, csv.Error, struct.error,
    tarfile.TarError, zipfile.BadZipFile, zlib.error,
)  # fmt: skip


def reading(path: Path, parse: Callable[[Path], Parsed]) -> Parsed:
    """Run a parser; what a damaged file makes it raise becomes a `DataError` naming the file."""
    try:
        return parse(path)
    except DataError:
        raise
    except DAMAGE as error:
        raise DataError(f"cannot read {path}: {error}") from None


def read_idx(path: Path) -> Array:
    """Read an IDX file, plain or gzipped: LeCun's format of the MNIST files.

    Raises:
        DataError: Not an IDX file, or fewer or more values than its header announces.
    """
    raw = path.read_bytes()
    if raw[:2] == b"\x1f\x8b":
        raw = gzip.decompress(raw)
    if len(raw) < 4 or raw[:2] != b"\0\0" or raw[2] not in _IDX_DTYPES:
        raise DataError(f"{path} is not an IDX file (it starts with {raw[:4].hex() or 'nothing'})")
    dimensions = raw[3]
    shape = struct.unpack_from(f">{dimensions}I", raw, 4)
    body = raw[4 + 4 * dimensions :]
    dtype = np.dtype(_IDX_DTYPES[raw[2]])
    wanted = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    if len(body) != wanted:
        raise DataError(f"{path}: header announces {wanted:,} bytes, the file has {len(body):,}")
    return np.frombuffer(body, dtype).reshape(shape)


def read_cifar10(path: Path) -> dict[str, Array]:
    """Read CIFAR-10's binary archive (`cifar-10-binary.tar.gz`).

    The binary version rather than the pickled one: unpickling a downloaded file would run
    whatever code is in it. Each record is a label byte and 3072 channel-first pixel bytes.

    Returns:
        `x_train` uint8 `[N, 3, 32, 32]`, `y_train` `[N]`, `x_test`, `y_test`.

    Raises:
        DataError: A batch is missing or no whole number of records.
    """
    batches: dict[str, bytes] = {}
    with tarfile.open(path, "r:*") as archive:
        for member in archive:
            source = archive.extractfile(member) if member.isfile() else None
            if source and member.name.endswith(".bin"):
                batches[Path(member.name).name] = source.read()
    wanted = {"train": [f"data_batch_{i}.bin" for i in range(1, 6)], "test": ["test_batch.bin"]}
    parts: dict[str, Array] = {}
    for part, names in wanted.items():
        absent = [name for name in names if name not in batches]
        if absent:
            raise DataError(f"{path}: missing {', '.join(absent)}")
        data = np.frombuffer(b"".join(batches[name] for name in names), np.uint8)
        record = 1 + int(np.prod(_CIFAR_SHAPE))
        if data.size % record or not data.size:
            raise DataError(f"{path}: {data.size:,} bytes are no whole number of {record} records")
        records = data.reshape(-1, record)
        parts[f"x_{part}"] = records[:, 1:].reshape(-1, *_CIFAR_SHAPE)
        parts[f"y_{part}"] = records[:, 0]
    return parts


def read_npz(path: Path, *wanted: str) -> dict[str, Array]:
    """Read the arrays of an NPZ archive; pickled ones are refused, they could run code.

    Args:
        path: The archive.
        wanted: Arrays it must hold.

    Returns:
        All its arrays by name.

    Raises:
        DataError: Not an NPZ archive, a damaged one, or one without the wanted arrays.
    """

    def read(path: Path) -> dict[str, Array]:
        loaded = np.load(path, allow_pickle=False)
        if not isinstance(loaded, np.lib.npyio.NpzFile):
            raise DataError(f"{path} is a single array (.npy), not an .npz archive")
        with loaded as file:
            return {key: file[key] for key in file.files}

    arrays = reading(path, read)
    require_arrays(path, arrays, *wanted)
    return arrays


def require_arrays(path: Path, arrays: dict[str, Array], *wanted: str) -> None:
    """Refuse an archive that lacks some of its arrays.

    Raises:
        DataError: With the arrays that are absent, and those that are there.
    """
    absent = [key for key in wanted if key not in arrays]
    if absent:
        raise DataError(
            f"{path}: no array {', '.join(absent)} in it, only {shorten([*arrays]) or 'nothing'}"
        )


def open_member(path: Path, member: str) -> IO[bytes]:
    """Open a file as bytes: plain, gzipped, or the named member of a ZIP (itself maybe gzipped).

    Raises:
        DataError: The ZIP has no such member.
    """
    stream: IO[bytes]
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            found = [n for n in archive.namelist() if Path(n).name in (member, f"{member}.gz")]
            if not found:
                raise DataError(f"{path}: no {member} in it, only {', '.join(archive.namelist())}")
            stream = io.BytesIO(archive.read(found[0]))
    else:
        stream = path.open("rb")
    start = stream.read(2)
    stream.seek(0)
    if start == b"\x1f\x8b":
        return cast(IO[bytes], gzip.open(stream, "rb"))
    return stream


def count_rows(path: Path, member: str, limit: int) -> int:
    """Count the lines that are not blank, up to a limit, of what `open_member` opens."""
    with open_member(path, member) as stream:
        return sum(1 for _ in itertools.islice(filter(bytes.strip, stream), limit))


def read_numbers(
    path: Path,
    member: str,
    *,
    columns: int,
    separator: str = ",",
    dtype: Any = np.float32,
    max_rows: int | None = None,
) -> Array:
    r"""Read a header-less table of numbers, as the UCI archive serves them.

    Args:
        path: Plain, gzipped or ZIP file.
        member: The file's name inside a ZIP.
        columns: Columns the table must have.
        separator: "," or a regular expression such as r"\s+".
        dtype: Type of the result.
        max_rows: Stop after that many rows.

    Returns:
        `[rows, columns]`.

    Raises:
        DataError: Another number of columns, or cells that are no numbers.
    """
    pandas = require("pandas", "reading tables")
    with open_member(path, member) as stream:
        frame = pandas.read_csv(stream, header=None, sep=separator, dtype=dtype, nrows=max_rows)
    if frame.shape[1] != columns:
        raise DataError(f"{path}: expected {columns} columns, got {frame.shape[1]}")
    table: Array = frame.to_numpy()
    if np.isnan(table).any():
        raise DataError(f"{path}: it has rows with fewer than {columns} numbers")
    return table
