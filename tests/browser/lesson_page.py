"""A lesson in a browser: opened, run and worked as a person would, with a list of all that is wrong with it."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lab_server import JupyterLab
from playwright.sync_api import BrowserContext, ElementHandle, Error

SCRIPT = Path(__file__).with_suffix(".js").read_text(encoding="utf-8")
NOISE = re.compile("ResizeObserver loop")  # says that a layout took two frames
OPENS, RUNS, DRAWS = 120, 240, 15  # seconds for JupyterLab's page, for Run All, and until every widget has drawn
QUIET, PLAYERS_STEP = 300, 1500  # ms without a change: a picture at rest; after a click, no player
OPTIONS = 8  # so many of a dropdown's options are chosen
Address = tuple[int, int]  # a widget of the page, and a control of that widget


class LessonPage:
    """`examine()` fills `problems` (one line each: cell, control, what) and `controls` (those that it moved)."""

    def __init__(
        self, context: BrowserContext, lab: JupyterLab, notebook: str, screenshots: Path | None, patience: int = 4000
    ) -> None:
        self.lab, self.notebook, self.screenshots = lab, notebook, screenshots
        self.patience = patience  # ms, the kernel idle, in which a picture must change or come to rest
        self.problems: list[str] = []
        self.controls: list[str] = []
        self.page = context.new_page()
        self.doing = "while the lesson ran"
        self.page.on("pageerror", self._script_failed)
        self.page.on("request", self._stay_here)

    def examine(self) -> LessonPage:
        try:
            self._open()
            self._run()
            self._shoot("run")
            self._move_all()
            self._shoot("moved")
        except (Error, TimeoutError) as error:
            self._problem(f"stopped: {str(error)[:500]}")
            if self.screenshots is not None:
                self.page.screenshot(path=self._file("stopped"))
        finally:
            self.page.close()
            self.lab.stop_kernels()
        return self

    # The lesson

    def _open(self) -> None:
        self.page.goto(self.lab.url(self.notebook), timeout=OPENS * 1000)
        self.page.wait_for_function("() => window.jupyterapp?.shell?.currentWidget", timeout=OPENS * 1000)
        self.page.add_script_tag(content=SCRIPT)
        self._until(lambda: self._state()["ready"], OPENS, "the notebook's kernel is not ready")
        self._js("watch")

    def _run(self) -> None:
        # Not awaited in the page, so that a cell that never ends is not waited for without end.
        self.page.evaluate("() => { lesson.runAll().finally(() => { window.lessonDone = true; }); }")
        ended = "() => window.lessonDone && lesson.idle()"
        self._until(lambda: self.page.evaluate(ended), RUNS, "Run All has not ended")
        self._until(lambda: not self._js("faults"), DRAWS)
        for problem in self._js("ran"):
            self._problem(problem)
        self._errors()

    def _state(self) -> dict[str, Any]:
        state = self._js("state")
        if state["dialog"]:
            raise TimeoutError(f"JupyterLab asks: {state['dialog']}")
        return state

    # Its controls

    def _move_all(self) -> None:
        """Each control must change its picture: at once or, as Back does only after Next, when all others moved."""
        idle = {address: why for address in self._addresses() if (why := self._move(*address))}
        for address in idle:
            if why := self._move(*address):
                self._problem(f"{self._name(*address)}: {why}")
        # Last, for one slider's end may leave the others nothing to do: the ends, where callbacks are wont to raise.
        for address in self._addresses():
            it = self._js("describe", *address)
            if it["kind"] == "slider" and it["visible"] and not it["disabled"]:
                self.doing = self._name(*address)
                self._js("show", *address)
                for key in ("End", "Home"):
                    self.page.keyboard.press(key)
                    self._calm(address[0], QUIET)
                self._errors()

    def _addresses(self) -> Iterator[Address]:
        for widget in range(len(self._js("counts"))):
            control = 0
            while control < self._js("counts")[widget]:  # a click may have brought more of them
                yield widget, control
                control += 1

    def _name(self, *address: int) -> str:
        it = self._js("describe", *address)
        return f'{it["cell"]}, {it["kind"]} "{it["name"]}"'

    def _move(self, *address: int) -> str | None:
        """Moves a control about and, where it can, back. Returns why it does not count as moving its picture."""
        if address[1] >= self._js("counts")[address[0]]:
            return None  # it was one of those that come and go
        it = self._js("describe", *address)
        if not it["visible"]:
            return None  # nor is there one for the reader
        for reason, holds in {
            "never switched on": it["disabled"],
            "always chosen": it["chosen"],
        }.items():
            if holds:
                return reason
        self.doing = name = self._name(*address)
        quiet = PLAYERS_STEP if it["kind"] == "button" else QUIET
        self.page.mouse.move(1, 1)  # a picture under the mouse may change for that alone
        self._js("show", *address)
        before = self._calm(address[0], QUIET)
        changed, first = False, True
        try:
            for move in self._moves(name, it, address):
                move()
                moved = first and before["enough"] and self._js("changes", address[0], before["look"], self.patience)
                after = self._js("rest", address[0], quiet, self.patience)
                if before["enough"]:
                    changed |= after["look"] != before["look"] or (moved and not after["enough"])
                else:
                    changed |= after["enough"]  # to bring a moving picture to rest is a change as well
                if not after["enough"]:  # it started a player
                    after = self._calm(address[0], quiet)
                if not after["enough"] and before["enough"] and it["kind"] == "button":
                    move()  # which has no other button to stop it
                    after = self._js("rest", address[0], quiet, self.patience)
                before, first = after, False
        except Error as error:
            self._problem(f"{name}: cannot be moved: {str(error).splitlines()[0]}")
        self._errors()
        if name not in self.controls:
            self.controls.append(name)
        if changed:
            return None
        return "no picture of its widget changed" if before["enough"] else "its picture moves by itself all the time"

    def _calm(self, widget: int, quiet: int) -> dict[str, Any]:
        """The widget's picture at rest; one that plays is stopped by its own pause button, where it has one."""
        seen = self._js("rest", widget, quiet, self.patience)
        pause = None if seen["enough"] else self._js("pause", widget)
        if pause is None:
            return seen
        self._element((widget, pause)).click(timeout=5000)
        return self._js("rest", widget, quiet, self.patience)

    def _moves(self, name: str, it: dict[str, Any], address: Address) -> Iterator[Callable[[], Any]]:
        press = self.page.keyboard.press
        if it["kind"] == "slider":
            there, back = ("ArrowLeft", "ArrowRight") if it["atMax"] else ("ArrowRight", "ArrowLeft")
            yield lambda: press(there)
            if self._js("value", *address) == it["value"]:
                self._problem(f"{name}: the arrow keys do not move it")
            yield lambda: press(back)
        elif it["kind"] == "dropdown":
            steps = [*range(1, it["options"])][:OPTIONS]
            for step in [*steps, 0]:
                option = (it["selected"] + step) % it["options"]
                yield lambda option=option: self._element(address).select_option(index=option, timeout=5000)
        elif it["kind"] in ("button", "radio"):
            yield lambda: self._element(address).click(timeout=5000)
        elif it["kind"] == "checkbox":
            yield lambda: self._element(address).click(timeout=5000)
            yield lambda: self._element(address).click(timeout=5000)
        elif it["kind"] == "number":
            yield lambda: (press("ArrowUp"), press("Tab"))
            yield lambda: (self._js("show", *address), press("ArrowDown"), press("Tab"))
        elif it["kind"] == "text":
            yield lambda: (press("Control+End"), self.page.keyboard.type(" zebra 12"), press("Tab"))
            yield lambda: (self._element(address).fill(it["value"]), press("Tab"))
        else:
            self._problem(f"{name}: these tests know no way to move it")

    def _element(self, address: Address) -> ElementHandle:
        element = self.page.evaluate_handle("([w, i]) => lesson.element(w, i)", list(address)).as_element()
        if element is None:
            raise Error("it has gone")
        return element

    # What both need

    def _js(self, function: str, *args: Any) -> Any:
        return self.page.evaluate("([name, args]) => lesson[name](...args)", [function, list(args)])

    def _until(self, condition: Callable[[], bool], seconds: float, failure: str = "") -> None:
        end = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > end:
                if failure:
                    raise TimeoutError(f"{failure} after {seconds} s")
                return
            self.page.wait_for_timeout(150)

    def _errors(self) -> None:
        for error in self._js("errors"):
            self._problem(f"{self.doing}: a callback raised {error}")
        for fault in self._js("faults"):
            self._problem(fault)

    def _script_failed(self, error: Error) -> None:
        if not NOISE.search(str(error)):
            self._problem(f"{self.doing}: a script raised {error}")

    def _problem(self, problem: str) -> None:
        if problem not in self.problems:
            self.problems.append(problem)

    def _stay_here(self, request: Any) -> None:
        if request.url.startswith("http") and not request.url.startswith(self.lab.address):
            self._problem(f"{self.doing}: asks the network for {request.url[:150]}")

    def _file(self, what: str) -> Path:
        return self.screenshots / f"{Path(self.notebook).stem}-{what}.png"

    def _shoot(self, what: str) -> None:
        """The whole lesson, one picture for each screenful, where somebody is to look at them."""
        if self.screenshots is None:
            return
        y, last, number = 0, -1, 1
        while (scrolled := self._js("scroll", y))[0] > last:
            last, height = scrolled
            self.page.wait_for_timeout(150)
            self.page.screenshot(path=self._file(f"{what}-{number:02d}"))
            y, number = last + height - 60, number + 1
