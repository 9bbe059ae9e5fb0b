"""Files in the original formats of data sets, written by the tests that read them."""

from __future__ import annotations

import io
import struct
import tarfile
from pathlib import Path

import numpy as np


def idx_bytes(array: np.ndarray) -> bytes:
    codes = {"uint8": 8, "int32": 12, "float32": 13}
    header = bytes([0, 0, codes[array.dtype.name], array.ndim])
    big_endian = array.astype(array.dtype.newbyteorder(">"))
    return header + struct.pack(f">{array.ndim}I", *array.shape) + big_endian.tobytes()


def write_cifar(path: Path, rng: np.random.Generator, rows: int = 8) -> dict[str, np.ndarray]:
    records = {}
    with tarfile.open(path, "w:gz") as archive:
        for name in [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]:
            record = rng.integers(0, 256, (rows, 3073), dtype=np.uint8)
            record[:, 0] = np.arange(rows) % 10
            info = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            info.size = record.nbytes
            archive.addfile(info, io.BytesIO(record.tobytes()))
            records[name] = record
    return records
