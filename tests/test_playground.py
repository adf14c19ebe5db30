"""The playground page: whole in itself, and in a headless browser (skipped without one) on a model's own answers."""

from __future__ import annotations

import json
import re
import shutil
import threading
from collections.abc import Iterator
from html.parser import HTMLParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from typing import Any

import pytest

from outrider import LLM, SamplingParams

PAGE = files("outrider.serving").joinpath("playground.html").read_text(encoding="utf-8")
VOID = ("meta", "link", "input", "br")


class _Elements(HTMLParser):
    """All elements, and whether each stands in a label."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None], bool]] = []
        self._open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs), "label" in self._open))
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag, f"</{tag}> closes something else"


@pytest.fixture(scope="module")
def elements() -> list[tuple[str, dict[str, str | None], bool]]:
    parser = _Elements()
    parser.feed(PAGE)
    assert not parser._open
    return parser.found


def test_the_page_asks_nobody_else(elements: list[Any]) -> None:
    assert not re.search(r"https?:|//[a-z]|@import|url\(", PAGE), "a request to somewhere else"
    for tag, attributes, _ in elements:
        assert "src" not in attributes and tag not in ("iframe", "object", "embed")
        assert attributes.get("href", "#").startswith(("#", "data:")), attributes
    assert set(re.findall(r"fetch\(([^,)]+)", PAGE)) == {"path", '"/v1/models"', '"/metrics"'}


def test_every_control_has_a_name_and_every_name_an_element(elements: list[Any]) -> None:
    ids = [attributes["id"] for _, attributes, _ in elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    named = {attributes["for"] for tag, attributes, _ in elements if tag == "label" and "for" in attributes}
    for tag, attributes, labelled in elements:
        if tag in ("input", "select", "textarea"):
            assert labelled or attributes.get("id") in named or "aria-label" in attributes, attributes
        for name in ("aria-controls", "aria-labelledby", "aria-describedby", "for"):
            assert attributes.get(name, ids[0]) in ids, attributes
    used = set(re.findall(r"""\$\(["'`]([a-z_-]+)["'`]\)""", PAGE)) | set(re.findall(r'put\("([a-z]+)"', PAGE))
    assert used <= set(ids), used - set(ids)
    assert {"max_tokens", "temperature", "top_p", "seed"} <= set(ids)


# ------------------------------------------------------------------------------------------------ in a browser


class _Handler(BaseHTTPRequestHandler):
    """What the page needs of a server: chunks of a model's own events."""

    llms: dict[bool, LLM]
    asked: list[dict[str, Any]]
    knows_pieces = True

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _send(self, body: bytes, kind: str, status: int = 200) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        if self.path == "/":
            self._send(PAGE.encode(), "text/html; charset=utf-8")
        elif self.path == "/v1/models":
            self._send(b'{"data": [{"id": "embedded", "drafter": "suffix"}]}', "application/json")
        else:
            self._send(b"outrider_num_requests_running 1.0\noutrider_verify_tokens_per_step 5.0\n", "text/plain")

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append(body)
        extra = body.get("outrider", {})
        if "pieces" in extra and not self.knows_pieces:
            self._send(b'{"error": {"message": "outrider.pieces: unknown field"}}', "application/json", 400)
            return
        prompt = body["prompt"] if "prompt" in body else body["messages"][-1]["content"]
        if prompt == "fail":
            self._send(b'{"error": {"message": "the prompt is not liked"}}', "application/json", 400)
            return
        run = self.llms[bool(extra.get("off"))].run(
            prompt,
            SamplingParams(max_tokens=body["max_tokens"], temperature=body["temperature"], seed=body.get("seed")),
        )
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        for event in run.events():
            pieces = [
                {"token_id": piece.token_id, "text": piece.text, "drafted": piece.drafted, "probability": 0.5}
                for piece in event.pieces
            ]
            choice: dict[str, Any] = {"delta": {"content": event.text}, "finish_reason": event.finish_reason}
            if "prompt" in body:
                choice = {"text": event.text, "finish_reason": event.finish_reason}
            if extra.get("pieces"):
                choice["outrider"] = {"pieces": pieces}
            self._event({"choices": [choice]})
        stats = run.output().stats
        counts = {name: getattr(stats, name) for name in ("rounds", "drafted", "accepted", "acceptance_length")}
        for name in ("drafted_per_position", "accepted_per_position"):
            counts[name] = getattr(stats, name)
        self._event({"choices": [], "usage": {"completion_tokens": stats.generated, "speculative": counts}})
        self.wfile.write(b"data: [DONE]\n\n")

    def _event(self, value: Any) -> None:
        self.wfile.write(f"data: {json.dumps(value)}\n\n".encode())
        self.wfile.flush()


@pytest.fixture(scope="module")
def handler() -> Iterator[type[_Handler]]:
    plain = LLM(drafter="none")

    class Handler(_Handler):
        llms = {True: plain, False: plain.with_drafter("suffix")}
        asked: list[dict[str, Any]] = []

    yield Handler


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    with playwright.sync_playwright() as driver:
        try:
            found = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        except playwright.Error as error:
            pytest.skip(f"no browser: {error}")
        yield found
        found.close()


@pytest.fixture
def page(browser: Any, handler: type[_Handler]) -> Iterator[Any]:
    handler.asked.clear()
    handler.knows_pieces = True
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    context = browser.new_context()
    shown = context.new_page()
    faults: list[str] = []
    elsewhere: list[str] = []
    base = f"http://127.0.0.1:{server.server_port}/"
    shown.on("pageerror", lambda error: faults.append(str(error)))
    shown.on("request", lambda request: None if request.url.startswith(base) else elsewhere.append(request.url))
    shown.goto(base)
    yield shown
    context.close()
    server.shutdown()
    thread.join()
    server.server_close()
    assert not faults and not [url for url in elsewhere if not url.startswith("data:")]


def test_it_chats_and_shows_where_tokens_come_from(page: Any, handler: type[_Handler]) -> None:
    page.wait_for_selector("text=embedded, drafter suffix")
    page.fill("#max_tokens", "40")
    page.fill("#prompt", "one two three one two three one two")
    page.press("#prompt", "Control+Enter")
    page.wait_for_function(
        "document.getElementById('status').textContent.startsWith('Answer complete')", timeout=20_000
    )
    assert page.locator("#log .token.draft").count() > 0 and page.locator("#log .token.bonus").count() > 0
    assert page.locator("#log .token").count() == int(page.inner_text("#tokens"))
    assert float(page.inner_text("#speed")) > 0 and " of " in page.inner_text("#accepted")
    assert "percent" in page.get_attribute("#bars", "aria-label")
    assert page.inner_text("#running") == "1"
    page.locator(".message.answer .text").focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert page.locator("#log .token").nth(1).evaluate("one => one.classList.contains('chosen')")
    assert "token" in page.inner_text("#detail") and "50.0 %" in page.inner_text("#tip")
    assert handler.asked[0]["outrider"] == {"pieces": True} and handler.asked[0]["stream"] is True
    page.fill("#prompt", "and then")
    page.click("#send")
    page.wait_for_function("document.querySelectorAll('.message.answer').length === 2")
    page.wait_for_selector("#send:not([disabled])", timeout=20_000)
    assert [one["role"] for one in handler.asked[1]["messages"]] == ["user", "assistant", "user"]


def test_it_races_and_completes(page: Any, handler: type[_Handler]) -> None:
    page.click("#tab-completion")
    page.fill("#max_tokens", "30")
    page.fill("#temperature", "1")
    page.fill("#prompt", "a b c a b c a b c")
    page.click("#race")
    page.wait_for_selector(".result", timeout=20_000)
    assert "both texts are equal" in page.inner_text(".result")
    plain, fast = handler.asked
    assert plain["outrider"]["off"] is True and "off" not in fast["outrider"] and plain["seed"] == fast["seed"]
    assert page.locator(".race .message").count() == 2
    texts = [page.locator(".race .text").nth(i).inner_text() for i in (0, 1)]
    assert texts[0] == texts[1] != ""


def test_it_gets_along_with_servers_that_know_less_and_shows_their_errors(page: Any, handler: type[_Handler]) -> None:
    handler.knows_pieces = False
    page.fill("#max_tokens", "8")
    page.fill("#prompt", "abc")
    page.click("#send")
    page.wait_for_function(
        "document.getElementById('status').textContent.startsWith('Answer complete')", timeout=20_000
    )
    assert page.locator("#log .token").count() > 0 and page.locator("#log .token.draft").count() == 0
    page.fill("#prompt", "fail")
    page.click("#send")
    page.wait_for_selector("text=the prompt is not liked")
    assert page.input_value("#prompt") == "fail", "a prompt that failed is not lost"


@pytest.mark.parametrize("colours", ["light", "dark"])
def test_colours_can_be_read_and_a_phone_shows_all(page: Any, colours: str) -> None:
    page.set_viewport_size({"width": 360, "height": 740})
    page.select_option("#theme", colours)
    width = page.evaluate("document.documentElement.scrollWidth")
    assert width <= 360, "it scrolls sideways"
    for chosen, back in (("--text", "--back"), ("--text", "--draft"), ("--text", "--bonus"), ("--muted", "--card")):
        pair = [
            page.evaluate(f"getComputedStyle(document.documentElement).getPropertyValue('{one}')")
            for one in (chosen, back)
        ]
        assert contrast(*pair) >= 4.5, (chosen, back)


def contrast(one: str, other: str) -> float:
    """WCAG 2.2's contrast ratio of two colours ``#rrggbb``."""

    def luminance(colour: str) -> float:
        parts = [int(colour.strip()[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    low, high = sorted([luminance(one), luminance(other)])
    return (high + 0.05) / (low + 0.05)
