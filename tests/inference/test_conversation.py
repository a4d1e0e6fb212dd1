"""Talking: a conversation's text is the text that the model would have been given whole, in the terminal as in Python."""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from random_models import nano, random_model

from dsv3_mini import save_pretrained
from dsv3_mini.cli import main
from dsv3_mini.commands import talk as talking
from dsv3_mini.data.tokenizer import Tokenizer
from dsv3_mini.errors import DataError
from dsv3_mini.inference.conversation import Conversation
from dsv3_mini.inference.settings import Settings
from dsv3_mini.inference.writing import Reader, Writing
from dsv3_mini.model import DeepSeekV3

STORY, ASK = "Tom had the lamp.", "Who has the lamp?"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.shipped()


@pytest.fixture(scope="module")
def model() -> DeepSeekV3:
    return random_model(nano(vocab_size=4096)).eval()


def answer(conversation: Conversation, line: str) -> str:
    return "".join(piece.text for piece in conversation.say(line))


@pytest.mark.parametrize("more", [{}, dict(use_mtp=True, drafts=2)], ids=["plain", "drafting"])
def test_each_turn_goes_on_from_all_that_was_said(
    model: DeepSeekV3, tokenizer: Tokenizer, more: dict[str, Any]
) -> None:
    """Three turns; each answer is what `complete` makes of the whole text before it, as ids."""
    conversation = Conversation(model, tokenizer, max_new_tokens=9, **more)
    for line in (STORY, ASK, "Then"):
        before, ids = conversation.text, list(conversation.ids)
        said = answer(conversation, line)
        framed = conversation.text[len(before) : len(conversation.text) - len(said)]
        assert framed.strip() == (f"Question: {line}\nAnswer:" if line == ASK else line)
        prompt = ids + tokenizer.encode(framed)
        stops = {tokenizer.eos_id, *(i for i, t in enumerate(tokenizer.ranks) if b"\n" in t)}
        writing = Writing(
            model, [prompt], Settings(max_new_tokens=9, stop_id=stops if line == ASK else tokenizer.eos_id)
        )
        (row,) = writing.finish().rows
        assert conversation.ids == prompt + [token for token in row if token != tokenizer.eos_id]


def test_a_turn_reads_only_what_is_new(
    model: DeepSeekV3, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    conversation = Conversation(model, tokenizer, max_new_tokens=5)
    answer(conversation, "Tom had the lamp. " * 12)
    read: list[int] = []
    original = Reader.read
    monkeypatch.setattr(Reader, "read", lambda self, tokens: read.append(tokens.shape[1]) or original(self, tokens))
    answer(conversation, ASK)
    assert sum(read) < 40 < len(conversation.ids)


def test_an_answer_ends_with_its_line_and_a_story_with_its_document(
    model: DeepSeekV3, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model's next tokens are fixed, so that where it stops is all that is left to say."""
    said = [*tokenizer.encode(" The lamp.\nMore"), tokenizer.eos_id, 5, 5]

    def told(each: Iterator[int]) -> Any:
        def verify(self: Any, logits: Any, drafted: Any) -> Any:
            return [0], [next(each)]

        return verify

    monkeypatch.setattr("dsv3_mini.inference.choosing.Greedy.verify", told(itertools.cycle(said)))
    conversation = Conversation(model, tokenizer)
    assert answer(conversation, ASK) == " The lamp.\n" and conversation.text.endswith("Answer: The lamp.\n")
    monkeypatch.setattr("dsv3_mini.inference.choosing.Greedy.verify", told(itertools.cycle(said)))
    conversation.restart()
    assert answer(conversation, "Tom") == " The lamp.\nMore" and conversation.text == "Tom The lamp.\nMore"


def test_pieces_say_what_was_drafted(tokenizer: Tokenizer) -> None:
    model = random_model(nano(vocab_size=4096))
    with torch.no_grad():  # a head that knows few tokens: an untrained chain is often right with it, and often wrong
        few = model.lm_head.weight[:3].clone()
        model.lm_head.weight.zero_()
        model.lm_head.weight[[300, 400, 500]] = 3 * few
    conversation = Conversation(model, tokenizer, max_new_tokens=60, use_mtp=True)
    pieces = list(conversation.say("a"))
    counts = conversation.counts
    assert 0 < counts.held[0] < counts.checked[0]
    assert sum(piece.drafted for piece in pieces) == counts.held[0]
    assert sum(piece.refused is not None for piece in pieces) == counts.checked[0] - counts.held[0]


def test_who_stops_listening_keeps_what_was_said(model: DeepSeekV3, tokenizer: Tokenizer) -> None:
    conversation = Conversation(model, tokenizer, max_new_tokens=30)
    heard = "".join(piece.text for piece in itertools.islice(conversation.say(STORY), 3))
    assert conversation.text == STORY + heard
    answer(conversation, ASK)
    assert conversation.text.startswith(STORY + heard)


def test_a_full_conversation_says_so(model: DeepSeekV3, tokenizer: Tokenizer) -> None:
    conversation = Conversation(model, tokenizer, max_new_tokens=10_000)
    answer(conversation, "and " * 200)
    before = list(conversation.ids)
    with pytest.raises(DataError, match="begin a new one"):
        answer(conversation, "and " * 60)
    assert conversation.ids == before
    conversation.restart()
    with pytest.raises(DataError, match="an empty line says nothing"):
        answer(conversation, " \n")
    assert answer(conversation, "Tom") and conversation.text.startswith("Tom")


# ---- dsv3 sample --interactive -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, model: DeepSeekV3) -> Path:
    path = tmp_path_factory.mktemp("model") / "nano"
    save_pretrained(model, path, torch.float32)
    return path


def talk(folder: Path, lines: str | bytes, monkeypatch: pytest.MonkeyPatch, *flags: str) -> int:
    data = lines.encode() if isinstance(lines, str) else lines
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))
    return main(
        ["sample", "--interactive", "--model", str(folder), "--max-new-tokens", "6", "--temperature", "0", *flags]
    )


