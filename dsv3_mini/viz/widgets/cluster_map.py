"""The cluster map: a token's copies travel to its experts, under any limit of nodes.

The page's half is cluster_map.js. It gets all tokens, limits and journeys at once, and the places of figures/cluster_map.py,
so that nothing is asked of Python while one plays, steps or points.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import anywidget
import traitlets
from jaxtyping import Int
from torch import Tensor

from dsv3_mini.errors import UserError
from dsv3_mini.parallel.traffic import INSIDE_SPEED, NETWORK_SPEED, Cluster, Journey, journey
from dsv3_mini.viz.figures import cluster_map as figures
from dsv3_mini.viz.figures import png
from dsv3_mini.viz.figures.cluster_map import View, cluster_figure, layout
from dsv3_mini.viz.figures.routing import visible
from dsv3_mini.viz.widgets.explorer import with_picture
from dsv3_mini.viz.widgets.page import save_page

MODULE = Path(__file__).with_suffix(".js")
ONCE_PER = ("node", "expert")
STATE = ("scene", "words", "home", "limits", "chosen", "journeys", "token", "limit", "once_per")


class ClusterMap(anywidget.AnyWidget):
    """Controls: the token (by step, slider, word or play), the limit of nodes, and what gets a copy: a node or an expert.

    Args:
        cluster: where the experts lie.
        words: the text of each token. home: the GPU that each token lies on.
        chosen: for each limit M, the experts of each token, the best first.

    Raises:
        UserError: there is nothing to show, or the lengths do not agree.
    """

    _esm = MODULE
    scene = traitlets.Dict(help="boxes, sizes and colours").tag(sync=True)
    words = traitlets.List().tag(sync=True)
    home = traitlets.List().tag(sync=True)
    limits = traitlets.List().tag(sync=True)
    chosen = traitlets.List(help="for each limit, for each token its experts").tag(sync=True)
    journeys = traitlets.Dict(help="once per what -> for each limit and token [network, inside]").tag(sync=True)
    token = traitlets.Int(0).tag(sync=True)
    limit = traitlets.Int().tag(sync=True)
    once_per = traitlets.Unicode("node").tag(sync=True)

    def __init__(
        self,
        cluster: Cluster,
        words: Sequence[str],
        home: Sequence[int],
        chosen: Mapping[int, Int[Tensor, "T k"]],
    ) -> None:
        if not words or not chosen:
            raise UserError("the cluster map has no token to show: give it words, and chosen experts for each limit")
        lengths = {len(words), len(home), *(len(rows) for rows in chosen.values())}
        if len(lengths) > 1:
            raise UserError(
                f"the cluster map got {sorted(lengths)} tokens: words, home and chosen are one for each token"
            )
        limits = sorted(chosen)
        experts = [chosen[limit].tolist() for limit in limits]
        largest = max(expert for rows in experts for row in rows for expert in row)
        if largest >= cluster.n_experts:
            raise UserError(f"expert {largest} is not in the cluster: it has {cluster.n_experts}")
        self.cluster = cluster
        self.trips: dict[tuple[str, int], list[Journey]] = {
            (once_per, limit): [journey(cluster, row, start, once_per) for row, start in zip(rows, home, strict=True)]
            for once_per in ONCE_PER
            for limit, rows in zip(limits, experts, strict=True)
        }
        super().__init__(
            scene=scene(cluster),
            words=[visible(word) for word in words],
            home=[int(gpu) for gpu in home],
            limits=limits,
            chosen=experts,
            journeys={
                once_per: [
                    [
                        [list(map(list, trip.network)), list(map(list, trip.inside))]
                        for trip in self.trips[once_per, limit]
                    ]
                    for limit in limits
                ]
                for once_per in ONCE_PER
            },
            limit=limits[-1],
        )

    def set(self, token: int | None = None, limit: int | None = None, once_per: str | None = None) -> None:
        """Move the controls, as a reader would.

        Raises:
            UserError: there is no such token, limit, or way to send.
        """
        for name, value in (("token", token), ("limit", limit), ("once_per", once_per)):
            if value is not None:
                setattr(self, name, value)

    @traitlets.validate("token")
    def _one_of_the_words(self, proposal: Any) -> int:
        if not 0 <= proposal["value"] < max(1, len(self.words)):
            raise UserError(f"token {proposal['value']} is not there: the map has {len(self.words)}, counted from 0")
        return proposal["value"]

    @traitlets.validate("limit")
    def _one_of_the_limits(self, proposal: Any) -> int:
        if self.limits and proposal["value"] not in self.limits:
            raise UserError(f"limit {proposal['value']} is not there: the map has {', '.join(map(str, self.limits))}")
        return proposal["value"]

    @traitlets.validate("once_per")
    def _one_of_the_ways(self, proposal: Any) -> str:
        if proposal["value"] not in ONCE_PER:
            raise UserError(f"once_per {proposal['value']!r} is no way to send: choose {' or '.join(ONCE_PER)}")
        return proposal["value"]

    @property
    def journey(self) -> Journey:
        """The messages of the token that the map shows."""
        return self.trips[self.once_per, self.limit][self.token]

    @property
    def received(self) -> tuple[int, ...]:
        """What came to each node over the network, up to and with the token that the map shows."""
        return self.view().received

    @property
    def experts(self) -> list[int]:
        """The experts of the token that the map shows."""
        return self.chosen[self.limits.index(self.limit)][self.token]

    @property
    def alt(self) -> str:
        """The picture in a sentence."""
        nodes = {self.cluster.node_of(self.cluster.gpu_of(expert)) for expert in self.experts}
        return (
            f"Cluster map, at most {self.limit} nodes: token {self.token + 1} of {len(self.words)}, "
            f"“{self.words[self.token]}”, on node {self.cluster.node_of(self.home[self.token])}, has {len(self.experts)} "
            f"experts on {len(nodes)} nodes; {len(self.journey.network)} messages between nodes, "
            f"{len(self.journey.inside)} inside."
        )

    def view(self) -> View:
        """What the map shows, as the still picture takes it."""
        name = f"“{self.words[self.token].strip()}”, M = {self.limit}"
        trips = self.trips[self.once_per, self.limit][: self.token + 1]
        return View.of(self.cluster, name, self.experts, self.home[self.token], trips)

    def png(self) -> bytes:
        """The still picture."""
        return png(cluster_figure(self.cluster, self.view()))

    def _repr_mimebundle_(self, **options: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        return with_picture(super()._repr_mimebundle_(**options), self.alt, self.png())

    def save_html(self, path: str | Path) -> Path:
        """Write the map as one page that needs nothing else: no kernel, no network. Returns the path."""
        state = {name: getattr(self, name) for name in STATE}
        return save_page(path, MODULE, "Cluster map", self.alt, state)


def scene(cluster: Cluster) -> dict[str, Any]:
    """What cluster_map.js draws, as plain numbers: the boxes, what is where, and the look of it."""
    plan = layout(cluster)

    def corners(boxes: Sequence[figures.Box]) -> list[list[float]]:
        return [[round(number, 2) for number in (box.x, box.y, box.width, box.height)] for box in boxes]

    return {
        **asdict(cluster),
        "width": figures.WIDTH,
        "height": plan.height,
        "node_boxes": corners(plan.nodes),
        "gpu_boxes": corners(plan.gpus),
        "expert_boxes": corners(plan.experts),
        "road": corners([plan.road])[0],
        "pad": figures.PAD,
        "foot": figures.FOOT,
        "lane": figures.LANE,
        "strip": figures.STRIP,
        "spread": figures.SPREAD,
        "faster": INSIDE_SPEED / NETWORK_SPEED,
        "colours": {
            "home": figures.HOME, "network": figures.NETWORK, "inside": figures.INSIDE, "chosen": figures.CHOSEN,
            "idle": figures.IDLE, "line": figures.LINE, "quiet": figures.QUIET,
        },
    }  # fmt: skip
