"""Runs jobs in several processes side by side and stops them all in an orderly way.

Interrupts reach the parent alone. It tells the workers, which end where they next report; so a
worker is never cut off in the middle of writing a file. A worker whose parent has died ends, too.
"""

from __future__ import annotations

import multiprocessing
import signal
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

Tell = Callable[[Any], None]
Work = Callable[[Any, Tell], Any]


def run(
    work: Work, jobs: Sequence[Any], *, processes: int, on_message: Callable[[Any], None]
) -> list[Any]:
    """Runs all jobs, the first ones first. For the main thread.

    Args:
        work: ``work(job, tell)`` gives the job's result. It calls ``tell(message)`` every now and
            then, which raises KeyboardInterrupt when it is to end. A function of a module, for it
            is imported by the workers.
        jobs: What the work is called with; they and the results have to be picklable.
        processes: How many workers.
        on_message: Called with what the workers tell.

    Returns:
        The results, in the order of the jobs.

    Raises:
        RuntimeError: A job failed; the text is its traceback.
        KeyboardInterrupt: Ctrl-C. All workers have ended.
    """
    context = multiprocessing.get_context("spawn")
    left = list(enumerate(jobs))[::-1]
    results: dict[int, Any] = {}
    busy: dict[Connection, int] = {}
    workers: list[tuple[Any, Connection]] = []
    try:
        for _ in range(min(processes, len(jobs))):
            ours, theirs = context.Pipe()
            worker = context.Process(target=_serve, args=(work, theirs))
            interrupts = signal.signal(signal.SIGINT, signal.SIG_IGN)  # which the worker inherits
            worker.start()
            signal.signal(signal.SIGINT, interrupts)
            theirs.close()  # so that its end is seen here
            workers.append((worker, ours))
            _next(ours, left, busy)
        while busy:
            for ready in wait(list(busy)):
                assert isinstance(ready, Connection)
                try:
                    kind, content = ready.recv()
                except EOFError:
                    raise RuntimeError("a worker ended before its job was done") from None
                if kind == "message":
                    on_message(content)
                elif kind == "done":
                    results[busy.pop(ready)] = content
                    _next(ready, left, busy)
                else:
                    raise RuntimeError(content)
    finally:
        for worker, pipe in workers:
            if worker.is_alive():
                _end(pipe)
        for worker, _ in workers:
            worker.join()
    return [results[i] for i in range(len(jobs))]


def _next(pipe: Connection, left: list[tuple[int, Any]], busy: dict[Connection, int]) -> None:
    if left:
        busy[pipe], job = left.pop()
        pipe.send(job)


def _end(pipe: Connection) -> None:
    try:
        pipe.send(None)
        while True:  # what is still on its way, so that nobody waits for it to be read
            pipe.recv()
    except (OSError, EOFError):  # the worker is gone
        pass


def _serve(work: Work, pipe: Connection) -> None:
    def tell(message: Any) -> None:
        if pipe.poll():  # while a job runs, whatever comes from the parent means its end
            raise KeyboardInterrupt
        pipe.send(("message", message))

    try:
        while (job := pipe.recv()) is not None:
            try:
                pipe.send(("done", work(job, tell)))
            except Exception:
                pipe.send(("failed", traceback.format_exc()))
    except (OSError, EOFError, KeyboardInterrupt):
        pass  # the parent is gone, or wants no more
