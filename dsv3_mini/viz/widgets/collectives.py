"""The collective player: what each rank holds, round by round, and the pieces on their way.

The page's half is collectives.js. It gets every film at once, as states and moves, so that nothing is asked of Python while
one plays, steps or chooses another.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import anywidget
import traitlets
from matplotlib.figure import Figure

from dsv3_mini.course.rounds import FILMS, Film
from dsv3_mini.errors import UserError
from dsv3_mini.viz.figures import png
from dsv3_mini.viz.figures.collectives import moment_figure
from dsv3_mini.viz.style import COLOURS
from dsv3_mini.viz.widgets.explorer import with_picture
from dsv3_mini.viz.widgets.page import save_page

MODULE = Path(__file__).with_suffix(".js")
RANKS = (4, 5, 6, 8)
STATE = ("films", "facts", "colours", "film_at", "ranks_at", "moment")


class CollectivePlayer(anywidget.AnyWidget):
    """Controls: the collective, the ranks; and the moment, in rounds, by step, slider or play.

    Args:
        names, ranks: what there is to choose from.
    """

    _esm = MODULE
    films = traitlets.List(help="in each size: name, ranks, states (number and ranks of each piece), rounds").tag(
        sync=True
    )
    facts = traitlets.Dict(help="what the controls offer: names, ranks").tag(sync=True)
    colours = traitlets.List(help="of the ranks").tag(sync=True)
    film_at = traitlets.Int(0, help="place of the chosen collective in facts.names").tag(sync=True)
    ranks_at = traitlets.Int(0, help="place of the chosen size in facts.ranks").tag(sync=True)
    moment = traitlets.Float(0.0, help="rounds that are over, and the part of the next one").tag(sync=True)

    def __init__(self, names: Sequence[str] = tuple(FILMS), ranks: Sequence[int] = RANKS) -> None:
        self.made = {(name, count): FILMS[name](count) for name in names for count in ranks}
        super().__init__(
            films=[_plain(film) for film in self.made.values()],
            facts={"names": list(names), "ranks": list(ranks)},
            colours=list(COLOURS),
        )

    @property
    def film(self) -> Film:
        """What the controls choose."""
        return self.made[self.facts["names"][self.film_at], self.facts["ranks"][self.ranks_at]]

    def set(self, name: str | None = None, ranks: int | None = None, moment: float | None = None) -> None:
        """Move the controls, as a reader would. `moment` is in rounds: 2.5 is half way through the third.

        Raises:
            UserError: it is not among what there is to choose.
        """
        for control, what, value, offered in (
            ("film_at", "collective", name, self.facts["names"]),
            ("ranks_at", "ranks", ranks, self.facts["ranks"]),
        ):
            if value is not None and value not in offered:
                raise UserError(f"{what} = {value!r} is not in the player: choose {', '.join(map(str, offered))}")
            if value is not None:
                setattr(self, control, offered.index(value))
        rounds = len(self.film.rounds)
        if moment is not None and not 0 <= moment <= rounds:
            raise UserError(f"moment = {moment!r} must lie between 0 and {rounds}, the rounds of {self.film.name}")
        self.moment = float(min(self.moment if moment is None else moment, rounds))

    @property
    def alt(self) -> str:
        """The picture in a sentence."""
        film, number = self.film, int(self.moment)
        most = max(film.sent(number)) / film.ranks
        return (
            f"Collective player, {film.name} on {film.ranks} ranks, after round {number} of {len(film.rounds)}: the busiest "
            f"rank has sent {most:.2f} sizes of its tensor."
        )

    def figure(self) -> Figure:
        """The same picture without a browser, at the last round that is over."""
        return moment_figure(self.film, int(self.moment))

    def _repr_mimebundle_(self, **options: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        return with_picture(super()._repr_mimebundle_(**options), self.alt, png(self.figure()))

    def save_html(self, path: str | Path) -> Path:
        """Write the player as one page that needs nothing else: no kernel, no network. Returns the path."""
        return save_page(path, MODULE, "Collective player", self.alt, {name: getattr(self, name) for name in STATE})


def _plain(film: Film) -> dict[str, Any]:
    """As JSON: a piece is [number, ranks], a move [source, piece, target, place]."""
    states = [film.state(number) for number in range(len(film.rounds) + 1)]
    return {
        "name": film.name,
        "ranks": film.ranks,
        "states": [[[[p.number, list(p.ranks)] for p in row] for row in state] for state in states],
        "rounds": [[[m.source, m.piece, m.target, m.place] for m in moves] for moves in film.rounds],
        "leaves": [any(m.leaves for m in moves) for moves in film.rounds],
        "lengths": film.lengths,
        "sent": [film.sent(number) for number in range(len(film.rounds) + 1)],
    }
