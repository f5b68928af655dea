from __future__ import annotations

import pytest

from benchmarks.load import Measured, _is_whole, _request, closed_loop, open_loop
from benchmarks.serve import _stages
from benchmarks.soak import flat
from tests.serving.conftest import serving

ANSWER = b'HTTP/1.1 200 OK\r\ncontent-type: application/json\r\nContent-Length: 15\r\n\r\n{"degraded":[],'


def test_an_answer_is_whole_when_its_body_is() -> None:
    assert [end for end in range(len(ANSWER) + 1) if _is_whole(ANSWER[:end])] == [len(ANSWER)]
    found = Measured()
    for answer in (ANSWER, ANSWER.replace(b"200", b"503"), ANSWER.replace(b"[]", b'["rank"]')):
        found.add(0.001, answer)
    assert (len(found.seconds), found.failed, found.degraded) == (3, 1, 1)


def test_a_request_says_how_long_it_is() -> None:
    head, _, body = _request(12, 3).partition(b"\r\n\r\n")
    assert head.endswith(b"Content-Length: %d" % len(body))
    assert body == b'{"user_id":12,"k":10,"context":{"scenario":3}}'


def test_what_clients_saw_adds_up() -> None:
    found = Measured([0.001, 0.003], 1, 2.0)
    found += Measured([0.002], 0, 1.0)
    assert (found.ms(50), found.rate, found.failed) == (pytest.approx(2.0), 1.0, 1)


def test_the_stages_and_the_rest_are_the_whole() -> None:
    def counted(count: float, recall: float, whole: float) -> dict[str, float]:
        labels = '{route="/recommend",status="200",variant="champion"}'
        return {
            'penstock_stage_seconds_count{stage="recall"}': count,
            'penstock_stage_seconds_sum{stage="recall"}': recall,
            f"penstock_request_seconds_count{labels}": count,
            f"penstock_request_seconds_sum{labels}": whole,
        }

    stages = _stages(counted(1, 9.0, 9.0), counted(3, 9.004, 9.010), Measured([0.006, 0.006], 0, 1.0))
    assert stages["recall"] == pytest.approx(2.0)
    assert stages["rank"] == 0
    assert stages["HTTP, JSON, threads"] == pytest.approx(3.0)
    assert stages["client and socket"] == pytest.approx(1.0)
    assert sum(stages.values()) == pytest.approx(6.0)


def test_a_memory_that_grows_is_not_flat() -> None:
    seconds = [10.0 * n for n in range(180)]
    wobble = [n * 7919 % 13 / 10 for n in range(180)]
    mean, slope, low, high = flat(seconds, [500 + n for n in wobble])
    assert low <= 0 <= high
    assert mean == pytest.approx(500.6, abs=0.1)
    _, slope, low, high = flat(seconds, [500 + second / 100 + n for second, n in zip(seconds, wobble, strict=True)])
    assert 30 < low <= slope <= high < 42  # 36 MB an hour
    _, slope, low, _ = flat(seconds, [*range(30), *[500.0] * 150])  # filling caches are left out
    assert slope == low == 0


async def app(scope, receive, send) -> None:
    if scope["type"] == "lifespan":
        await receive()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await send({"type": "lifespan.shutdown.complete"})
        return
    await receive()
    body = b'{"degraded":[],"items":[]}'
    headers = [(b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def test_loops_ask_and_count() -> None:
    with serving(app) as client:
        port = client.base_url.port
        assert port
        closed = closed_loop(port, 2, 0.2, 10)
        assert len(closed.seconds) > 2
        opened = open_loop(port, 200.0, 0.2, 10)
        assert len(opened.seconds) == 40
    assert closed.failed == opened.failed == closed.degraded == opened.degraded == 0
