"""Trainings side by side: a process a core with a thread each, as small steps gain little from a second thread."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any, TypeVar

Found = TypeVar("Found")


def each(measure: Callable[..., Found], calls: Sequence[tuple[Any, ...]], titles: Sequence[str]) -> list[Found]:
    """What `measure` gives for each call, in their order; a line for each that is done.

    Args:
        measure: a function of a module, called in processes of their own.
        calls: its arguments.
        titles: what the lines name them.
    """
    started = time.monotonic()
    with _pool(len(calls)) as pool:
        futures = {pool.submit(_timed, measure, *call): place for place, call in enumerate(calls)}
        try:
            for done, future in enumerate(as_completed(futures), 1):
                seconds, _ = future.result()
                left = (time.monotonic() - started) / done * (len(calls) - done) / 60
                title = titles[futures[future]]
                print(f"{done} of {len(calls)}: {title}: {seconds:.0f} s, about {left:.0f} min left", flush=True)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return [future.result()[1] for future in futures]


def _pool(most: int) -> ProcessPoolExecutor:
    count = max(min(len(os.sched_getaffinity(0)), most), 1)
    return ProcessPoolExecutor(count, multiprocessing.get_context("spawn"), _alone)


def _alone() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # the parent says what Ctrl-C means
    os.environ |= {"TF_NUM_INTRAOP_THREADS": "1", "TF_NUM_INTEROP_THREADS": "1"}
    threading.Thread(target=_end_with, args=(multiprocessing.parent_process(),), daemon=True).start()


def _end_with(parent: Any) -> None:
    """A training of minutes is not gone on with for nobody, however the parent ended."""
    parent.join()
    os._exit(1)


def _timed(measure: Callable[..., Found], *call: Any) -> tuple[float, Found]:
    """The seconds that it took, and what came of it; lines of two trainings at once would say nothing."""
    started = time.monotonic()
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        found = measure(*call)
    return time.monotonic() - started, found
