"""Draw docs/playground.png: a race on the playground of a running server, in a headless browser.

outrider serve smollm2 --drafter dspark --policy fixed --draft-tokens 3
python docs/screenshot.py http://localhost:8000 [docs/playground.png]
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from playwright.sync_api import Page, expect, sync_playwright

PATIENCE = 120_000  # milliseconds
PROMPT = "Write a Python function that adds the numbers from 1 to n, and explain each line."


def race(page: Page, address: str) -> str:
    """Chat, then race; what the page says of the race."""
    page.goto(address)
    page.select_option("#theme", "light")
    page.fill("#max_tokens", "40")
    page.fill("#prompt", "Name three colours.")
    page.press("#prompt", "Control+Enter")
    page.wait_for_selector("#status:has-text('Answer complete')", state="attached", timeout=PATIENCE)
    expect(page.locator("#log .token.draft").first).to_be_visible()
    page.reload()
    page.select_option("#theme", "light")
    page.fill("#max_tokens", "120")
    page.fill("#temperature", "0")
    page.fill("#prompt", PROMPT)
    page.click("#race")
    page.wait_for_selector(".result", timeout=PATIENCE)
    texts = [page.locator(".race .text").nth(i).inner_text() for i in (0, 1)]
    assert texts[0] == texts[1] != "", "speculation changed the text"
    page.locator(".race .token.draft").first.hover()
    return page.inner_text(".result")


def main() -> None:
    address = sys.argv[1] if len(sys.argv) > 1 else "http://localhost:8000"
    out = Path(sys.argv[2]) if len(sys.argv) > 2 else Path(__file__).with_name("playground.png")
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1180, "height": 900})
        faults: list[str] = []
        page.on("pageerror", lambda error: faults.append(str(error)))
        print(race(page, address))
        page.screenshot(path=out)
        browser.close()
    if faults:
        raise SystemExit("\n".join(faults))


if __name__ == "__main__":
    main()
