"""Widgets of lesson 23: experts placed before and after redundancy, and a deployment to plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import ipywidgets
import torch
from jaxtyping import Int
from matplotlib.figure import Figure
from torch import Tensor

from dsv3_mini.config import ModelConfig
from dsv3_mini.inference.placement import Placement, place_experts
from dsv3_mini.serving import DECODE, H800_CARD, PREFILL, Lengths, Served, Unit, poisson, simulate
from dsv3_mini.viz.figures.serving import placement_figure, service_figure
from dsv3_mini.viz.widgets.explorer import Explorer

SECONDS = 4.0  # of arrivals in a plan
RATES = (20, 50, 100, 200, 400, 800, 1200)
NETWORKS = (12.5, 25.0, 50.0, 100.0)  # GB/s


def in_order(layers: int, experts: int, gpus: int) -> Placement:
    """Without redundancy, and without a thought: the first experts on the first GPU."""
    return Placement(torch.arange(experts).repeat(layers, 1), experts, gpus)


def placement_explorer(
    loads: Mapping[str, Int[Tensor, "l e"]], groups: int, gpus: tuple[int, ...] = (4, 8)
) -> Explorer:
    """Experts in order, and placed with redundant slots for each GPU, for the load of one of several texts.

    Args:
        loads: by the name of the text. groups: runs of experts that may have to stay on one node of two GPUs.
    """
    layers, experts = next(iter(loads.values())).shape

    def draw(text: str, layer: int, gpus: int, redundant: int, rule: str) -> Figure:
        load, slots = loads[text], experts + redundant * gpus
        nodes = gpus // 2 if rule == "groups stay on a node" else None
        placed = place_experts(load, slots, gpus, nodes=nodes, groups=groups if nodes else None)
        return placement_figure(
            {"In order": in_order(layers, experts, gpus), f"{slots} slots": placed}, load, layer - 1
        )

    room = ipywidgets.Layout(width="max-content")
    return Explorer(
        draw,
        "The load of each GPU as stacked bars of its experts, once with experts in the order of their numbers and once with "
        "replicas of the busy ones spread evenly; a dashed line marks the busiest GPU.",
        text=ipywidgets.Dropdown(options=tuple(loads), description="text", layout=room),
        layer=ipywidgets.IntSlider(value=1, min=1, max=layers, description="sparse layer", continuous_update=False),
        gpus=ipywidgets.Dropdown(options=gpus, value=gpus[-1], description="GPUs", layout=room),
        redundant=ipywidgets.IntSlider(
            value=1, min=0, max=3, description="redundant slots on a GPU", continuous_update=False
        ),
        rule=ipywidgets.Dropdown(
            options=("any GPU", "groups stay on a node"), description="replicas go to", layout=room
        ),
    )


def known_services() -> dict[str, tuple[ModelConfig, Unit, Unit]]:
    """The released model on the report's units, and the 16b on nodes of eight cards, with eight redundant experts."""
    small = ModelConfig.preset("16b")
    node = Unit("node", nodes=1, tp=1, slots=small.n_routed_experts + 8, card=H800_CARD)
    return {
        "671b on the report's units": (ModelConfig.preset("671b"), PREFILL, DECODE),
        "16b, each unit one node": (small, node, node),
    }


class Planner(Explorer):
    """Plan a service: units, requests, wires, and what those who wait get to see; `served` is what the picture shows.

    Args:
        services: name -> (model, prefill unit, decode unit); without any, the report's, and a small one of single nodes.
        seconds: how long requests arrive. seed: of when they come and how long they are.
    """

    def __init__(
        self,
        services: Mapping[str, tuple[ModelConfig, Unit, Unit]] | None = None,
        seconds: float = SECONDS,
        seed: int = 0,
    ) -> None:
        self.services = services or known_services()
        self.seconds, self.seed = seconds, seed
        self.served: Served | None = None
        super().__init__(
            self._plan,
            "Two curves, the share of requests that waited no longer than a time: to the first token and per output token. "
            "Beside them how long the prefill and the decode pool were at work, and how full the cache was at most.",
            **self._controls(),
        )

    def _plan(
        self, service: str, rate: int, prompt: int, answer: int, prefill_units: int, decode_units: int, network: float,
        overlap: bool, drafts: bool,
    ) -> Figure:  # fmt: skip
        cfg, *units = self.services[service]
        wired = [
            replace(unit, card=replace(unit.card, network=1e9 * network), micro_batches=2 if overlap else 1)
            for unit in units
        ]
        count = max(1, round(rate * self.seconds))
        asked = poisson(rate, count, Lengths(prompt, 0.5), Lengths(answer, 0.5), self.seed)
        self.served = simulate(
            cfg,
            asked.cut(cfg.max_position_embeddings),
            *wired,
            prefill_units=prefill_units,
            decode_units=decode_units,
            acceptance=0.85 if drafts else 0.0,
            seed=self.seed,
        )
        return service_figure(self.served)

    def _controls(self) -> dict[str, ipywidgets.ValueWidget]:
        wide = ipywidgets.Layout(width="max-content")

        def count(value: int, least: int, most: int, step: int, description: str) -> ipywidgets.IntSlider:
            return ipywidgets.IntSlider(value, least, most, step, description=description, continuous_update=False)

        def one_of(value: float, options: tuple[float, ...], description: str) -> ipywidgets.SelectionSlider:
            return ipywidgets.SelectionSlider(
                options=options, value=value, description=description, continuous_update=False
            )

        return {
            "service": ipywidgets.Dropdown(options=tuple(self.services), description="service", layout=wide),
            "rate": one_of(100, RATES, "requests a second"),
            "prompt": count(2048, 256, 8192, 256, "prompt (tokens)"),
            "answer": count(250, 50, 1000, 50, "answer (tokens)"),
            "prefill_units": count(1, 1, 16, 1, "prefill units"),
            "decode_units": count(1, 1, 4, 1, "decode units"),
            "network": one_of(50.0, NETWORKS, "network (GB/s a card)"),
            "overlap": ipywidgets.Checkbox(value=True, description="two micro-batches in turn"),
            "drafts": ipywidgets.Checkbox(value=False, description="multi-token prediction drafts"),
        }
