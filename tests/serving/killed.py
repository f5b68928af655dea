"""Runs of look-alike that are killed, each in a process of its own: `python -m tests.serving.killed HOME SERVER OTHER`.

Prints by which signal each ended. They are forked from one that has imported what they need.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from penstock import durable, seeds
from serving import look_alike


def killed(owner: Any, name: str, times: int, run: Callable[[], Any]) -> str:
    """By which signal a process ends that runs until `owner.name` is called so many times."""
    child = os.fork()
    if child:
        status = os.waitpid(child, 0)[1]
        return signal.Signals(os.WTERMSIG(status)).name if os.WIFSIGNALED(status) else f"none, {status}"
    real, left = getattr(owner, name), [times]

    def until(*given: Any, **named: Any) -> Any:
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*given, **named)

    try:
        setattr(owner, name, until)
        run()
    except BaseException:
        traceback.print_exc()
    os._exit(3)


def main() -> None:
    home, server, other = sys.argv[1:]
    look_alike.LEAST_SEEDS = 2

    def refresh() -> Any:
        return look_alike.refresh(Path(home), 1, server)

    ended = {
        "between two items": killed(look_alike, "item_of", 2, refresh),
        "before the new table has its name": killed(durable.os, "fsync", 1, refresh),
        "between two seeds": killed(seeds.SeedBuffer, "_add", 2, lambda: look_alike.follow(Path(other))),
    }
    print(json.dumps(ended))


if __name__ == "__main__":
    main()
