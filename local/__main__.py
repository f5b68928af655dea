"""`python -m local up | down | status | demo | mend | reconcile`: the whole system on one machine."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from local import supervisor
from local.place import LocalError, Place

MOST_TOLD = 20
"""So many rows that are still bad are named; their file has them all."""


def status(place: Place) -> int:
    """Prints what runs; 0 if everything does."""
    found = supervisor.read_status(place.home)
    if not supervisor.running(place.home):
        print(found.get("error") or f"nothing runs on {place.home}; `make up` starts the services")
        return 1
    print(f"{found['state']}, process {found['pid']}")
    for name, service in found["services"].items():
        print(f"  {name:<22}process {service['pid']:<8}{service['log']}")
    return int(found["state"] != "ready")


def mend(place: Place, file: Path) -> int:
    """Takes corrected rows of a quarantine back and says what became of each; 0 if none is still bad."""
    print("loading Great Expectations", flush=True)
    from components.mend import mend
    from penstock.events import TABLES, LogError

    try:
        done = mend(file, place.home)
    except LogError as error:
        raise LocalError(str(error)) from error
    if done.kept_in:
        counts = ", ".join(f"{count:,} of {name}" for name, count in done.taken.items())
        print(f"{_rows(sum(done.taken.values()))} came back ({counts}): the next run of prepare has them")
        print(f"kept in {done.kept_in}")
    if done.left_in is None:
        return 0
    keys = {table.name: table.key for table in TABLES}
    print(f"{_rows(done.refused.height, 'are', 'is')} still bad and left in {done.left_in}")
    for row in done.refused.head(MOST_TOLD).to_dicts():
        print(f"  {row['table']}, {keys[row['table']]} {row[keys[row['table']]]}: {row['reason']}")
    if done.refused.height > MOST_TOLD:
        print(f"  … and {done.refused.height - MOST_TOLD:,} more")
    return 1


def _rows(count: int, several: str = "", one: str = "") -> str:
    return f"{count:,} {'row' if count == 1 else 'rows'} {one if count == 1 else several}".rstrip()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m local", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("up", help="start the services in the background")
    commands.add_parser("down", help="stop them")
    commands.add_parser("status", help="what runs")
    commands.add_parser("serve", help="run them in this process")
    demo = commands.add_parser("demo", help="the whole loop, from a log to live recommendations")
    demo.add_argument("--data", default="", help="a log or a data set; by default the simulator")
    demo.add_argument("--keep", type=int, choices=(0, 1), default=1, help="0: stop everything at the end")
    demo.add_argument("--options", type=json.loads, default={}, help="settings of the simulator, as JSON")
    back = commands.add_parser("mend", help="bring corrected rows of a quarantine back into the log")
    back.add_argument("file", type=Path, help="a quarantine file, or a copy of it, in which a person corrected values")
    agree = commands.add_parser("reconcile", help="what is live against what serving and MLflow have")
    agree.add_argument("--mend", action="store_true", help="bring them together")
    arguments = parser.parse_args()
    try:
        place = Place.from_environment(data=arguments.data if arguments.command == "demo" else None)
        if arguments.command == "serve":
            return supervisor.serve(place)
        if arguments.command == "status":
            return status(place)
        if arguments.command == "down":
            print("stopped" if supervisor.down(place) else f"nothing ran on {place.home}")
            return 0
        if arguments.command == "up":
            supervisor.start(place, print)
            print("\n".join(place.addresses()))
            return 0
        if arguments.command == "mend":
            return mend(place, arguments.file)
        if arguments.command == "reconcile":
            from local import reconcile

            return reconcile.run(place, dict(os.environ), mend=arguments.mend)
        from local.demo import run

        return run(place, arguments.data, keep=bool(arguments.keep), options=arguments.options)
    except LocalError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
