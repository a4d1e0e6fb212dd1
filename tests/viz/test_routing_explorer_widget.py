"""The routing explorer in Python and in its still picture: what it shows is what the model did."""

from __future__ import annotations

import base64
import json
import re
import time
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from random_models import assert_routing_is_awake, nano, random_model

from dsv3_mini.data.shipped import shipped
from dsv3_mini.data.stories import HELD_OUT_SEED, generate_story
from dsv3_mini.data.tokenizer import Tokenizer
from dsv3_mini.errors import DataError
from dsv3_mini.hub import from_pretrained
from dsv3_mini.model import DeepSeekV3
from dsv3_mini.viz.figures import png
from dsv3_mini.viz.figures.routing import COLUMNS, GATE_MAP, IDLE
from dsv3_mini.viz.figures.routing_explorer import Profile, Routed, explorer_figure, leaning, tints
from dsv3_mini.viz.widgets.routing_explorer import (
    MODULE,
    RoutingExplorer,
    first_documents,
    profile_of,
    reference_rows,
    route,
)

TEXT = "Meanwhile, Tom was at the pond.\nQuestion: Where is the lamp?\nAnswer: The lamp is under the bench."


@pytest.fixture(scope="module")
def model() -> DeepSeekV3:
    return random_model(nano(vocab_size=4096)).eval()


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.shipped()


@pytest.fixture(scope="module")
def reference(tokenizer: Tokenizer) -> dict[str, torch.Tensor]:
    """Two made-up domains: rows of 40 tokens that begin with eos, each two documents."""
    random = torch.Generator().manual_seed(2)
    rows = {}
    for domain, (low, high) in {"letters": (60, 400), "words": (400, 3000)}.items():
        tokens = torch.randint(low, high, (6, 40), generator=random)
        tokens[:, 0] = tokens[:, 25] = tokenizer.eos_id
        tokens[-1, 30:] = tokenizer.pad_id
        rows[domain] = tokens
    return rows


@pytest.fixture
def explorer(model: DeepSeekV3, tokenizer: Tokenizer, reference: dict[str, torch.Tensor]) -> RoutingExplorer:
    explorer = RoutingExplorer(model, tokenizer, reference)
    explorer.read(TEXT)
    return explorer


# ---- what the model did ----------------------------------------------------------------------------------------------


def test_a_routed_text_is_what_one_pass_gives(model: DeepSeekV3, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(TEXT)
    routed = route(model, tokenizer, ids)
    tokens = torch.tensor([[tokenizer.eos_id, *ids]])
    assert_routing_is_awake(model, tokens.repeat(1, 4))
    output = model(tokens)
    assert "".join(routed.words) == TEXT and routed.chosen.shape == (len(ids), 2, 2)
    for position in range(len(ids)):
        for row, layer in enumerate(output.routing[:2]):  # the last is of multi-token prediction
            right = dict(
                zip(layer.chosen[0, position + 1].tolist(), layer.gates[0, position + 1].tolist(), strict=True)
            )
            got = dict(zip(routed.chosen[position, row].tolist(), routed.gates[position, row].tolist(), strict=True))
            assert got == pytest.approx(right, abs=1e-5)
    assert (routed.gates[..., :-1] >= routed.gates[..., 1:]).all(), "the largest gate value first"


def test_texts_that_cannot_be_routed_are_refused_in_a_line(model: DeepSeekV3, tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match="nothing to route"):
        route(model, tokenizer, [])
    room = model.cfg.max_position_embeddings - 1
    assert len(route(model, tokenizer, [70] * room).words) == room
    with pytest.raises(DataError, match=f"{room + 1} tokens are more than the {room}"):
        route(model, tokenizer, [70] * (room + 1))
    dense = random_model(nano(vocab_size=4096, first_k_dense_replace=3))
    with pytest.raises(DataError, match="no sparse layers"):
        route(dense, tokenizer, [70])


def test_the_profile_counts_visitors_by_domain(
    model: DeepSeekV3, tokenizer: Tokenizer, reference: dict[str, torch.Tensor]
) -> None:
    profile = profile_of(model, tokenizer, reference)
    counts = np.zeros((2, 8, 2))
    visits: dict[tuple[int, int, int], int] = {}
    seen = np.zeros(4096)
    for d, rows in enumerate(reference.values()):
        routing = model(rows).routing[:2]
        total = 0
        for b, s in np.ndindex(*rows.shape):
            token = int(rows[b, s])
            if token in (tokenizer.eos_id, tokenizer.pad_id):
                continue
            total += 1
            seen[token] += 1
            for row, layer in enumerate(routing):
                for e in layer.chosen[b, s].tolist():
                    counts[row, e, d] += 1
                    visits[row, e, token] = visits.get((row, e, token), 0) + 1
        counts[:, :, d] /= total
    expected = counts / np.maximum(counts.sum(-1, keepdims=True), 1e-9)
    np.testing.assert_allclose(profile.shares.numpy(), expected, atol=1e-5)
    assert profile.domains == ("letters", "words")
    for row, e in np.ndindex(2, 8):
        scores = {t: n / (seen[t] + 8) for (r, x, t), n in visits.items() if (r, x) == (row, e)}
        best = sorted(scores.values(), reverse=True)
        for word in profile.often[row][e]:
            known = [scores[t] for t in scores if tokenizer.decode([t]) == word]
            assert known and max(known) >= best[min(len(best), 20) - 1]


def test_samples_are_whole_documents_or_the_beginning_of_one(
    tokenizer: Tokenizer, reference: dict[str, torch.Tensor]
) -> None:
    rows = reference["letters"]
    assert first_documents(reference, tokenizer, 30)["letters"] == rows[0, 1:25].tolist()
    assert first_documents(reference, tokenizer, 10)["letters"] == rows[0, 1:11].tolist()
    assert first_documents(reference, tokenizer, 23)["letters"] == rows[0, 26:].tolist()
    assert list(first_documents({"stories": rows}, tokenizer)) == ["a story"]


def test_leaning_weighs_experts_by_their_gate_values() -> None:
    shares = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]]])
    routed = Routed(["a", "b"], torch.tensor([[[0, 1]], [[2, 1]]]), torch.tensor([[[3.0, 1.0]], [[0.5, 0.5]]]))
    profile = Profile(("x", "y"), shares, [[[], [], []]])
    torch.testing.assert_close(leaning(routed, profile), torch.tensor([[[0.75, 0.25]], [[0.25, 0.75]]]))
    domain, strength = tints(routed, profile)
    assert domain.tolist() == [[0], [1]] and strength[0, 0] == strength[1, 0] == pytest.approx(0.6)
    even = Routed(["a"], torch.tensor([[[2, 2]]]), torch.tensor([[[1.0, 1.0]]]))
    assert tints(even, profile)[1].item() == 0


