"""The shape microscope: what it says about a pattern is what numpy does, and what it draws is what it says."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex, to_rgba
from matplotlib.figure import Figure

from dsv3_mini.errors import UserError
from dsv3_mini.viz.figures.shapes import MOST, extent, ink, labels, operation_of, places, shape_figure, trace
from dsv3_mini.viz.style import COLOURS
from dsv3_mini.viz.widgets.page import EXPORT
from dsv3_mini.viz.widgets.shapes import MODULE, SPECIMENS, ShapeMicroscope, Specimen

# The same moves by numpy's reshape and transpose, without a pattern. `z` is a specimen's lengths.
BY_NUMPY: dict[str, Callable[[np.ndarray, dict[str, int]], np.ndarray]] = {
    "s (h q) -> h s q": lambda x, z: x.reshape(z["s"], z["h"], z["q"]).transpose(1, 0, 2),
    "s (q h) -> h s q": lambda x, z: x.reshape(z["s"], z["q"], z["h"]).transpose(2, 0, 1),
    "h s v -> s (h v)": lambda x, z: np.concatenate(list(x), axis=-1),
    "s d -> d s": lambda x, z: x.T,
    "b s d -> (b s) d": lambda x, z: np.concatenate(list(x)),
    "s (g m) -> s g": lambda x, z: np.stack([part.sum(1) for part in np.split(x, z["g"], axis=1)], axis=1),
    "s e -> e": lambda x, z: x.sum(0),
    "t r -> t h r": lambda x, z: np.stack([x] * z["h"], axis=1),
    "t (p two) -> t (two p)": lambda x, z: np.concatenate([x[:, 0::2], x[:, 1::2]], axis=1),
    "t (h two n) -> two t h n": lambda x, z: x.reshape(z["t"], z["h"], 2, z["n"]).transpose(2, 0, 1, 3),
    "t (two h n) -> two t h n": lambda x, z: np.stack([y.reshape(z["t"], z["h"], -1) for y in np.split(x, 2, axis=1)]),
}
each_specimen = pytest.mark.parametrize("specimen", SPECIMENS, ids=[specimen.name for specimen in SPECIMENS])


def by_numpy(specimen: Specimen) -> np.ndarray:
    before = specimen.move.before
    return BY_NUMPY[specimen.pattern](np.arange(before.count).reshape(before.lengths), specimen.sizes)


# ---- where elements go ----------------------------------------------------------------------------------------------


@each_specimen
def test_elements_go_where_numpy_takes_them(specimen: Specimen) -> None:
    move, right = specimen.move, by_numpy(specimen)
    assert move.after.lengths == right.shape
    assert [sum(move.sources(target)) for target in range(move.after.count)] == right.flatten().tolist()
    if move.operation != "reduce":
        for element in range(move.before.count):
            assert move.targets(element) == [tuple(at) for at in np.argwhere(right == element).tolist()]


@each_specimen
def test_every_element_goes_somewhere_and_no_place_stays_empty(specimen: Specimen) -> None:
    move = specimen.move
    assert sorted({source for source, _ in move.arrows}) == list(range(move.before.count))
    assert sorted({target for _, target in move.arrows}) == list(range(move.after.count))
    assert list(move.arrows) == sorted(move.arrows)


def test_letters_say_where_an_element_stands_on_each_axis() -> None:
    move = trace("s (h q) -> h s q", s=3, h=2, q=4)
    for element in range(24):
        s, h, q = (move.letters[letter][element] for letter in "shq")
        assert (s * 2 + h) * 4 + q == element
        assert move.targets(element) == [(h, s, q)]


def test_the_puzzles_of_lesson_01_have_these_answers() -> None:
    by_name = {specimen.name: specimen.move for specimen in SPECIMENS}
    assert by_name["split heads"].targets(13) == [(1, 1, 1)]
    assert by_name["split heads, letters swapped"].targets(13) == [(1, 1, 2)]
    assert by_name["one rope key for all heads"].targets(7) == [(1, 0, 3), (1, 1, 3)]


def test_the_pattern_says_which_operation_it_is() -> None:
    assert operation_of("s (h q) -> h s q") == "rearrange"
    assert operation_of("s d -> s 1") == "reduce"
    assert operation_of("s d -> s h d") == "repeat"
    assert trace("s d -> s 1", s=2, d=3).after.lengths == (2, 1)
    assert trace("s d ->", s=2, d=3).sources(0) == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("pattern", "sizes", "message"),
    [
        ("s d", {"s": 2, "d": 2}, "has no arrow"),
        ("s (h q) -> h s q", {"s": 2, "h": 2}, "needs the length of 'q'"),
        ("s d -> d d", {"s": 2, "d": 2}, "duplicate"),
        ("(s d -> d s", {"s": 2, "d": 2}, "parenthes"),
        ("s ... -> s", {"s": 2}, "draws every axis"),
        ("a b c d e -> e d c b a", dict.fromkeys("abcde", 1), "up to 4"),
        ("s d -> d s", {"s": 7, "d": 7}, f"{MOST} can be shown"),
        ("s -> s h", {"s": 8, "h": 8}, f"{MOST} can be shown"),
    ],
)
def test_a_pattern_that_cannot_be_shown_is_refused_in_a_line(pattern: str, sizes: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)) as error:
        trace(pattern, **sizes)
    assert "\n" not in str(error.value)


# ---- the still picture ----------------------------------------------------------------------------------------------


@each_specimen
def test_places_do_not_overlap_and_fill_the_extent(specimen: Specimen) -> None:
    for side in (specimen.move.before, specimen.move.after):
        at = places(side)
        apart = np.abs(at[:, None] - at[None]).max(-1) + np.eye(side.count)
        assert apart.min() >= 1
        assert (at.min(0) == 0).all()
        assert tuple(at.max(0) + 1) == extent(side)


def test_the_last_axis_runs_right_the_one_before_it_down_and_further_ones_make_blocks() -> None:
    side = trace("a b c d -> d c b a", a=2, b=2, c=2, d=3).before
    at = {side.index(element): tuple(place) for element, place in enumerate(places(side))}
    assert at[0, 0, 0, 1] == (1, 0)
    assert at[0, 0, 1, 0] == (0, 1)
    assert at[0, 1, 0, 0][0] > 3
    assert at[0, 1, 0, 0][1] == 0
    assert at[1, 0, 0, 0][1] > 2
    assert [label.text for label in labels(side)] == ["d: 3", "c: 2", "a=0, b=0", "a=0, b=1", "a=1, b=0", "a=1, b=1"]


def drawn(figure: Figure, side: str) -> tuple[dict[int, str], dict[int, Any]]:
    """The numbers and the squares of one side of the picture, by element."""
    axes = figure.axes[0]
    texts = {int(t.get_gid().split("-")[2]): t for t in axes.texts if str(t.get_gid()).startswith(f"text-{side}-")}
    boxes = {int(p.get_gid().split("-")[1]): p for p in axes.patches if str(p.get_gid()).startswith(f"{side}-")}
    for element, box in boxes.items():  # each number stands in the middle of its square
        middle = (box.get_x() + box.get_width() / 2, box.get_y() + box.get_height() / 2)
        assert texts[element].get_position() == pytest.approx(middle)
    return {element: text.get_text() for element, text in texts.items()}, boxes


@each_specimen
def test_the_picture_shows_what_numpy_computes(specimen: Specimen) -> None:
    numbers, boxes = drawn(shape_figure(specimen.move, "", specimen.colour), "after")
    assert [int(numbers[target]) for target in sorted(numbers)] == by_numpy(specimen).flatten().tolist()
    corner = np.array([boxes[0].get_x(), boxes[0].get_y()])
    for target, place in enumerate(places(specimen.move.after)):
        assert [boxes[target].get_x(), boxes[target].get_y()] == pytest.approx(list(corner + place))


def test_colours_follow_the_letter() -> None:
    move = SPECIMENS[0].move
    for letter in "shq":
        figure = shape_figure(move, "", letter)
        before, after = drawn(figure, "before")[1], drawn(figure, "after")[1]
        for source, target in move.arrows:
            colour = COLOURS[move.letters[letter][source]]
            assert to_hex(after[target].get_facecolor()) == colour.lower()
            assert to_hex(before[source].get_facecolor()) == colour.lower()  # paler, by its alpha


def test_halfway_the_moved_have_arrived_and_the_others_have_not() -> None:
    move = SPECIMENS[0].move
    figure = shape_figure(move, "", "h", moved=5)
    numbers, boxes = drawn(figure, "after")
    for source, target in move.arrows:
        assert numbers[target] == (str(source) if source < 5 else "")
        assert (boxes[target].get_facecolor() == to_rgba("none")) == (source >= 5)
        assert (drawn(figure, "before")[1][source].get_facecolor()[3] < 1) == (source < 5)
    arrows = [text for text in figure.axes[0].texts if text.get_gid() == "arrow"]
    assert len(arrows) == 1


def test_the_arrows_lead_to_where_the_last_one_went() -> None:
    move = next(specimen.move for specimen in SPECIMENS if specimen.name == "one rope key for all heads")
    figure = shape_figure(move, "", "t", moved=6)
    boxes = drawn(figure, "after")[1]
    goals = [target for source, target in move.arrows if source == 5]
    tips = [text.xy for text in figure.axes[0].texts if text.get_gid() == "arrow"]
    middle = [(boxes[goal].get_x() + 0.46, boxes[goal].get_y() + 0.46) for goal in goals]
    assert np.allclose(tips, middle)
    for moved in (0, None):
        assert not [t for t in shape_figure(move, "", "t", moved).axes[0].texts if t.get_gid() == "arrow"]


def test_a_sum_grows_as_its_elements_arrive() -> None:
    move = trace("s (g m) -> s g", s=1, g=2, m=3)
    totals = [drawn(shape_figure(move, "", "g", moved), "after")[0] for moved in range(7)]
    assert [total[0] for total in totals] == ["", "0", "1", "3", "3", "3", "3"]
    assert [total[1] for total in totals] == ["", "", "", "", "3", "7", "12"]


@each_specimen
def test_no_text_is_small_or_cut_off_or_upon_another(specimen: Specimen) -> None:
    figure = shape_figure(specimen.move, f"{specimen.name}:  {specimen.pattern}", specimen.colour, moved=3)
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw(renderer)
    width, height = figure.canvas.get_width_height()
    axes = figure.axes[0]
    texts = [text for text in (*axes.texts, axes.title, axes._left_title) if text.get_text()]
    boxes = [text.get_window_extent(renderer) for text in texts]
    for text, box in zip(texts, boxes, strict=True):
        assert text.get_fontsize() >= 11
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height, text
        assert not any(box.overlaps(other) for other in boxes if other is not box), text


def test_numbers_read_on_every_colour() -> None:
    def luminance(colour: str) -> float:
        channels = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgba(colour)[:3]]
        return float(np.dot([0.2126, 0.7152, 0.0722], channels))

    for colour in COLOURS:
        light, dark = sorted((luminance(colour), luminance(ink(colour))), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5, colour


# ---- the widget -----------------------------------------------------------------------------------------------------


def test_each_control_changes_the_picture() -> None:
    microscope = ShapeMicroscope()
    seen = [microscope.png()]
    for control in (dict(colour="q"), dict(moved=7), dict(pattern="merge heads"), dict(moved=3), dict(colour="v")):
        microscope.set(**control)
        seen.append(microscope.png())
    assert len(set(seen)) == len(seen)


def test_another_pattern_starts_from_the_beginning_with_its_own_colours() -> None:
    microscope = ShapeMicroscope()
    assert microscope.moved == 24
    microscope.set(pattern="t r -> t h r")  # a pattern names itself, too
    assert (microscope.specimen.name, microscope.moved, microscope.colour) == ("one rope key for all heads", 0, "t")


def test_what_the_page_sends_is_taken_in_one_piece() -> None:
    microscope = ShapeMicroscope()
    microscope.set_state({"moved": 0, "chosen": 5, "colour": "g"})
    microscope.set_state({"moved": 27})
    assert (microscope.specimen.name, microscope.moved) == ("sum over the experts of a group", 27)


@pytest.mark.parametrize(
    ("control", "message"),
    [({"pattern": "no such"}, "not in the list"), ({"colour": "z"}, "no letter"), ({"moved": 25}, "24 elements")],
)
def test_a_control_that_cannot_be_set_says_so(control: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ShapeMicroscope().set(**control)
    with pytest.raises(UserError, match="one Specimen or more"):
        ShapeMicroscope([])


def test_without_a_kernel_it_is_a_picture_and_a_sentence() -> None:
    microscope = ShapeMicroscope()
    microscope.set(moved=7)
    data, _ = microscope._repr_mimebundle_()
    picture = base64.b64decode(data["image/png"], validate=True)  # text, as a notebook holds it
    assert picture == microscope.png()
    assert picture[:4] == b"\x89PNG"
    assert "'s (h q) -> h s q'" in data["text/plain"]
    assert "[s=3 (h q)=8] to [h=2 s=3 q=4]; 7 of 24" in data["text/plain"]
    assert "application/vnd.jupyter.widget-view+json" in data
    assert "; all 24 elements have moved." in ShapeMicroscope().alt


@each_specimen
def test_the_page_gets_the_numbers_of_the_still_picture(specimen: Specimen) -> None:
    scene = json.loads(json.dumps(ShapeMicroscope([specimen]).scenes[0]))
    move = specimen.move
    assert scene["arrows"] == [list(arrow) for arrow in move.arrows]
    assert scene["letters"] == {letter: list(index) for letter, index in move.letters.items()}
    for name, side in (("before", move.before), ("after", move.after)):
        assert np.array_equal(scene[name]["places"], places(side))
        assert scene[name]["extent"] == list(extent(side))
        assert [tuple(index) for index in scene[name]["index"]] == [side.index(i) for i in range(side.count)]
        assert [label["text"] for label in scene[name]["labels"]] == [label.text for label in labels(side)]


def test_it_is_saved_as_one_page_that_needs_nothing_else(tmp_path: Path) -> None:
    sly = Specimen("</script><b>", "s d -> d s", {"s": 2, "d": 3}, "s")
    page = ShapeMicroscope([sly]).save_html(tmp_path / "shapes.html").read_text(encoding="utf-8")
    assert [path.name for path in tmp_path.iterdir()] == ["shapes.html"]  # nothing half-written left
    assert set(re.findall(r"https?://[^\"' ]+", page)) == {"http://www.w3.org/2000/svg"}  # a name, not an address
    assert not re.search(r"\b(src|href|import)\b *[=(\"']", page)
    assert page.count("</script>") == 1  # a name does not end the script
    assert "export" not in page
    assert MODULE.read_text(encoding="utf-8").endswith(EXPORT)
    state = json.loads(re.search(r"^const state = (.*);$", page, re.MULTILINE)[1])
    assert state["scenes"][0]["pattern"] == "s d -> d s"


# ---- the page -------------------------------------------------------------------------------------------------------


@pytest.fixture
def page(browser: Any, tmp_path: Path) -> Iterator[Any]:
    """The saved microscope, opened from its file, without motion; any error on it fails the test."""
    path = ShapeMicroscope().save_html(tmp_path / "shapes.html")
    page = browser.new_page(viewport={"width": 1000, "height": 600}, reduced_motion="reduce")
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.goto(path.as_uri())
    yield page
    page.close()
    assert errors == []


TOKENS = """[...document.querySelectorAll('.token')].map((g) => {
  const at = new DOMMatrix(getComputedStyle(g).transform);
  return [Number(g.querySelector('text').textContent), at.e / 34, at.f / 34];
})"""
SLOTS = """[...document.querySelectorAll('.slot')].map((g) => {
  const at = new DOMMatrix(getComputedStyle(g).transform);
  return [at.e / 34, at.f / 34];
})"""


@pytest.mark.browser
@pytest.mark.slow
def test_on_the_page_elements_travel_to_where_numpy_takes_them(page: Any) -> None:
    choose, slider, status = page.locator("select").first, page.get_by_role("slider"), page.locator(".status")
    for number, specimen in enumerate(SPECIMENS):
        move = specimen.move
        choose.select_option(str(number))
        assert "No element has moved" in status.inner_text()
        start = page.evaluate(TOKENS)
        slider.press("ArrowRight")
        assert status.inner_text().startswith("Element 0, at")
        slider.press("End")
        end, slots = page.evaluate(TOKENS), np.array(page.evaluate(SLOTS))
        assert np.allclose(slots - slots[0], places(move.after), atol=1e-4)
        for (source, target), (label, *at), (_, *was) in zip(move.arrows, end, start, strict=True):
            assert label == source
            assert at == pytest.approx(list(slots[target]), abs=1e-4)
            assert was != at
        if move.operation == "reduce":
            sums = page.evaluate("[...document.querySelectorAll('.sum text')].map((t) => Number(t.textContent))")
            assert sums == by_numpy(specimen).flatten().tolist()


@pytest.mark.browser
@pytest.mark.slow
def test_the_page_works_from_the_keyboard(page: Any) -> None:
    page.evaluate("window.heard = 0; document.addEventListener('keydown', () => window.heard++)")
    page.keyboard.press("Tab")
    page.keyboard.press("ArrowDown")  # the next pattern
    assert page.locator("select").first.input_value() == "1"
    page.locator("button", has_text="Step").focus()
    page.keyboard.press("Enter")
    page.keyboard.press("Enter")
    assert page.locator(".count").inner_text() == "2 of 24"
    assert page.locator(".status").inner_text() == "Element 1, at [0, 1], goes to [1, 0, 0]."
    assert "2 of 24" in page.get_by_role("img").get_attribute("aria-label")
    page.locator("button", has_text="Back").press("Enter")
    assert page.locator(".count").inner_text() == "1 of 24"
    colours = "[...document.querySelectorAll('.token rect')].map((r) => r.getAttribute('fill'))"
    before = page.evaluate(colours)
    page.locator("select").nth(1).select_option("s")
    assert page.evaluate(colours) == [COLOURS[i] for i in SPECIMENS[1].move.letters["s"]] != before
    assert page.evaluate("window.heard") == 1  # the first Tab; no key pressed inside reaches the page around it


@pytest.mark.browser
@pytest.mark.slow
def test_play_goes_to_the_end_and_pauses_on_the_way(page: Any) -> None:
    page.locator("select").first.select_option("7")
    play = page.locator("button").first
    play.click()
    page.wait_for_function("document.querySelector('.count').textContent === '3 of 12'")
    play.click()
    assert play.inner_text() == "Play"
    paused = page.locator(".count").inner_text()
    page.wait_for_timeout(800)
    assert page.locator(".count").inner_text() == paused
    play.click()
    page.wait_for_function("document.querySelector('.count').textContent === '12 of 12'")
    assert play.inner_text() == "Play"


@pytest.mark.browser
@pytest.mark.slow
def test_one_pattern_of_ones_own_is_named_and_not_listed(browser: Any, tmp_path: Path) -> None:
    page = browser.new_page()
    page.goto(ShapeMicroscope(SPECIMENS[3:4]).save_html(tmp_path / "shapes.html").as_uri())
    assert page.locator("select").count() == 1  # the colours
    assert page.locator("strong").inner_text() == "transpose: s d -> d s"
    page.close()


def test_the_picture_is_small_enough_for_a_notebook() -> None:
    assert all(len(base64.b64encode(ShapeMicroscope([specimen]).png())) < 60_000 for specimen in SPECIMENS[::5])
