"""The output folder: finished runs, checkpoints, and what makes a rerun resume."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fastsel.compare.errors import CompareError
from fastsel.compare.run import Run
from fastsel.compare.settings import identity_hash

MARKER = ".fastsel-compare"
_MARKER_TEXT = (
    "Folder of `fastsel compare`; a rerun writes results.json, report.html and the PNGs again.\n"
)
FIGURES = (
    "loss-steps.png", "loss-seconds.png", "accuracy-steps.png", "accuracy-seconds.png",
    "rmse-steps.png", "rmse-seconds.png", "step-time.png", "method-weights.png", "switch.png",
)  # fmt: skip
_WRITTEN = ("runs", "results.json", "report.html", *FIGURES)
# Digits of an identity's hash in the names of its files: enough that no two identities ever meet.
_NAME_DIGITS = 12


def atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Write a file under a temporary name and rename it: readers see the old or the new file.

    Args:
        path: The file.
        write: Writes to the path it is given.
    """
    temporary = path.parent / f".{path.name}.{secrets.token_hex(8)}"
    temporary.touch(exist_ok=False)  # unlike tempfile's 0600, permissions follow the umask
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file atomically."""

    def write(temporary: Path) -> None:
        temporary.write_bytes(content)

    atomically(path, write)


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write JSON atomically; NaN is refused, since JSON has none."""
    write_bytes(path, (json.dumps(values, indent=1, allow_nan=False) + "\n").encode())


class Store:
    """One output folder."""

    def __init__(self, out: Path) -> None:
        """Args: out, the folder."""
        self.out = out
        self.runs = out / "runs"

    def check(self) -> None:
        """Raise before any work if the folder could not be used; creates nothing.

        Raises:
            CompareError: It cannot be written, or holds files of the names we write that are
                not ours.
        """
        try:
            if self.out.is_dir() and not (self.out / MARKER).is_file():
                foreign = [name for name in _WRITTEN if (self.out / name).exists()]
                if foreign:
                    raise CompareError(
                        f"{self.out} holds {', '.join(foreign)} that fastsel compare did not "
                        "write: choose another folder with --out"
                    )
            existing = self.out.absolute()
            while not existing.exists():
                existing = existing.parent
        except OSError as error:
            raise self._unwritable(error.strerror or str(error)) from None
        if not existing.is_dir():
            raise self._unwritable(f"{existing} is not a folder")
        if not os.access(existing, os.W_OK | os.X_OK):
            raise self._unwritable(f"no permission to write in {existing}")

    def prepare(self) -> None:
        """`check`, then create the folder.

        Raises:
            CompareError: See `check`.
        """
        self.check()
        try:
            self.runs.mkdir(parents=True, exist_ok=True)
            write_bytes(self.out / MARKER, _MARKER_TEXT.encode())
        except OSError as error:
            raise self._unwritable(error.strerror or str(error)) from None

    def _unwritable(self, why: str) -> CompareError:
        return CompareError(f"cannot write to the output folder {self.out}: {why}")

    def _path(self, identity: dict[str, Any], suffix: str) -> Path:
        # With the hash no run takes the place of another one's result.
        short = identity_hash(identity)[:_NAME_DIGITS]
        return self.runs / f"{_prefix(identity)}-{short}.{suffix}"

    def find(self, identity: dict[str, Any]) -> tuple[Run | None, str]:
        """Look for a finished run.

        Args:
            identity: From `fastsel.compare.settings.identity`.

        Returns:
            The run, if one of this identity is there; else None and, if there are others of its
            strategy and seed, what differs in the one that is closest.
        """
        path = self._path(identity, "json")
        try:
            saved = json.loads(path.read_text(encoding="utf-8"))
            if saved["hash"] == identity_hash(identity) and saved["identity"] == identity:
                return Run.from_json(saved["run"]), ""
            return None, "the saved file was altered"
        except FileNotFoundError:
            return None, self._difference(identity)
        except (OSError, ValueError, KeyError, TypeError):
            return None, "the saved file cannot be read"

    def _difference(self, identity: dict[str, Any]) -> str:
        closest: list[str] | None = None
        for path in sorted(self.runs.glob(f"{_prefix(identity)}-*.json")):
            try:
                old = json.loads(path.read_text(encoding="utf-8"))["identity"]
                texts = [
                    "other data" if key == "data" else f"{key} {old.get(key)} -> {value}"
                    for key, value in identity.items()
                    if old.get(key) != value
                ]
            except (OSError, ValueError, KeyError, TypeError, AttributeError):
                continue  # a damaged file explains nothing; it is left alone
            if closest is None or len(texts) < len(closest):
                closest = texts
        return "" if closest is None else f"{', '.join(closest)}; the earlier run is kept"

    def save(self, run: Run, identity: dict[str, Any]) -> None:
        """Save a finished run and drop its checkpoint."""
        values = {"hash": identity_hash(identity), "identity": identity, "run": run.to_json()}
        write_json(self._path(identity, "json"), values)
        self._path(identity, "ckpt").unlink(missing_ok=True)

    def save_checkpoint(self, identity: dict[str, Any], state: dict[str, Any]) -> None:
        """Save the state of an unfinished run."""
        path = self._path(identity, "ckpt")
        values = {"hash": identity_hash(identity), "state": state}
        atomically(path, lambda temporary: torch.save(values, temporary))

    def checkpoint(self, identity: dict[str, Any]) -> dict[str, Any] | None:
        """The state of an unfinished run of this very identity, if there is one."""
        path = self._path(identity, "ckpt")
        if not path.is_file():
            return None
        try:
            saved = torch.load(path, map_location="cpu", weights_only=True)
            state: dict[str, Any] = saved["state"]
            return state if saved["hash"] == identity_hash(identity) else None
        except Exception:  # a damaged checkpoint fails in many ways; the run starts over
            return None


def _prefix(identity: dict[str, Any]) -> str:
    """What the names of a strategy's and seed's files begin with; not every disk takes a colon."""
    return f"{identity['strategy'].replace(':', '.')}-{identity['seed']}"
