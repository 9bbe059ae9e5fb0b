"""Fetching a public file once: to a temporary file, checked, then renamed into place."""

from __future__ import annotations

import hashlib
import http.client
import math
import os
import sys
import tempfile
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from fastsel.data.dataset import DataError
from fastsel.data.formats import DAMAGE, count_rows

DATA_DIR_VARIABLE = "FASTSEL_DATA_DIR"
_TIMEOUT_SECONDS = 30.0
_BLOCK = 1 << 20
# DAMAGE contains OSError, and so urllib's errors.
_FAILURES = (http.client.HTTPException, *DAMAGE)


@dataclass(frozen=True)
class Remote:
    """A file at its public home.

    Attributes:
        url: Where it lives.
        file: Where it goes, relative to the data folder, for example "mnist/train.gz".
        checksum: "md5:..." or "sha256:..." as its authors or users published it; empty where
            no published one is known.
        first_bytes: Read only this many bytes of a very large file; 0 reads all of it.
        rows: Rows the table in it must have at least; 0 where a checksum guards the file.
        member: The table's name, if the file is a ZIP.
    """

    url: str
    file: str
    checksum: str = ""
    first_bytes: int = 0
    rows: int = 0
    member: str = ""


def cache_dir() -> Path:
    """The user's cache: `$XDG_CACHE_HOME/fastsel`, else `~/.cache/fastsel`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastsel"


def folders(data_dir: str | Path | None) -> list[Path]:
    """Folders searched for data files, in order: data_dir or $FASTSEL_DATA_DIR, then the cache.

    Raises:
        DataError: The folder that was named does not exist.
    """
    named = data_dir or os.environ.get(DATA_DIR_VARIABLE)
    if not named:
        return [cache_dir()]
    folder = Path(named).expanduser()
    if not folder.is_dir():
        origin = "data_dir" if data_dir else DATA_DIR_VARIABLE
        raise DataError(f"{origin} names {folder}, which is not a folder")
    return [folder, cache_dir()]


def fetch(remote: Remote) -> Path:
    """Download a file into the cache, or return it if it is already there.

    The bytes go to a temporary file in the same folder, are checked, and only then renamed: an
    interrupted or damaged download never passes for the file.

    Raises:
        DataError: No connection, a refused request, a checksum that differs, too few rows, a
            full disk. The message names URL, folder and the environment variable that avoids the
            download.
    """
    path = cache_dir() / remote.file
    if path.is_file():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise DataError(f"cannot write to {path.parent}: {error.strerror or error}") from None
    try:
        with os.fdopen(handle, "wb") as out:
            _read_into(remote, out)
        _check_rows(remote, Path(temporary))
        os.replace(temporary, path)
    except _FAILURES as error:
        raise DataError(
            f"could not download {remote.url}: {getattr(error, 'reason', None) or error}. "
            f"Download it yourself to {path}, or set {DATA_DIR_VARIABLE} to a folder that "
            f"holds {remote.file}"
        ) from None
    finally:
        Path(temporary).unlink(missing_ok=True)
    return path


def _read_into(remote: Remote, out: IO[bytes]) -> None:
    algorithm, _, expected = remote.checksum.partition(":")
    digest = hashlib.new(algorithm) if expected else None
    request = urllib.request.Request(remote.url, headers={"User-Agent": "fastsel"})
    with urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS) as response:
        announced = int(response.headers.get("Content-Length") or 0)
        total = min(announced, remote.first_bytes) if remote.first_bytes else announced
        done = 0
        limit = remote.first_bytes or math.inf
        while block := response.read(int(min(_BLOCK, limit - done))):
            out.write(block)
            if digest:
                digest.update(block)
            done += len(block)
            _show(remote.url, done, total)
    _show(remote.url, done, total, end=True)
    if total and done < total:
        raise OSError(f"the connection closed after {done:,} of {total:,} bytes")
    if digest and digest.hexdigest() != expected:
        raise OSError(
            f"its {algorithm} is {digest.hexdigest()}, expected {expected} (damaged, or changed)"
        )


def _check_rows(remote: Remote, path: Path) -> None:
    rows = count_rows(path, remote.member, remote.rows) if remote.rows else 0
    if rows < remote.rows:
        raise OSError(f"it has {rows:,} rows, expected {remote.rows:,} (cut short, or changed)")


def _show(url: str, done: int, total: int, *, end: bool = False) -> None:
    if not sys.stderr.isatty():
        if end:
            print(f"downloaded {url} ({done / 1e6:.1f} MB)", file=sys.stderr)
        return
    share = f" of {total / 1e6:.1f}" if total else ""
    print(f"\rdownloading {url}: {done / 1e6:.1f}{share} MB", end="\n" if end else "",
          file=sys.stderr, flush=True)  # fmt: skip
