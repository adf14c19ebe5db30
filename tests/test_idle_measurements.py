"""A server measures its machine when it has nothing to do, and a request waits for one piece of that at most."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from served import eventually, serving

from outrider.config import SamplingParams
from outrider.engine.llm import LLM
from outrider.serving import idle_measurements
from outrider.serving.idle_measurements import IdleMeasurements

ASK = {"model": "embedded", "prompt": "def add(a, b):", "max_tokens": 8}


class Measured(LLM):
    """One whose measuring is a number of pieces, of which each is seen."""

    def __init__(self, pieces: int) -> None:
        super().__init__("embedded", "none", measure=False)
        self.pieces, self.done = pieces, 0

    def measure(self, alone: Callable[[Callable[[], Any]], Any]) -> None:
        for _ in range(self.pieces):
            assert alone(self.piece) == "answer"

    def piece(self) -> str:
        self.done += 1
        return "answer"


def test_a_server_measures_once_it_is_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(idle_measurements, "QUIET", 0.2)
    llm = Measured(pieces=3)
    with serving(llm) as (url, _):
        assert httpx.get(f"{url}/ready").status_code == 200
        assert httpx.post(f"{url}/v1/completions", json=ASK).status_code == 200
        assert eventually(lambda: llm.done == 3)
        assert httpx.post(f"{url}/v1/completions", json=ASK).status_code == 200


def test_what_is_measured_waits_for_requests_and_ends_with_the_server() -> None:
    llm = Measured(pieces=1_000_000)
    measuring = IdleMeasurements(llm)
    request = llm.engine.submit([1, 2, 3], SamplingParams(max_tokens=9), seed=1)
    measuring.start()
    time.sleep(idle_measurements.QUIET + 0.3)
    assert llm.done == 0, "a request has not ended"
    llm.engine.cancel(request)
    assert eventually(lambda: llm.done > 0)
    measuring.stop()
    done = llm.done
    time.sleep(0.1)
    assert llm.done == done and "measuring" not in {thread.name for thread in threading.enumerate()}
