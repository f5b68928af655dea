"""`python -m local up | down | status | demo`: the whole system on one machine."""

from __future__ import annotations

import argparse
import json
import sys

from local import supervisor
from local.place import LocalError, Place


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
        from local.demo import run

        return run(place, arguments.data, keep=bool(arguments.keep), options=arguments.options)
    except LocalError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
