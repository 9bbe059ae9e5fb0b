"""Seconds and small device values, read without making the host wait for the device."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor


class Stopwatch:
    """Times the phases of one step on the device that does the work.

    On the CPU a mark is a reading of the clock. On CUDA it is an event on the current stream, and
    `ready` says whether the device has passed the last mark; who asks for the seconds before that
    waits.

    Args:
        device: Where the work runs.

    Attributes:
        on_cuda: Whether that is a GPU.

    Example:
        >>> watch = Stopwatch(torch.device("cpu"))
        >>> watch.mark("score")
        >>> sorted(watch.seconds())
        ['score']
    """

    def __init__(self, device: torch.device) -> None:
        """Starts."""
        self.on_cuda = device.type == "cuda"
        self._device = device
        self._marks: list[tuple[str, Any]] = []
        self.mark("")

    def mark(self, phase: str) -> None:
        """Ends the phase `phase`, which began at the mark before."""
        if self.on_cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self._device))
            self._marks.append((phase, event))
        else:
            self._marks.append((phase, time.perf_counter()))

    @property
    def ready(self) -> bool:
        """Whether `seconds` can be had without waiting."""
        return not self.on_cuda or bool(self._marks[-1][1].query())

    def seconds(self) -> dict[str, float]:
        """Seconds of each phase, those of one name added up; waits if they are not known yet."""
        if self.on_cuda:
            self._marks[-1][1].synchronize()
        result: dict[str, float] = {}
        for (_, start), (phase, end) in zip(self._marks, self._marks[1:], strict=False):
            took = start.elapsed_time(end) / 1e3 if self.on_cuda else end - start
            result[phase] = result.get(phase, 0.0) + took
        return result


class Reading:
    """A number on its way from the device.

    Args:
        value: A tensor of one element. A copy is taken at once, so it may change afterwards.

    Example:
        >>> Reading(torch.tensor(0.5)).value()
        0.5
    """

    def __init__(self, value: Tensor) -> None:
        """Sends for the number."""
        self._event: Any = None
        if value.is_cuda:
            self._host = torch.empty((), dtype=value.dtype, pin_memory=True)
            self._host.copy_(value.detach().reshape(()), non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(value.device))
        else:
            self._host = value.detach().clone()

    @property
    def ready(self) -> bool:
        """Whether `value` can be had without waiting."""
        return self._event is None or bool(self._event.query())

    def value(self) -> float:
        """The number; waits for it if it is not there yet."""
        if self._event is not None:
            self._event.synchronize()
        return float(self._host)
