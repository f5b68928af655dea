from __future__ import annotations

import socket
from contextlib import ExitStack

from local.place import HOST, PORTS


def free_ports() -> dict[str, int]:
    """A free port for each service, all of them held until the last is drawn."""
    with ExitStack() as held:
        drawn = {}
        for service in PORTS:
            probe = held.enter_context(socket.socket())
            probe.bind((HOST, 0))
            drawn[service] = probe.getsockname()[1]
        return drawn
