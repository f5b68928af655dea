from __future__ import annotations

from typing import Any

import pytest

from components.resources import Config, by_component


def test_resources_come_by_component() -> None:
    found = by_component({"train_rank": {"gpus": 1, "memory": "16Gi", "node_selector": {"gpu": "h100"}}, "gate": {}})
    assert found == {"train_rank": Config(gpus=1, memory="16Gi", node_selector={"gpu": "h100"}), "gate": Config()}


@pytest.mark.parametrize(
    ("component", "settings", "says"),
    [
        ("train_rnk", {}, "no component 'train_rnk'"),
        ("os.path", {}, "no component 'os.path'"),
        ("train_rank", {"gpu": 1}, "train_rank: unknown parameter gpu"),
        ("train_rank", {"gpus": "1"}, "train_rank: parameter gpus of .* is a int, not '1'"),
        ("train_rank", {"gpus": -1}, "train_rank: gpus is -1, below 0"),
        ("train_rank", {"memory": "16 GB"}, "train_rank: memory '16 GB' is not a quantity"),
        ("train_rank", {"cpu": "four"}, "train_rank: cpu 'four' is not a quantity"),
        ("train_rank", {"node_selector": {"gpu": 1}}, "train_rank: node_selector gpu is a string, not 1"),
    ],
)
def test_what_cannot_be_asked_for_is_told(component: str, settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        by_component({component: settings})


@pytest.mark.parametrize(
    ("memory", "expected"),
    [("", 0), ("5", 5), ("1.5k", 1500), ("2Ki", 2048), ("16Gi", 16 * 2**30), ("3G", 3_000_000_000), ("1Ti", 2**40)],
)
def test_memory_in_bytes(memory: str, expected: int) -> None:
    assert Config(memory=memory.replace("k", "K")).memory_bytes() == expected


def test_processors() -> None:
    assert [Config(cpu=cpu).cpus() for cpu in ("", "4", "1.5", "500m")] == [0, 4, 1.5, 0.5]
