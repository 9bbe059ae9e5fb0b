"""What steps have shown, on its way to the switch."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

from torch import Tensor

from fastsel.select import ranks
from fastsel.select.clock import Reading, Stopwatch
from fastsel.select.switch import CostAwareSwitch, Plan


class _Report(NamedTuple):
    """One step's, as known on the host at once; its seconds and share may still be on their way."""

    plan: Plan
    watch: Stopwatch | None
    share: Reading | None
    timed: bool
    cycle: int

    @property
    def ready(self) -> bool:
        watched = self.watch is None or self.watch.ready
        return watched and (self.share is None or self.share.ready)

    @property
    def on_cuda(self) -> bool:
        return self.watch is not None and self.watch.on_cuda


class Reports:
    """Tells a switch of every step, in their order, as soon as the device has finished it.

    Args:
        switch: Who is told.
        process_group: The ranks that decide together.
    """

    def __init__(self, switch: CostAwareSwitch, process_group: Any = None) -> None:
        """Starts with nothing to tell."""
        self._switch = switch
        self._process_group = process_group
        self._waiting: list[_Report] = []

    @property
    def unheard(self) -> int:
        """How many watched steps of the kind that does not run now have not been told of yet."""
        selecting = self._switch.selecting
        return sum(r.watch is not None and r.plan.select != selecting for r in self._waiting)

    @property
    def measuring(self) -> bool:
        """Whether a step that measured has not been told of yet."""
        return any(report.plan.measure for report in self._waiting)

    def add(
        self,
        plan: Plan,
        watch: Stopwatch | None,
        *,
        share: Tensor | None = None,
        timed: bool = True,
        cycle: int = 1,
    ) -> None:
        """Takes a step that has ended.

        Args:
            plan: What it did.
            watch: Its stopwatch, with the phase ``"measure"`` for what only the measuring took;
                None if it was not watched.
            share: The share found, if it measured.
            timed: False where the other phases held work that an ordinary step does not do.
            cycle: See `CostAwareSwitch.observe`.
        """
        if watch is None and not self._waiting:
            self._switch.skip()
            return
        reading = None if share is None else Reading(share)
        self._waiting.append(_Report(plan, watch, reading, timed, cycle))
        # Ranks have to hear of the same steps at the same time. There a device is given two steps
        # to get ahead, and then waited for.
        several = ranks.world_size(self._process_group) > 1
        ahead = 2 if several and any(report.on_cuda for report in self._waiting) else 0
        while len(self._waiting) > ahead and (several or self._waiting[0].ready):
            self._tell(self._waiting.pop(0), several)

    def clear(self) -> None:
        """Forgets what has not been told."""
        self._waiting.clear()

    def _tell(self, report: _Report, several: bool) -> None:
        if report.watch is None:
            self._switch.skip()
            return
        seconds = report.watch.seconds()
        probe = seconds.pop("measure", 0.0)
        agree = functools.partial(ranks.mean_over_ranks, group=self._process_group)
        self._switch.observe(
            report.plan,
            seconds=sum(seconds.values()) if report.timed else None,
            share=math.nan if report.share is None else report.share.value(),
            probe_seconds=probe,
            cycle=report.cycle,
            agree=agree if several else None,
        )
