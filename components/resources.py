"""What a component asks of the machine it runs on: processors, memory, GPUs, and how it is treated there."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

# the quantities of Kubernetes, as far as they are sensible for processors and for memory
_CPU = re.compile(r"\d+(\.\d+)?|\d+m")
_MEMORY = re.compile(r"\d+(\.\d+)?([KMGTP]i?)?")


@dataclass(frozen=True)
class Config:
    """Resources of one component; what is not said is left to the machine."""

    cpu: str = ""
    """A quantity of Kubernetes: "4", "500m"."""
    memory: str = ""
    """The most it may use: "16Gi"."""
    gpus: int = 0
    gpu_type: str = "nvidia.com/gpu"
    """The name under which a cluster's nodes offer them."""
    node_selector: dict[str, str] = field(default_factory=dict)
    """Labels that the node must have, on a cluster."""
    retries: int = 0
    """How often a cluster tries again before the stage fails."""
    cache: bool = False
    """Whether a cluster may take the outputs of an earlier run of the same component with the same inputs."""

    def __post_init__(self) -> None:
        for name, pattern in (("cpu", _CPU), ("memory", _MEMORY)):
            value = getattr(self, name)
            if value and not pattern.fullmatch(value):
                raise ValueError(f"{name} {value!r} is not a quantity, as 4 or 16Gi is")
        for name in ("gpus", "retries"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}, below 0")
        for label, value in self.node_selector.items():
            if not isinstance(value, str):
                raise ValueError(f"node_selector {label} is a string, not {value!r}")

    def memory_bytes(self) -> int:
        """The memory in bytes, 0 if it is not limited."""
        if not self.memory:
            return 0
        number, unit = re.fullmatch(r"([\d.]+)(.*)", self.memory).groups()  # type: ignore[union-attr]
        base = 1024 if unit.endswith("i") else 1000
        return int(float(number) * base ** " KMGTP".index(unit[:1] or " "))

    def cpus(self) -> float:
        """The processors, 0 if they are not limited."""
        if self.cpu.endswith("m"):
            return int(self.cpu[:-1]) / 1000
        return float(self.cpu or 0)


def by_component(overrides: Mapping[str, Mapping[str, Any]]) -> dict[str, Config]:
    """The resources of components by their names, as they come from JSON.

    Raises:
        ValueError: there is no such component or setting, or a value that cannot be.
    """
    import penstock
    from components import resources

    found = {}
    for component, settings in overrides.items():
        if not component.isidentifier() or find_spec(f"components.{component}") is None:
            raise ValueError(f"no component {component!r}: they are the files of components/")
        try:
            found[component] = penstock.config(resources, settings)
        except ValueError as error:
            raise ValueError(f"{component}: {error}") from None
    return found
