"""Files of arrays that are refused when damaged: a header with digests, and the arrays."""

from __future__ import annotations

import hashlib
import json
import os
import struct
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

MAGIC = b"fastselT"
VERSION = 1
ALIGNMENT = 64  # of arrays in the file
DTYPES = {"int32": torch.int32, "int64": torch.int64, "float32": torch.float32}
_PREFIX = struct.Struct("<8sIQ16s")  # magic, version, bytes of the header, the header's digest


def save(path: Path, arrays: dict[str, Tensor], header: dict[str, str]) -> Path:
    """Writes arrays and a header to a file that appears only when it is complete."""
    host = {name: array.detach().cpu().contiguous() for name, array in arrays.items()}
    entries: list[dict[str, Any]] = []
    offset = 0
    for name, array in host.items():
        data = array.numpy()
        entries.append(
            {
                "name": name,
                "dtype": str(array.dtype).removeprefix("torch."),
                "shape": list(array.shape),
                "offset": offset,
                "digest": _digest(data).hex(),
            }
        )
        offset += _aligned(data.nbytes)
    text = json.dumps({**header, "arrays": entries}).encode()
    # Not by tempfile, whose files are for their owner alone.
    temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with temporary.open("wb") as file:
            file.write(_PREFIX.pack(MAGIC, VERSION, len(text), _digest(text)))
            file.write(text)
            start = _aligned(_PREFIX.size + len(text))
            for entry, array in zip(entries, host.values(), strict=True):
                file.seek(start + entry["offset"])
                array.numpy().tofile(file)
            file.truncate(start + offset)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return path


def load(path: Path, *, mmap: bool) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reads what `save` wrote.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is not such a file, or is damaged or cut short.
    """

    def refuse(why: str) -> ValueError:
        return ValueError(f"NeighborTable: {path} {why}: build the table anew")

    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(_PREFIX.size)
        if len(prefix) < _PREFIX.size or not prefix.startswith(MAGIC):
            raise refuse("is not a table of fastsel")
        _, version, length, digest = _PREFIX.unpack(prefix)
        if version != VERSION:
            raise refuse(f"has version {version}, and version {VERSION} can be read")
        text = file.read(min(length, size))
    if len(text) != length or _digest(text) != digest:
        raise refuse("is damaged or cut short in its header")
    header: dict[str, Any] = json.loads(text)
    start = _aligned(_PREFIX.size + length)
    arrays: dict[str, Tensor] = {}
    for entry in header.pop("arrays"):
        dtype = np.dtype(entry["dtype"])
        count = int(np.prod(entry["shape"], dtype=np.int64))
        first = start + entry["offset"]
        if first + count * dtype.itemsize > size:
            raise refuse(f"is cut short: it ends before its {entry['name']} do")
        if count == 0:
            arrays[entry["name"]] = torch.empty(entry["shape"], dtype=DTYPES[entry["dtype"]])
            continue
        data: Any
        if mmap:
            data = np.memmap(path, dtype, mode="r", offset=first, shape=(count,))
        else:
            data = np.fromfile(path, dtype, count, offset=first)
        if _digest(data).hex() != entry["digest"]:
            raise refuse(f"is damaged in its {entry['name']}")
        with warnings.catch_warnings():  # a mapped array may not be written to, nor does anybody
            warnings.filterwarnings("ignore", "The given NumPy array is not writable")
            arrays[entry["name"]] = torch.from_numpy(data).view(entry["shape"])
    return arrays, header


def _digest(data: Any) -> bytes:  # of bytes or of a contiguous array
    return hashlib.blake2b(data, digest_size=16).digest()


def _aligned(size: int) -> int:
    return (size + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT
