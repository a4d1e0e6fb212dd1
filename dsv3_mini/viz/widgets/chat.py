"""Talk with a model in the notebook: a line in, the answer as it is written, and in colours what MTP drafted of it."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from typing import Any

import ipywidgets
from matplotlib.figure import Figure

from dsv3_mini.data.tokenizer import Tokenizer
from dsv3_mini.errors import DataError
from dsv3_mini.inference.conversation import Conversation
from dsv3_mini.inference.generate import TEMPERATURE, TOP_P
from dsv3_mini.inference.writing import Counts
from dsv3_mini.model import DeepSeekV3
from dsv3_mini.viz.figures import png
from dsv3_mini.viz.figures.marked_text import INK, MEANS, PAPER, Kind, marked_text_figure
from dsv3_mini.viz.widgets.explorer import with_picture

ALT = (
    "A conversation: what the reader said, and the model's answers, in which the tokens that MTP drafted and the main model "
    "accepted have another colour than the main model's own; drafts that it refused are struck through."
)


@dataclass(frozen=True)
class Said:
    """A piece of the conversation, and where it came from."""

    text: str
    kind: Kind


class Chat:
    """`chat = Chat(model, tokenizer); chat.say("Who has the lamp?")`; shown in a notebook, the reader types instead.

    A line that ends in a question mark is a question about the text so far; any other line is told on from. A control that
    moves has the last line answered again, so that one sees what it does.

    Args:
        story: said to the model before anything else, without an answer of its own.
        seed: of each answer.
    """

    def __init__(
        self, model: DeepSeekV3, tokenizer: Tokenizer, story: str = "", seed: int = 0, max_new_tokens: int = 120
    ) -> None:
        self.model, self.tokenizer, self.story, self.seed, self.longest = model, tokenizer, story, seed, max_new_tokens
        wide = ipywidgets.Layout(width="auto")
        self.line = ipywidgets.Text(
            description="say", placeholder="a story's beginning, or a question? (and Enter)", continuous_update=False,
            layout=ipywidgets.Layout(width="100%"),
        )  # fmt: skip
        self.controls: dict[str, ipywidgets.ValueWidget] = {
            "temperature": ipywidgets.FloatSlider(TEMPERATURE, min=0, max=1.5, step=0.1, description="temperature"),
            "top_p": ipywidgets.FloatSlider(TOP_P, min=0.05, max=1, step=0.05, description="top-p"),
            "drafts": ipywidgets.IntSlider(1 if len(model.mtp) else 0, min=0, max=4, description="drafts"),
        }
        self.controls["drafts"].disabled = not len(model.mtp)
        for control in self.controls.values():
            control.continuous_update = False
            control.style.description_width = "initial"
            control.observe(lambda _: self.again(), names="value")
        self.anew = ipywidgets.Button(description="new text", layout=wide)
        self.anew.on_click(lambda _: self.restart())
        self.line.observe(self._typed, names="value")
        self.page = ipywidgets.HTML()
        row = ipywidgets.HBox([*self.controls.values(), self.anew], layout=ipywidgets.Layout(flex_flow="row wrap"))
        self.box = ipywidgets.VBox([self.page, self.line, row])
        self.restart()

    # ---- what a reader does ----

    def say(self, line: str) -> str:
        """Say a line; returns the answer, which is on the page piece by piece as it is written."""
        self._turns.append(line)
        return self._answer(line)

    def set(self, **values: Any) -> None:
        """Move controls, as a reader would."""
        for name, value in values.items():
            self.controls[name].value = value

    def again(self) -> None:
        """Have the last line answered again, with the controls as they stand."""
        if self._turns:
            self.said, self.ids = self._before
            self._answer(self._turns[-1])
        else:
            self._show()

    def restart(self) -> None:
        """Forget all but the story."""
        self._turns: list[str] = []
        self.ids = [self.tokenizer.eos_id, *self.tokenizer.encode(self.story)]
        self.said = [Said(self.story, "given")] if self.story else []
        self.counts, self.note = Counts(), ""
        self._show()

    # ---- what comes of it ----

    @property
    def text(self) -> str:
        """The conversation, without the drafts that fell."""
        return "".join(each.text for each in self.said if each.kind != "refused")

    @property
    def settings(self) -> dict[str, Any]:
        drafts = self.controls["drafts"].value
        return {
            "max_new_tokens": self.longest,
            "temperature": self.controls["temperature"].value,
            "top_p": self.controls["top_p"].value,
            "use_mtp": drafts > 0,
            "drafts": drafts or None,
        }

    @property
    def summary(self) -> str:
        """The settings, and what drafting brought in the last answer."""
        drafts = self.controls["drafts"].value
        words = f"temperature {self.controls['temperature'].value:.1f}, top-p {self.controls['top_p'].value:.2f}, "
        words += f"{drafts} draft{'' if drafts == 1 else 's'} a pass"
        if not self.counts.passes:
            return words
        held, checked = sum(self.counts.held), sum(self.counts.checked)
        shares = f"; {held} of {checked} drafts held" if drafts else ""
        return f"{words}{shares}; {self.counts.tokens_per_pass:.2f} tokens a pass"

    def figure(self) -> Figure:
        """The conversation without a browser, a token or a turn at a place."""
        words: list[str] = []
        kinds: list[Kind] = []
        for each in self.said:
            parts = [each.text] if each.kind != "given" else _words(each.text)
            words += parts
            kinds += [each.kind] * len(parts)
        return marked_text_figure(words or ["(nothing was said yet)"], kinds or ["given"], self.summary)

    def _repr_mimebundle_(self, **_: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        return with_picture(self.box._repr_mimebundle_(), ALT, png(self.figure()))

    # ---- inside ----

    def _typed(self, change: Any) -> None:
        if change["new"].strip():
            self.line.value = ""
            self.say(change["new"])

    def _answer(self, line: str) -> str:
        """Each answer has a conversation of its own, which reads what was said: a chat goes back as well as on."""
        self._before = (list(self.said), list(self.ids))
        conversation = Conversation(self.model, self.tokenizer, self.seed, **self.settings)
        conversation.ids = list(self.ids)
        before, answer = len(conversation.text), ""
        self.note, self.counts = "", conversation.counts
        try:
            for piece in conversation.say(line):
                if not answer:  # how the line was put: a question as a story's question
                    self.said.append(Said(conversation.text[before : -len(piece.text)], "given"))
                if piece.refused is not None:
                    self.said.append(Said(piece.refused, "refused"))
                self.said.append(Said(piece.text, "drafted" if piece.drafted else "own"))
                answer += piece.text
                self.counts = conversation.counts
                self._show()
        except DataError as error:  # in a callback it would show nowhere
            self.note = str(error)
        self.ids = conversation.ids
        self._show()
        return answer

    def _show(self) -> None:
        spans = "".join(_span(each) for each in self.said) or "<i>Nothing was said yet.</i>"
        key = " &nbsp; ".join(_span(Said(MEANS[kind], kind)) for kind in ("own", "drafted", "refused"))
        note = f"<div role='alert' style='color:#A34700'>{escape(self.note)}</div>" if self.note else ""
        self.page.value = (
            "<div role='log' aria-live='polite' style='background:white;color:black;border:1px solid #767676;"
            "border-radius:4px;padding:8px;font:15px/1.7 ui-monospace,monospace;white-space:pre-wrap;"
            f"overflow-wrap:anywhere'>{spans}</div>{note}"
            f"<div style='color:#5F5F5F;line-height:1.6'>{escape(self.summary)}<br>{key}</div>"
        )


def _span(said: Said) -> str:
    strike = ";text-decoration:line-through" if said.kind == "refused" else ""
    style = f"background:{PAPER[said.kind]};color:{INK[said.kind]}{strike}"
    return f"<span class='{said.kind}' style='{style}'>{escape(said.text)}</span>"


def _words(text: str) -> list[str]:
    """A given text in pieces that a line of the picture can hold, each with the blank or break before it."""
    pieces, word = [], ""
    for letter in text:
        if letter in " \n" and word.strip():
            pieces.append(word)
            word = ""
        if letter == "\n":
            pieces.append(word + letter)
            word = ""
        else:
            word += letter
    return [*pieces, word] if word else pieces
