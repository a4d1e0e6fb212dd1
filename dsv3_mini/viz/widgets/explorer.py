"""Explorer: ipywidgets controls above a picture that a pure function draws.

The picture is an `Image` widget that holds a PNG: no Output area, no `interact`, so a callback's error is raised where the
control was moved and nothing flickers. Beside the live widget an Explorer shows its first picture as plain PNG, which is
what a reader sees on a page without a kernel; the course's builder keeps only that in a saved notebook.
"""

from __future__ import annotations

import base64
from collections.abc import Callable
from typing import Any

import ipywidgets
from matplotlib.figure import Figure

from dsv3_mini.viz.figures import png


class Explorer:
    """`Explorer(draw, tokens=IntSlider(...))` shows `draw(tokens=...)` and draws it anew when a control moves.

    Args:
        draw: control values by name -> Figure. Pure: the same values, the same picture.
        alt: what the picture shows, in a sentence, for those who cannot see it.
        controls: ipywidgets with a `value`, by the name of draw's argument.
    """

    def __init__(self, draw: Callable[..., Figure], alt: str, **controls: ipywidgets.ValueWidget) -> None:
        self.draw, self.alt, self.controls = draw, alt, controls
        self.picture = ipywidgets.Image(format="png", layout=ipywidgets.Layout(max_width="100%"))
        for control in controls.values():
            if hasattr(getattr(control, "style", None), "description_width"):
                control.style.description_width = "initial"
            control.observe(lambda _: self.refresh(), names="value")
        row = ipywidgets.HBox(list(controls.values()), layout=ipywidgets.Layout(flex_flow="row wrap"))
        self.box = ipywidgets.VBox([row, self.picture])
        self.refresh()

    @property
    def values(self) -> dict[str, Any]:
        return {name: control.value for name, control in self.controls.items()}

    def set(self, **values: Any) -> None:
        """Move controls, as a reader would."""
        for name, value in values.items():
            self.controls[name].value = value

    def refresh(self) -> None:
        self.picture.value = png(self.draw(**self.values))

    def _repr_mimebundle_(self, **_: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        return with_picture(self.box._repr_mimebundle_(), self.alt, self.picture.value)


def with_picture(live: Any, alt: str, picture: bytes | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a notebook is given to show: a widget's live view (`live`, its own bundle), a PNG for pages without a kernel, a
    sentence for those without eyes."""
    data = dict(live[0] if isinstance(live, tuple) else live or {}) | {"text/plain": alt}
    if picture is not None:
        data["image/png"] = base64.b64encode(picture).decode()
    return data, {}
