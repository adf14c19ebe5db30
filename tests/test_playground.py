"""The playground page: whole in itself, and in a headless browser (skipped without one) on a model's own answers."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from importlib.resources import files
from typing import Any

import pytest
from served import drafting, serving

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


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with serving(drafting()) as (url, _):
        yield f"{url}/"


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
def asked() -> list[dict[str, Any]]:
    """The bodies that the page sent."""
    return []


@pytest.fixture
def page(browser: Any, address: str, asked: list[dict[str, Any]]) -> Iterator[Any]:
    context = browser.new_context()
    shown = context.new_page()
    faults: list[str] = []
    elsewhere: list[str] = []

    def sees(request: Any) -> None:
        if request.method == "POST":
            asked.append(request.post_data_json)
        if not request.url.startswith((address, "data:")):
            elsewhere.append(request.url)

    shown.on("pageerror", lambda error: faults.append(str(error)))
    shown.on("request", sees)
    shown.goto(address)
    yield shown
    context.close()
    assert not faults and not elsewhere


def answered(page: Any) -> None:
    page.wait_for_selector("#status:has-text('Answer complete')", state="attached", timeout=30_000)


def test_it_chats_and_shows_where_tokens_come_from(page: Any, asked: list[dict[str, Any]]) -> None:
    page.wait_for_selector("text=embedded, drafter suffix")
    page.fill("#max_tokens", "60")
    page.fill("#prompt", "one two three one two three one two")
    page.press("#prompt", "Control+Enter")
    answered(page)
    tokens = page.locator("#log .token")
    assert page.locator("#log .token.draft").count() > 0 and page.locator("#log .token.bonus").count() > 0
    assert abs(tokens.count() - int(page.inner_text("#tokens"))) <= 1, "all but an end-of-text token"
    assert float(page.inner_text("#speed")) > 0 and " of " in page.inner_text("#accepted")
    assert "percent" in page.get_attribute("#bars", "aria-label")
    page.wait_for_selector("#running:text-is('0')", timeout=5_000)
    page.locator(".message.answer .text").focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert tokens.nth(1).evaluate("one => one.classList.contains('chosen')")
    assert "token" in page.inner_text("#detail") and "probability" in page.inner_text("#tip")
    assert asked[0]["outrider"] == {"pieces": True} and asked[0]["stream"] is True
    page.fill("#prompt", "and then")
    page.click("#send")
    page.locator(".message.answer").nth(1).wait_for()
    page.wait_for_selector("#send:not([disabled])", timeout=30_000)
    assert [one["role"] for one in asked[1]["messages"]] == ["user", "assistant", "user"]


def test_it_races_and_completes(page: Any, asked: list[dict[str, Any]]) -> None:
    page.click("#tab-completion")
    page.fill("#max_tokens", "30")
    page.fill("#temperature", "1")
    page.fill("#prompt", "a b c a b c a b c")
    page.click("#race")
    page.wait_for_selector(".result", timeout=30_000)
    assert "both texts are equal" in page.inner_text(".result")
    plain, fast = asked
    assert plain["outrider"]["off"] is True and "off" not in fast["outrider"] and plain["seed"] == fast["seed"]
    assert page.locator(".race .message:nth-child(1) .token.draft").count() == 0
    texts = [page.locator(".race .text").nth(i).inner_text() for i in (0, 1)]
    assert texts[0] == texts[1] != ""


def test_it_stops(page: Any) -> None:
    page.fill("#max_tokens", "1500")
    page.fill("#prompt", "count: 1 2 3")
    page.click("#send")
    page.wait_for_selector("#log .token")
    page.keyboard.press("Escape")
    page.wait_for_selector("#send:not([disabled])", timeout=5_000)
    assert page.inner_text("#error") == ""


def test_it_gets_along_with_servers_that_know_less_and_shows_their_errors(page: Any, asked: list[Any]) -> None:
    def older(route: Any) -> None:
        if "pieces" in (route.request.post_data_json.get("outrider") or {}):
            route.fulfill(status=400, json={"error": {"message": "outrider.pieces: unknown field"}})
        else:
            route.continue_()

    page.route("**/v1/chat/completions", older)
    page.fill("#max_tokens", "8")
    page.fill("#prompt", "abc")
    page.click("#send")
    answered(page)
    assert len(asked) == 2 and "outrider" not in asked[1]
    assert page.locator("#log .token").count() > 0 and page.locator("#log .token.draft").count() == 0
    page.fill("#max_tokens", "99999")
    page.fill("#prompt", "fail")
    page.click("#send")
    page.wait_for_selector("text=together they pass the context")
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
