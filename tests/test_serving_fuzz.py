"""Bodies made from the server's own schema: every answer has the right kind of status, soon; nothing is left over."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from served import drafting, eventually, serving

from outrider.serving.openapi import BODIES
from outrider.serving.service import Service

schemathesis = pytest.importorskip("schemathesis")

EXPECTED = {200, 400, 404, 413, 415, 429}
LIMITS = ("max_tokens", "max_completion_tokens", "max_output_tokens")
SLOWEST = 10.0  # seconds, on a busy machine


@pytest.fixture(scope="module")
def running() -> Iterator[tuple[str, Service]]:
    with serving(drafting(), max_new_tokens=8) as found:
        yield found


def fuzz(running: tuple[str, Service], path: str, examples: int) -> Counter[int]:
    """Statuses of that many requests. Half of them are asked of the right model and within its limits, so that they
    get further."""
    url, service = running
    seen: Counter[int] = Counter()
    document = httpx.get(f"{url}/openapi.json").json()
    operation = schemathesis.openapi.from_dict(document)[path]["POST"]
    with httpx.Client(base_url=url, timeout=SLOWEST) as client:

        @settings(
            max_examples=examples,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.generate],
        )
        @given(case=operation.as_strategy())
        def run(case: Any) -> None:
            body = case.body
            if isinstance(body, dict) and sum(seen.values()) % 2:
                body = {name: value for name, value in body.items() if name != "model"}
                body |= {name: 8 for name in LIMITS if isinstance(body.get(name), int)}
            response = client.post(path, json=body)
            seen[response.status_code] += 1
            assert response.status_code in EXPECTED, (response.status_code, response.text[:300], body)
            if response.status_code >= 400:
                assert response.json()["error"]["message"]

        run()
    assert eventually(lambda: not service.thread.answers())
    assert httpx.get(f"{url}/health").status_code == 200
    return seen


@pytest.mark.parametrize("path", BODIES)
def test_no_body_breaks_the_server(running: tuple[str, Service], path: str) -> None:
    began = time.perf_counter()
    seen = fuzz(running, path, 12)
    assert sum(seen.values()) >= 12 and time.perf_counter() - began < 60


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("path", BODIES)
def test_ten_thousand_bodies(running: tuple[str, Service], path: str) -> None:
    assert sum(fuzz(running, path, -(-10_000 // len(BODIES))).values()) >= 1000
