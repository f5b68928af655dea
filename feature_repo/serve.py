"""`python -m feature_repo.serve --home HOME`: Feast's HTTP feature server on a home, its definitions registered first.

It is the server of `feast serve` in one process. That command forks a worker, which tears threads and connections that
are open, and ends it after every thousand requests, which breaks those that are running.

Values are read from the online store at each call, definitions once a minute.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

import uvicorn
from feast.feature_server import get_app

from feature_repo.configuration import StoreError
from feature_repo.store import apply, open_store

REGISTRY_SECONDS = 60


def main() -> None:
    """Serves until SIGTERM or SIGINT."""
    parser = argparse.ArgumentParser(prog="python -m feature_repo.serve", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--home", type=Path, required=True)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=6566)
    arguments = parser.parse_args()
    logging.getLogger("fastapi").disabled = True  # uvicorn writes the same errors
    try:
        apply(arguments.home)
        app = get_app(open_store(arguments.home), REGISTRY_SECONDS)
    except StoreError as error:
        sys.exit(f"feature server: {error}")
    uvicorn.run(app, host=arguments.host, port=arguments.port, access_log=False, log_level="warning")


if __name__ == "__main__":
    main()
