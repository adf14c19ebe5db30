"""Who may call a server: keys in either header, and pages of other origins."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest
from served import serving

from outrider.engine.llm import LLM

PAGE = "http://localhost:3000"


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text("first\nsecond\n")
    with (
        serving(LLM("embedded", "none"), api_key_file=str(keys), cors_origins=[PAGE]) as (url, _),
        httpx.Client(base_url=url) as one,
    ):
        yield one


def test_a_key_in_either_header_is_enough(client: httpx.Client) -> None:
    """Anthropic's client sends both where its environment has a token and a key."""
    for bearer, key, status in (("no", "second", 200), ("first", "no", 200), ("no", "no", 401), ("x", "", 401)):
        headers = {"Authorization": f"Bearer {bearer}", "x-api-key": key}
        assert client.get("/v1/models", headers=headers).status_code == status


def test_a_refused_key_is_told_from_a_missing_one(client: httpx.Client) -> None:
    assert client.get("/v1/models").json()["error"]["message"].endswith("got none")
    wrong = {"x-api-key": "no", "anthropic-version": "2023-06-01"}
    refused = client.get("/v1/models", headers=wrong).json()
    assert refused["type"] == "error" and refused["error"]["message"].endswith("got a key that is none of them")


def test_a_page_may_read_the_request_id_and_when_to_come_back(client: httpx.Client) -> None:
    answer = client.get("/v1/models", headers={"Origin": PAGE})
    assert answer.status_code == 401 and answer.headers["access-control-allow-origin"] == PAGE
    assert answer.headers["access-control-expose-headers"] == "X-Request-Id, Retry-After"


def test_the_schema_knows_the_answers_of_what_watches_a_server(client: httpx.Client) -> None:
    """A generated client took a 503 of /ready for a fault, and asked for a key where none is needed."""
    paths = client.get("/openapi.json", headers={"x-api-key": "first"}).json()["paths"]
    known = {path: set(paths[path]["get"]["responses"]) for path in ("/v1/models", "/health", "/ready", "/metrics")}
    with_key, open_to_all = {"200", "401"}, {"200", "503"}
    assert known == {"/v1/models": with_key, "/health": open_to_all, "/ready": open_to_all, "/metrics": with_key}