# ---- the widget ------------------------------------------------------------------------------------------------------


def test_what_is_sent_is_what_was_routed(explorer: RoutingExplorer) -> None:
    sent, routed = explorer.typed, explorer.routed["your text"]
    assert sent["name"] == "your text" and sent["words"] == list(routed.words)
    assert sent["chosen"] == routed.chosen.tolist()
    np.testing.assert_allclose(sent["gates"], routed.gates.numpy(), atol=6e-4)
    domain, strength = tints(routed, explorer.profile)
    assert [[d for d, _ in rows] for rows in sent["tint"]] == domain.tolist()
    np.testing.assert_allclose([[s for _, s in rows] for rows in sent["tint"]], strength.numpy(), atol=6e-3)
    np.testing.assert_allclose(explorer.shares, explorer.profile.shares.numpy(), atol=6e-4)
    assert [sample["name"] for sample in explorer.samples] == ["letters", "words"]
    assert len(json.dumps([explorer.samples, explorer.typed])) < 60_000


def test_reading_shows_the_text_from_its_start(explorer: RoutingExplorer) -> None:
    explorer.set(text="words", token=-1, layer=2, expert=3)
    assert explorer.text == 1 and explorer.token == len(explorer.shown.words) - 1
    explorer.read("Another text.")
    assert (explorer.text, explorer.token, explorer.expert, explorer.layer) == (2, 0, -1, 2)
    assert "".join(explorer.shown.words) == "Another text." and len(explorer.samples) == 2


def test_controls_move_as_a_reader_moves_them(explorer: RoutingExplorer) -> None:
    pictures = [png(explorer.figure())]
    for moves in ({"token": 4}, {"layer": 2}, {"expert": 5}, {"text": "letters"}):
        explorer.set(**moves)
        pictures.append(png(explorer.figure()))
    assert len(set(pictures)) == 5
    assert (explorer.text, explorer.token, explorer.layer, explorer.expert) == (0, 0, 2, 5)
    assert explorer.experts_here == explorer.routed["letters"].chosen[0, 1].tolist()


