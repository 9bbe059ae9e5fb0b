"""Writes what the benches measured to bench/results; `make bench-quick` only shows it."""

from __future__ import annotations

import harness
import pytest


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Writes the session's rows, unless it was a quick one or one with failures."""
    measured = getattr(session.config, "_benchmarksession", None)
    if measured is None or not measured.benchmarks:
        return
    rows = [
        harness.summarise(bench.stats.data, bench.extra_info)
        for bench in measured.benchmarks
        if not bench.has_error
    ]
    harness.add_ratios(rows)
    for row in rows:
        print(
            f"\n{row['op']:8} {row['workload']:28} {row['device']:5} {row['contender']:20}"
            f"{row['median_us']:12.1f} us {row['gb_per_s']:8.2f} GB/s"
            f"   {row['times_fastsel']} x fastsel",
            end="",
        )
    if not harness.QUICK and session.exitstatus == 0:
        print(f"\nwritten to {harness.write_results(rows).relative_to(harness.ROOT)}")
