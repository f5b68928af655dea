"""Stages small enough to test the runner with: they count their runs in a file."""

from typing import NamedTuple

from kfp import dsl


class OUTPUTS(NamedTuple):
    doubled: dsl.Dataset
    rows: int


@dsl.component(base_image="python:3.11", install_kfp_package=False)
def double(numbers: dsl.Input[dsl.Dataset], trace: str, fail: str, doubled: dsl.Output[dsl.Dataset]) -> int:
    import os
    import signal
    import time
    from pathlib import Path

    from penstock.events import LABELS  # the library is importable in a component's process

    print(f"labels {len(LABELS)}")
    with Path(trace).open("a") as file:
        file.write(f"{os.getpid()}\n")
    if fail == "raise":
        raise ValueError(f"{numbers.path}: column x is missing;\nsee the list of columns")
    if fail == "kill":
        print("half way")
        os.kill(os.getpid(), signal.SIGKILL)
    if fail == "sleep":
        time.sleep(60)
    if fail == "silent":
        return 0
    Path(doubled.path).mkdir(parents=True)
    if fail == "late":
        (Path(doubled.path) / "half").touch()
        raise ValueError("only half is done")
    values = [2 * int(line) for line in Path(numbers.path).read_text().split()]
    (Path(doubled.path) / "numbers.txt").write_text("\n".join(map(str, values)))
    doubled.metadata["rows"] = len(values)
    return len(values)


@dsl.pipeline
def doubling(numbers_uri: str, trace: str, fail: str = "") -> OUTPUTS:
    numbers = dsl.importer(artifact_uri=numbers_uri, artifact_class=dsl.Dataset, reimport=False)
    done = double(numbers=numbers.output, trace=trace, fail=fail)
    return OUTPUTS(doubled=done.outputs["doubled"], rows=done.outputs["Output"])
