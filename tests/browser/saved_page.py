"""A widget's page: what is drawn on it, once it is drawn."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from playwright.sync_api import Page

NEXT_FRAME = "() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))"


def picture(page: Page) -> str:
    page.evaluate(NEXT_FRAME)
    return page.evaluate("document.querySelector('canvas').toDataURL()")


def said(page: Page, where: str = ".said") -> str:
    """What the page says there, once the frame is drawn."""
    page.evaluate(NEXT_FRAME)
    return page.inner_text(where)


def choose(page: Page, **controls: float) -> None:
    """Set controls by their class: a slider to a number, a list to one of its values."""
    for name, value in controls.items():
        script = """([name, value]) => {
            const control = document.querySelector('.' + name);
            control.value = value;
            control.dispatchEvent(new Event(control.tagName === 'SELECT' ? 'change' : 'input', { bubbles: true }));
        }"""
        page.evaluate(script, [name, value])