@pytest.mark.parametrize(
    ("moves", "message"),
    [
        ({"text": "nothing"}, "choose one of letters, words, your text"),
        ({"token": 10_000}, "token 10000 is not there"),
        ({"layer": 0}, "layers 1 to 2 do"),
        ({"layer": 3}, "layers 1 to 2 do"),
        ({"expert": 8}, "a layer has 8"),
        ({"expert": -2}, "a layer has 8"),
    ],
)
def test_what_is_not_there_is_refused(explorer: RoutingExplorer, moves: dict[str, Any], message: str) -> None:
    before = (explorer.text, explorer.token, explorer.layer, explorer.expert)
    with pytest.raises(DataError, match=message):
        explorer.set(**moves)
    assert before == (explorer.text, explorer.token, explorer.layer, explorer.expert)


def test_a_page_asks_for_another_text(explorer: RoutingExplorer) -> None:
    explorer._asked(explorer, {"read": "A lamp."}, [])
    assert "".join(explorer.shown.words) == "A lamp." and explorer.note == ""
    for wrong, said in {"": "nothing to route", "and " * 300: "shorten the text"}.items():
        explorer._asked(explorer, {"read": wrong}, [])
        assert said in explorer.note and "".join(explorer.shown.words) == "A lamp."
    for nonsense in ({}, {"read": 3}, "read", None):
        explorer._asked(explorer, nonsense, [])
    explorer._asked(explorer, {"read": "Two lamps."}, [])
    assert explorer.note == ""


def test_it_shows_something_without_a_kernel(explorer: RoutingExplorer) -> None:
    data, _ = explorer._repr_mimebundle_()
    assert base64.b64decode(data["image/png"]).startswith(b"\x89PNG")
    assert "application/vnd.jupyter.widget-view+json" in data
    experts = ", ".join(map(str, explorer.experts_here))
    assert f"visits experts {experts} in layer 1" in data["text/plain"]


def test_a_saved_page_needs_nothing_else(explorer: RoutingExplorer, tmp_path: Path) -> None:
    explorer.read("</script><script>")
    page = explorer.save_html(tmp_path / "routing.html").read_text()
    assert not re.findall(r"https?://", page)
    assert "import " not in page and "export " not in page
    assert page.count("</script>") == 1 and page.count("<script") == 1
    assert json.dumps(explorer.samples[1]["chosen"]) in page and MODULE.read_text()[:200] in page


# ---- the picture -----------------------------------------------------------------------------------------------------


def by_gid(figure: Figure) -> dict[str, Any]:
    found = [artist for axes in figure.axes for artist in (*axes.patches, *axes.texts, *axes.collections)]
    return {artist.get_gid(): artist for artist in found if artist.get_gid()}


def boxes(artist: Any) -> np.ndarray:
    """Left, bottom, width and height of every rectangle of a collection."""
    corners = np.array([path.vertices for path in artist.get_paths()])
    return np.concatenate([corners.min(1), corners.max(1) - corners.min(1)], axis=1)


def test_the_picture_shows_the_tokens_experts_and_whom_they_serve(explorer: RoutingExplorer) -> None:
    explorer.set(token=5)
    routed, artists = explorer.shown, by_gid(explorer.figure())
    top = float(routed.gates.max())
    for row in range(2):
        weight = dict(zip(routed.chosen[5, row].tolist(), routed.gates[5, row].tolist(), strict=True))
        tiles, bars = (artists[f"{kind}-{row + 1}"] for kind in ("experts", "serves"))
        wanted = [matplotlib.colormaps[GATE_MAP](weight[e] / top) if e in weight else IDLE for e in range(8)]
        assert [to_hex(colour) for colour in tiles.get_facecolor()] == [to_hex(colour) for colour in wanted]
        assert (np.diff(boxes(tiles)[:, 0]) > boxes(tiles)[:-1, 2]).all(), "side by side, in their order"
        parts = boxes(bars).reshape(8, 2, 4)
        shares = parts[:, :, 2] / boxes(tiles)[:, None, 2]
        np.testing.assert_allclose(shares, explorer.profile.shares[row].numpy(), atol=1e-4)
        np.testing.assert_allclose(parts[:, 0, 0], boxes(tiles)[:, 0], atol=1e-4)
        np.testing.assert_allclose(parts[:, 1, 0], parts[:, 0, 0] + parts[:, 0, 2], atol=1e-4)
        colours = [to_hex(colour) for colour in bars.get_facecolor()]
        assert colours[:2] * 8 == colours and colours[0] != colours[1]


