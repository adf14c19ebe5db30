"""The load generator: what it measures on a server that runs beside it, and on figures worked out by hand."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from time import perf_counter
from typing import Any

import pytest
from served import drafting, serving
from typer.testing import CliRunner

from outrider.cli import app
from outrider.engine.llm import LLM
from outrider.errors import InvalidRequest, OutriderError
from outrider.evaluation import load as load_module
from outrider.evaluation.load import Load, run_load, summary
from outrider.evaluation.load_client import LoadClient, Timed
from outrider.evaluation.plots import available

PROMPTS = ["It was", "def add(a, b):\n    return a"]


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with serving(drafting(), max_requests=3) as (found, _):
        yield found


def test_figures_by_hand() -> None:
    """Two answers; the second one ends after the measurement, and half of it counts."""
    spec = {"rounds": 4, "drafted": 12, "accepted": 6}
    one = Timed(sent=10.0, chunks=[10.1, 10.2, 10.4], ended=10.4, tokens=9, speculative=spec)
    two = Timed(sent=11.0, chunks=[11.5, 12.5], ended=12.5, tokens=4, speculative=spec)
    failed = Timed(sent=11.0, chunks=[11.05], ended=11.1, error="HTTP 429")
    row = summary("p", Load(PROMPTS, False, 2.0, 2), [one, two, failed], 10.0, 12.0)
    assert row.tokens_per_second == (9 + 2) / 2
    assert row.per_user_tokens_per_second == pytest.approx((8 / 0.3 + 3 / 1.0) / 2, abs=0.01)
    assert row.ttft_ms == pytest.approx(300) and row.itl_p50_ms == pytest.approx(200)
    assert row.acceptance_length == 1 + 12 / 8 and row.verified_per_row == 3
    assert (row.requests, row.errors, row.first_error) == (2, 1, "HTTP 429")
    warm = Timed(sent=9.0, chunks=[9.8, 10.8], ended=10.8, tokens=6)  # of the warm-up, but for half of its tokens
    again = summary("p", Load(PROMPTS, False, 2.0, rate=1.5), [warm, one, two, failed], 10.0, 12.0)
    assert (again.tokens_per_second, again.concurrency) == pytest.approx((14 / 2, (0.8 + 0.4 + 1.0 + 0.1) / 2))
    assert (again.requests, again.ttft_ms, again.itl_p50_ms) == (2, row.ttft_ms, row.itl_p50_ms)
    assert again.per_user_tokens_per_second == row.per_user_tokens_per_second


class Instant(LoadClient):
    """Answers at once; holds what was asked, and when."""

    def __init__(self) -> None:
        super().__init__("http://localhost", "m")
        self.asked: list[str] = []

    async def ask(self, prompt: str, options: Mapping[str, Any], *, chat: bool) -> Timed:
        self.asked.append(prompt)
        await asyncio.sleep(0.001)
        now = perf_counter()
        return Timed(sent=now, chunks=[now], ended=now, tokens=1)


def test_clients_share_out_the_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt that two clients ask at once would be read once, from the server's cache."""
    monkeypatch.setattr(load_module, "WARM_UP", 0.0)
    prompts = [str(n) for n in range(10_000)]
    for load in (Load(prompts, False, 0.05, 3), Load(prompts, False, 0.05, rate=300.0)):
        client = Instant()
        done, start, end = asyncio.run(run_load(client, load))
        assert len(done) == len(set(client.asked)) == len(client.asked) > 3
        assert end - start == pytest.approx(0.05)


@pytest.mark.parametrize("load", [Load(PROMPTS, False, 0.5, 2), Load(PROMPTS, True, 0.5, rate=12.0)], ids=str)
def test_a_load_on_a_server(url: str, load: Load) -> None:
    options = {"max_tokens": 12, "temperature": 0}
    load = Load(load.prompts, load.chat, load.duration, load.concurrency, load.rate, options)
    done, start, end = asyncio.run(run_load(LoadClient(url), load))
    row = summary("own", load, done, start, end)
    assert row.requests > 2 and row.tokens_per_second > 0 and row.ttft_ms > 0
    answered = [one for one in done if not one.error]
    assert all(0 < one.tokens <= 12 and one.speculative is not None for one in answered)
    assert all(one.sent <= one.chunks[0] <= one.chunks[-1] <= one.ended for one in answered)
    if load.rate is None:
        assert row.errors == 0


def test_refusals_are_counted_and_dead_servers_named(url: str) -> None:
    crowd = Load(PROMPTS, False, 0.1, 6, None, {"max_tokens": 60})
    done, *_ = asyncio.run(run_load(LoadClient(url), crowd))
    assert any("HTTP 429" in one.error for one in done) and any(not one.error for one in done)
    with pytest.raises(OutriderError, match="gave no model"):
        asyncio.run(run_load(LoadClient("http://127.0.0.1:1"), crowd))
    with pytest.raises(InvalidRequest, match="--url"):
        LoadClient("localhost")


