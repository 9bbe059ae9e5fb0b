"""The clock of a run: every second of training belongs to exactly one phase."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from fastsel.compare.run import PHASES
from fastsel.select.selection import BatchSelection

# What a selective step does beside training, and the phase each part of it counts for. Watching
# whether choosing pays is a cost of choosing.
_PARTS = {
    "score": ("score",),
    "choose": ("choose", "share_of", "measure_output", "finish"),
}


class Clock:
    """Seconds by phase; on a GPU each phase ends with a synchronisation, so its work counts.

    A phase inside another takes its seconds out of the outer one, so the phases add up to all the
    time that was spent in any.

    Args:
        device: "cpu" or "cuda".

    Attributes:
        seconds: Seconds by phase.
        cpu_seconds: Processor seconds of this process in the same time.
    """

    def __init__(self, device: str) -> None:
        """Makes a clock that stands at zero."""
        self.device = device
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self.cpu_seconds = 0.0
        self._open: list[str] = []
        self._since = 0.0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time what runs inside."""
        outermost = not self._open
        cpu = time.process_time() if outermost else 0.0
        self._charge()
        self._open.append(name)
        try:
            yield
        finally:
            self._charge()
            self._open.pop()
            if outermost:
                self.cpu_seconds += time.process_time() - cpu

    def time_selection(self, selection: BatchSelection) -> None:
        """Count the parts of a selection as phases of their own from now on."""
        for phase, parts in _PARTS.items():
            for part in parts:
                setattr(selection, part, self._timed(phase, getattr(selection, part)))

    @property
    def total(self) -> float:
        """All phases, up to the last one's end."""
        return sum(self.seconds.values())

    @property
    def now(self) -> float:
        """All phases, up to this moment."""
        self._charge()
        return self.total

    def _charge(self) -> None:
        """Give the seconds since the last call to the innermost open phase."""
        if self._open and self.device == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        if self._open:
            self.seconds[self._open[-1]] += now - self._since
        self._since = now

    def _timed(self, phase: str, part: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any, **options: Any) -> Any:
            with self.phase(phase):
                return part(*arguments, **options)

        return timed
