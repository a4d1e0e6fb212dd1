"""One JupyterLab for the session, pages in the browser of each file of tests."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from lab_server import LESSONS, JupyterLab

if TYPE_CHECKING:
    from lesson_page import LessonPage
    from playwright.sync_api import Browser, BrowserContext, Page


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("browser")
    group.addoption("--all-lessons", action="store_true", help="open every lesson in the browser, not two of them")
    group.addoption("--screenshots", type=Path, metavar="DIR", help="keep the browser's screenshots in this folder")


@pytest.fixture(scope="module")
def browser_context(browser: Browser) -> BrowserContext:
    return browser.new_context(viewport={"width": 1280, "height": 900}, locale="en-US")


@pytest.fixture
def file_page(browser_context: BrowserContext) -> Iterator[Page]:
    """A page for files of this machine; an error on it, or a request that leaves them, fails the test."""
    page, wrong = browser_context.new_page(), []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("request", lambda request: None if request.url.startswith("file:") else wrong.append(request.url))
    yield page
    page.close()
    assert not wrong


@pytest.fixture(scope="session")
def lab(chromium: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[JupyterLab]:
    """JupyterLab on a copy of lessons/; it asks for `chromium` first, for without one it is of no use."""
    root = tmp_path_factory.mktemp("lab") / "lessons"
    shutil.copytree(LESSONS, root, ignore=shutil.ignore_patterns(".*", "__pycache__"))
    lab = JupyterLab(root, tmp_path_factory.mktemp("jupyter"))
    yield lab
    lab.close()


@pytest.fixture(scope="session")
def screenshots(request: pytest.FixtureRequest) -> Path | None:
    """The folder for pictures, if they were asked for."""
    folder = request.config.getoption("screenshots", default=None)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture(scope="module")
def examine(browser_context: BrowserContext, lab: JupyterLab, screenshots: Path | None) -> Callable[..., LessonPage]:
    """Opens a notebook of the lab's folder, runs it and moves every control."""
    from lesson_page import LessonPage

    return lambda notebook, **options: LessonPage(browser_context, lab, notebook, screenshots, **options).examine()