@pytest.mark.parametrize("key", ["", "wrong"])
def test_a_server_with_keys_asks_for_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    (tmp_path / "keys").write_text("right\n")
    load = Load(PROMPTS, False, 0.1, 1, None, {"max_tokens": 2})
    with serving(LLM("embedded", "none"), api_key_file=str(tmp_path / "keys")) as (url, _):
        monkeypatch.setenv("OPENAI_API_KEY", key)
        with pytest.raises(OutriderError, match="asks for an API key .*OPENAI_API_KEY"):
            asyncio.run(run_load(LoadClient(url), load))
        monkeypatch.setenv("OPENAI_API_KEY", "right")
        assert not asyncio.run(run_load(LoadClient(url), load))[0][0].error


def test_the_command(url: str, tmp_path: Path) -> None:
    file, plot = tmp_path / "load.json", tmp_path / "load.png"
    options = ["--url", url, "--concurrency", "1,2", "--duration", "0.2", "--no-chat", "--max-tokens", "8"]
    result = CliRunner().invoke(app, ["bench", *options, "--json", str(file), "--plot", str(plot)])
    assert result.exit_code == 0, result.output
    rows = json.loads(file.read_text())["rows"]
    assert [row["concurrency"] for row in rows] == [1, 2] and plot.stat().st_size > 1000
    crowd = CliRunner().invoke(app, ["bench", *options, "--concurrency", "6"])
    assert crowd.exit_code == 0 and re.search(r"server, 6 users: \d+ failed, first HTTP 429: .*busy", crowd.output)
    wrong = CliRunner().invoke(app, ["bench", "--url", url, "--load", "open"])
    assert wrong.exit_code == 2 and "--rate" in wrong.output


@pytest.mark.slow
def test_each_policy_has_a_server_of_its_own(tmp_path: Path) -> None:
    file = tmp_path / "load.json"
    options = ["--policies", "none,fixed:2", "--drafter", "draft_model", "--duration", "0.5", "--max-tokens", "16"]
    result = CliRunner().invoke(app, ["bench", "--load", "closed", *options, "--json", str(file)])
    assert result.exit_code == 0, result.output
    none, fixed = json.loads(file.read_text())["rows"]
    assert (none["policy"], fixed["policy"]) == ("none", "fixed:2")
    assert none["verified_per_row"] == 0 and 1 < fixed["verified_per_row"] <= 2, "no guard stops what is compared"
    wrong = CliRunner().invoke(app, ["bench", "--load", "closed", "--policies", "fixd"])
    assert wrong.exit_code == 2 and "did you mean 'fixed'" in " ".join(wrong.output.split())


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("--rate", "1"), "--rate belongs to a load"),
        (("--plot", "x.png"), "--plot belongs to a load"),
        (("--policies", "fixed:3"), "--policies belongs to a load"),
        (("--load", "closed", "--policies", ","), "--policies names none"),
        (("--load", "closed", "--plot", "x.foo"), "files ending in .foo" if available() else "needs matplotlib"),
        (("--load", "closed", "--plot", "nowhere/x.png"), "--plot: cannot write nowhere/x.png"),
        (("--url", "http://localhost:9", "--policies", "fixed:3"), "--policies cannot be set for a server"),
        (("--url", "http://localhost:9", "--drafter", "ngram"), "--drafter cannot be set for a server"),
        (("--duration", "5"), "--duration belongs to a load"),
        (("--load", "closed", "--rate", "1"), "--rate is of an open load"),
        (("--load", "closed", "--concurrency", "2.5"), "--concurrency: expected whole numbers above 0"),
        (("--load", "closed", "--concurrency", "0.5"), "--concurrency: expected whole numbers above 0"),
        (("--load", "closed", "--concurrency", ""), "--concurrency: expected whole numbers above 0"),
        (("--url", "localhost:8000"), "expected an address like http://localhost:8000, got 'localhost:8000'"),
        (("--url", "http://localhost:x"), "expected an address like http://localhost:8000, got 'http://localhost:x'"),
    ],
)
def test_options_of_a_load_are_not_ignored(given: tuple[str, ...], said: str) -> None:
    result = CliRunner().invoke(app, ["bench", *given])
    assert result.exit_code == 2 and said in result.stderr


def test_help_of_measurements_offers_no_zero_drafts() -> None:
    for command in ("eval", "calibrate"):
        assert "drafts none" not in " ".join(CliRunner().invoke(app, [command, "--help"]).stdout.split())