def test_the_roll_shows_one_layer_for_all_tokens(explorer: RoutingExplorer) -> None:
    explorer.set(layer=2, token=3, expert=6)
    figure, routed = explorer.figure(), explorer.shown
    table = figure.axes[2].images[0].get_array()
    assert table.shape == (8, len(routed.words))
    for token in range(len(routed.words)):
        shown = {int(e): float(table[e, token]) for e in np.flatnonzero(~np.ma.getmaskarray(table)[:, token])}
        right = dict(zip(routed.chosen[token, 1].tolist(), routed.gates[token, 1].tolist(), strict=True))
        assert shown == pytest.approx(right)
    artists = by_gid(figure)
    assert artists["here"].get_x() == 2.5 and artists["lane"].get_y() == 5.5
    looked_at, tiles = artists["looked-at"], boxes(artists["experts-2"])
    assert (looked_at.get_x(), looked_at.get_y()) == pytest.approx(tuple(tiles[6, :2]))
    assert "Layer 2 sends" in figure.get_suptitle() and figure.axes[2].get_ylabel() == "expert, layer 2"


def test_the_text_is_whole_tinted_and_marked(explorer: RoutingExplorer) -> None:
    explorer.set(token=4, expert=explorer.shown.chosen[4, 0, 0].item())
    artists, routed = by_gid(explorer.figure()), explorer.shown
    count = len(routed.words)
    assert "".join(artists[f"token-{i}"].get_text() for i in range(count)) == TEXT.replace("\n", "¶")
    places = [artists[f"token-{i}"].get_position() for i in range(count)]
    assert max(x + len(word) for (x, _), word in zip(places, routed.words, strict=True)) <= COLUMNS
    assert len(set(places)) == count
    domain, strength = tints(routed, explorer.profile)
    colours = artists["tints"].get_facecolor()
    np.testing.assert_allclose(colours[:, 3], strength[:, 0].numpy(), atol=1e-6)
    own = [to_rgb(colour) for _, colour in explorer.domains]
    np.testing.assert_allclose(colours[:, :3], [own[d] for d in domain[:, 0].tolist()], atol=1e-6)
    np.testing.assert_allclose(boxes(artists["tints"])[:, 0], [x for x, _ in places], atol=1e-6)
    assert artists["marked"].get_x() == places[4][0] and artists["marked"].get_width() == len(routed.words[4])
    visiting = [i for i in range(count) if explorer.expert in routed.chosen[i, 0].tolist()]
    np.testing.assert_allclose(boxes(artists["visits"])[:, 0], [places[i][0] for i in visiting], atol=1e-6)
    assert 4 in visiting and len(visiting) < count


def test_words_are_large_enough_and_stay_inside(explorer: RoutingExplorer) -> None:
    explorer.read(generate_story(HELD_OUT_SEED, 2).text)
    figure = explorer.figure()
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer, box = canvas.get_renderer(), figure.bbox
    said = [figure._suptitle, *figure.legends[0].get_texts()]
    for axes in figure.axes:
        said += [*axes.texts, *([axes.xaxis.label, axes.yaxis.label] if axes.axison else [])]
    assert len(said) > 50
    for text in said:
        extent = text.get_window_extent(renderer)
        assert text.get_fontsize() >= 11
        assert extent.x0 >= -1 and extent.x1 <= box.x1 + 1 and extent.y0 >= -1 and extent.y1 <= box.y1 + 1, text


def test_a_layer_of_many_experts_can_be_drawn() -> None:
    chosen = torch.stack([torch.randperm(64)[:6] for _ in range(10)])[:, None]
    profile = Profile(("a", "b"), torch.rand(1, 64, 2).softmax(-1), [[[]] * 64])
    routed = Routed([" w"] * 10, chosen, torch.rand(10, 1, 6))
    artists = by_gid(explorer_figure(routed, profile, 0, 0, 8, 1))
    assert len(boxes(artists["experts-1"])) == 64 and len(boxes(artists["serves-1"])) == 128


# ---- speed -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_hundred_tokens_of_the_tiny_model_are_a_picture_within_a_second(tokenizer: Tokenizer) -> None:
    """Seconds of this process's processor: other tests may want the same core."""
    tiny = from_pretrained(shipped("tiny")).eval()
    rows = {name: rows[:1] for name, rows in reference_rows(tiny, tokenizer).items()}
    explorer = RoutingExplorer(tiny, tokenizer, rows)
    assert [sample["name"] for sample in explorer.samples] == ["a story", "a sum", "code", "prose"]
    stories = "\n".join(generate_story(HELD_OUT_SEED, index).text for index in range(6))
    text = tokenizer.decode(tokenizer.encode(stories)[:200])
    reading, stepping = [], []
    for token in (20, 90, 150):
        start = time.process_time()
        explorer.read(text)
        png(explorer.figure())
        reading.append(time.process_time() - start)
        start = time.process_time()
        explorer.set(token=token)
        stepping.append(time.process_time() - start)
    assert len(explorer.shown.words) >= 198 and min(reading) <= 1.0 and min(stepping) <= 0.3, (reading, stepping)
