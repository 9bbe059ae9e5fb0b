"""Fails unless a CUDA library holds machine code for sm_80, sm_90 and sm_100, and PTX for the last.

Reads the fat binaries in the library itself, since a toolkit may come without cuobjdump: each
begins with a magic number and a header, and holds entries of a kind (1 PTX, 2 machine code) for an
architecture.
"""

from __future__ import annotations

import struct
import sys
from collections import Counter
from pathlib import Path

MAGIC = struct.pack("<I", 0xBA55ED50)
KINDS = {1: "PTX", 2: "machine code"}
EXPECTED = {("machine code", 80), ("machine code", 90), ("machine code", 100), ("PTX", 100)}


def entries(image: bytes) -> Counter[tuple[str, int]]:
    """How many entries there are of each kind and architecture."""
    found: Counter[tuple[str, int]] = Counter()
    start = image.find(MAGIC)
    while start >= 0:
        header_size, size = struct.unpack_from("<HQ", image, start + 6)
        at, end = start + header_size, start + header_size + size
        while at < end:
            kind, entry_header, entry_size = struct.unpack_from("<H2xIQ", image, at)
            (architecture,) = struct.unpack_from("<I", image, at + 28)
            found[KINDS.get(kind, str(kind)), architecture] += 1
            at += entry_header + entry_size
        start = image.find(MAGIC, end)
    return found


if __name__ == "__main__":
    found = entries(Path(sys.argv[1]).read_bytes())
    print(
        *(f"{kind} sm_{arch}: {count}" for (kind, arch), count in sorted(found.items())), sep=", "
    )
    if set(found) != EXPECTED or len(set(found.values())) != 1:
        sys.exit(f"expected every kernel file for {sorted(EXPECTED)}")
