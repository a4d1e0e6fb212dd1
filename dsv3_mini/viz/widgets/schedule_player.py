"""The schedule player: a pipeline's step as a film, under any schedule, size and weight of communication.

The page's half is schedule_player.js. It gets every schedule as lines of text at once, and computes by itself when
each slot runs, so that nothing is asked of Python while one plays, steps, points or moves a slider.

Times are in units of a rank's share of the model: what one of R ranks computes forward for one microbatch is 1 without
communication, and a schedule that cuts its share into two stages pays half for each. So schedules can be compared.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import anywidget
import traitlets
from matplotlib.figure import Figure

from dsv3_mini.errors import UserError
from dsv3_mini.parallel.schedule_costs import ChunkCosts, Part, PhaseCosts
from dsv3_mini.parallel.schedule_ir import Schedule
from dsv3_mini.parallel.schedule_simulator import Timeline, simulate
from dsv3_mini.parallel.schedules import SCHEDULES, bubble_formula, make_schedule
from dsv3_mini.viz.figures import png
from dsv3_mini.viz.figures.schedule import IDLE, NOW, PHASE_COLOURS, lighter, schedule_figure
from dsv3_mini.viz.widgets.explorer import with_picture
from dsv3_mini.viz.widgets.page import save_page

MODULE = Path(__file__).with_suffix(".js")
RANKS = (4, 8, 16)
ROUNDS = (2, 3, 4)  # microbatches, as multiples of the ranks: what every schedule here can do
LAYERS = 4  # of a rank's share, as in the report's profile
STATE = ("schedules", "costs", "facts", "colours", "schedule_at", "ranks_at", "microbatches_at", "cost_at", "share")


def costs_of(communication: float) -> PhaseCosts:
    """Of a rank's share of the model, whose F, I and W compute for a time of 1 each.

    Args:
        communication: how long all-to-all takes in F, and in I again, as a share of that 1; about 1 in the report.
    """
    half, both = 0.5 / LAYERS, communication / LAYERS / 2
    part = Part(half, half, half)
    return ChunkCosts(attention=part, mlp=part, dispatch=both, combine=both, layers=LAYERS).phases()


COSTS: Mapping[str, PhaseCosts] = MappingProxyType(
    {f"{percent}%": costs_of(percent / 100) for percent in range(0, 101, 25)}
)


class SchedulePlayer(anywidget.AnyWidget):
    """Controls: the schedule, ranks, microbatches, communication; and the moment, by step, slider, click or play.

    Args:
        names, ranks, rounds: what there is to choose from; rounds are microbatches as multiples of the ranks.
        costs: by name, of a rank's share of the model.

    Raises:
        ScheduleError: one of the schedules cannot be made in one of the sizes.
    """

    _esm = MODULE
    schedules = traitlets.List(help="in each size: name, ranks, microbatches, stages, lines, formula").tag(sync=True)
    costs = traitlets.List(help="name, F, I, W and FB of a rank's share of the model").tag(sync=True)
    facts = traitlets.Dict(help="what the controls offer: names, ranks, rounds").tag(sync=True)
    colours = traitlets.Dict(help="of phases, of phases of second stages, of idle time, of the moment").tag(sync=True)
    schedule_at = traitlets.Int(0, help="place of the chosen schedule in facts.names").tag(sync=True)
    ranks_at = traitlets.Int(0, help="place of the chosen size in facts.ranks").tag(sync=True)
    microbatches_at = traitlets.Int(0, help="place of the chosen multiple in facts.rounds").tag(sync=True)
    cost_at = traitlets.Int(0, help="place of the chosen costs").tag(sync=True)
    share = traitlets.Float(1.0, help="where the film stands, as a share of the step").tag(sync=True)

    def __init__(
        self,
        names: Sequence[str] = tuple(SCHEDULES),
        ranks: Sequence[int] = RANKS,
        rounds: Sequence[int] = ROUNDS,
        costs: Mapping[str, PhaseCosts] = COSTS,
    ) -> None:
        self.known = dict(costs)
        self.made = {
            (name, count, count * times): make_schedule(name, count, count * times)
            for name in names
            for count in ranks
            for times in rounds
        }
        super().__init__(
            schedules=[
                {
                    "name": name,
                    "ranks": count,
                    "microbatches": microbatches,
                    "stages": schedule.n_stages,
                    "parameters": len(schedule.stages_on(0)),
                    "lines": list(schedule.lines()),
                    "formula": [bubble_formula(schedule, stage_costs(schedule, cost)) for cost in self.known.values()],
                }
                for (name, count, microbatches), schedule in self.made.items()
            ],
            costs=[
                {"name": name, "F": cost.forward, "I": cost.input, "W": cost.weight, "FB": cost.both}
                for name, cost in self.known.items()
            ],
            facts={"names": list(names), "ranks": list(ranks), "rounds": list(rounds)},
            colours={
                **PHASE_COLOURS,
                **{f"{phase} lighter": lighter(colour) for phase, colour in PHASE_COLOURS.items()},
                "idle": IDLE,
                "now": NOW,
            },
        )

    @property
    def schedule(self) -> Schedule:
        """What the controls choose."""
        count = self.facts["ranks"][self.ranks_at]
        microbatches = count * self.facts["rounds"][self.microbatches_at]
        return self.made[self.facts["names"][self.schedule_at], count, microbatches]

    @property
    def timeline(self) -> Timeline:
        return simulate(self.schedule, stage_costs(self.schedule, list(self.known.values())[self.cost_at]))

    @property
    def now(self) -> float:
        """The moment that is shown."""
        return self.share * self.timeline.span

    def set(
        self,
        name: str | None = None,
        ranks: int | None = None,
        microbatches: int | None = None,
        costs: str | None = None,
        share: float | None = None,
    ) -> None:
        """Move the controls, as a reader would. `costs` is a name of them, `share` of the step from 0 to 1.

        Raises:
            UserError: it is not among what there is to choose.
        """
        count = self.facts["ranks"][self.ranks_at] if ranks is None else ranks
        for control, what, value, offered in (
            ("schedule_at", "schedule", name, self.facts["names"]),
            ("ranks_at", "ranks", ranks, self.facts["ranks"]),
            ("microbatches_at", "microbatches", microbatches, [count * times for times in self.facts["rounds"]]),
            ("cost_at", "costs", costs, list(self.known)),
        ):
            if value is not None and value not in offered:
                raise UserError(f"{what} = {value!r} is not in the player: choose {', '.join(map(str, offered))}")
            if value is not None:
                setattr(self, control, offered.index(value))
        if share is not None:
            if not 0 <= share <= 1:
                raise UserError(f"share = {share!r} must lie between 0, the step's start, and 1, its end")
            self.share = float(share)

    @property
    def alt(self) -> str:
        """The picture in a sentence."""
        timeline, schedule = self.timeline, self.schedule
        return (
            f"Schedule player, {schedule.name} on {schedule.n_ranks} ranks with {schedule.total_microbatches} "
            f"microbatches and communication of {list(self.known)[self.cost_at]}, at time {self.now:.4g} of "
            f"{timeline.span:.4g}: bubble {timeline.bubble:.4g}, at most {max(schedule.peak_activations)} activations."
        )

    def figure(self) -> Figure:
        """The same picture without a browser."""
        return schedule_figure(self.timeline, now=None if self.share == 1 else self.now)

    def _repr_mimebundle_(self, **options: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        return with_picture(super()._repr_mimebundle_(**options), self.alt, png(self.figure()))

    def save_html(self, path: str | Path) -> Path:
        """Write the player as one page that needs nothing else: no kernel, no network. Returns the path."""
        return save_page(path, MODULE, "Schedule player", self.alt, {name: getattr(self, name) for name in STATE})


def stage_costs(schedule: Schedule, costs: PhaseCosts) -> PhaseCosts:
    """Of one stage, from those of a rank's share of the model."""
    return costs.scaled(schedule.n_ranks / schedule.n_stages)