def test_lines_are_answered_until_they_end(
    folder: Path,
    tokenizer: Tokenizer,
    model: DeepSeekV3,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert talk(folder, f"{STORY}\n{ASK}\n\n{STORY}\n", monkeypatch) == 0
    said = capsys.readouterr()
    conversation = Conversation(model, tokenizer, max_new_tokens=6)
    first, second = answer(conversation, STORY), answer(conversation, ASK)
    lines = [
        text if text.endswith("\n") else text + "\n" for text in (first, second, first)
    ]  # an empty line begins anew
    assert said.out == "".join(lines) and said.err == ""
    assert (
        talk(folder, f"{ASK}\n", monkeypatch, "--mtp", STORY) == 0
    )  # the prompt is the first line; drafts change nothing
    assert capsys.readouterr().out == "".join(lines[:2])


def test_what_goes_wrong_in_a_line_is_one_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert talk(folder, "and " * 300 + "\nTom\n", monkeypatch) == 0
    said = capsys.readouterr()
    assert said.err.count("\n") == 1 and "begin a new one (an empty line does)" in said.err and said.out
    assert talk(folder, b"\xff\xfe\nTom\n", monkeypatch) == 0


def test_ctrl_c_stops_an_answer_and_at_the_prompt_ends(
    model: DeepSeekV3, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    conversation = Conversation(model, tokenizer, max_new_tokens=30)
    say = conversation.say

    def interrupted(line: str) -> Iterator[Any]:
        yield from itertools.islice(say(line), 2)
        raise KeyboardInterrupt

    monkeypatch.setattr(conversation, "say", interrupted)
    lines = iter([STORY])

    def asked(_: str = "") -> str:
        try:
            return next(lines)
        except StopIteration:
            raise KeyboardInterrupt from None

    monkeypatch.setattr("builtins.input", asked)
    assert talking.talk(conversation) == 0
    said = capsys.readouterr()
    assert conversation.text == STORY + said.out[:-1] and said.out.endswith("\n")


def test_a_wrong_setting_is_told_before_the_first_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert talk(folder, "Tom\n", monkeypatch, "--top-p", "0") == 2
    assert "top_p = 0.0 must be above 0" in capsys.readouterr().err
