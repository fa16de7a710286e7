"""The picture of the page in docs/serving.md: `python -m tests.integration.screenshot FILE.png CHAT_DIR EMBEDDER_DIR`.

A server of these two models under 375 MB, four texts that were compared, and a chat of two questions.
"""

from __future__ import annotations

import sys
from pathlib import Path

from tests.integration.browser import browser
from tests.integration.test_serve import served

_PATIENCE_MS = 300_000
_SIZE = {"width": 1200, "height": 900}


def draw(target: Path, chat: Path, embedder: Path) -> None:
    """Write the picture."""
    from playwright.sync_api import expect

    with served(chat, embedder, "--budget", "375MB") as (address, _), browser() as started:
        page = started.new_page(viewport=_SIZE, color_scheme="light")
        page.set_default_timeout(_PATIENCE_MS)
        expect.set_options(timeout=_PATIENCE_MS)
        page.goto(address)
        page.locator("#tab-embeddings").click()
        page.locator("#embeddings button.main:enabled").click()
        expect(page.locator("table.cosines")).to_be_visible()
        page.locator("#tab-chat").click()
        for question in ("What is the capital of France?", "What is it known for? Answer in one sentence."):
            page.locator("#chat-text").fill(question)
            page.locator("#chat-text").press("Enter")
            expect(page.locator("#chat-send")).to_be_disabled()
            expect(page.locator("#chat-send")).to_be_enabled()
        # The machine as it is when the last sweep has ended.
        sweeps = [model["sweep"]["number"] for model in page.request.get(f"{address}/machine").json()["models"]]
        for model, number in zip(page.locator("#machine section.model").all(), sweeps, strict=True):
            expect(model.locator("h4").first).to_contain_text(f"Agents in sweep {number},")
        page.screenshot(path=target, full_page=True)


if __name__ == "__main__":
    draw(*map(Path, sys.argv[1:]))
