"""A widget's page: what is drawn on it, once it is drawn."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from playwright.sync_api import Page

NEXT_FRAME = "() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))"


def picture(page: Page) -> str:
    page.evaluate(NEXT_FRAME)
    return page.evaluate("document.querySelector('canvas').toDataURL()")
