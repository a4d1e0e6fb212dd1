"""Lesson 21, the cluster: the checks. References count GPU by GPU, copy by copy, and try every layout."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from torch import Generator, randint

from dsv3_mini.course.checks.framework import Case, Exercise, Mistake, Property

Bytes = Callable[[int, int, int, int, int], float]


def _whole(g: Generator, least: int, most: int) -> int:
    return int(randint(least, most, (), generator=g))


# ---- state_bytes -------------------------------------------------------------------------------------------------------


def _state_bytes(others: int, experts: int, pp: int, ep: int, data: int) -> float:
    """Parameter by parameter of the two kinds: on how many GPUs of the stage it lies, and who has its optimizer."""
    total = Fraction(0)
    for count, spread in ((others, 1), (experts, ep)):
        on_stage = Fraction(count, pp)
        held = on_stage / spread  # by each GPU
        copies = data // spread  # GPUs that hold the same, and share its optimizer
        total += held * (2 + 4) + held / copies * (4 + 2 + 2)
    return float(total)


def _with(held: Callable[..., float], shared: Callable[..., float], grown: int = 6, kept: int = 8) -> Bytes:
    return lambda o, x, pp, ep, data: grown * held(o, x, pp, ep, data) + kept * shared(o, x, pp, ep, data)


def _held(o: int, x: int, pp: int, ep: int, data: int) -> float:
    return (o + x / ep) / pp


def _shared(o: int, x: int, pp: int, ep: int, data: int) -> float:
    return (o + x) / pp / data


def _model(what: str, pp: int, ep: int, data: int) -> Case:
    def inputs(g: Generator) -> tuple[int, ...]:
        unit = pp * data * ep
        return unit * _whole(g, 10_000, 20_000), unit * _whole(g, 300_000, 700_000), pp, ep, data

    return Case(what, inputs)


def _one_gpu(answer: Bytes) -> bool:
    return abs(answer(100, 900, 1, 1, 1) - 14_000) < 1e-6


state_bytes = Exercise(
    name="state_bytes",
    reference=_state_bytes,
    cases=[
        _model("2 stages, experts over 4 of 8 GPUs", 2, 4, 8),
        _model("16 stages, experts over 64 of 128 GPUs", 16, 64, 128),
        _model("one stage, experts over all 8 GPUs", 1, 8, 8),
    ],
    mistakes=[
        Mistake(
            lambda o, x, pp, ep, data: 14 * _held(o, x, pp, ep, data),
            "every GPU keeps the optimizer of all that it holds: under ZeRO-1 the GPUs that hold the same parameters share "
            "it, so that each has 8 bytes of its own piece only.",
        ),
        Mistake(
            lambda o, x, pp, ep, data: 14 * _shared(o, x, pp, ep, data),
            "you share out weights and gradients, too: that is ZeRO-3. Here only the optimizer's 8 bytes are shared, and the "
            "6 bytes of weight and gradient lie on every GPU that computes with them.",
        ),
        Mistake(
            _with(lambda o, x, pp, ep, data: (o + x) / pp, _shared),
            "every GPU holds all experts of its stage: they are spread over `ep` GPUs, and each holds a part.",
        ),
        Mistake(
            _with(lambda o, x, pp, ep, data: (o + x) / pp / ep, _shared),
            "you spread everything over `ep` GPUs: only the experts are. Attention, embedding and the rest lie whole on every "
            "GPU of the stage.",
        ),
        Mistake(
            _with(lambda o, x, pp, ep, data: o + x / ep, lambda o, x, pp, ep, data: (o + x) / data),
            "the stages are missing: a GPU has the layers of its own pipeline rank only, one part in `pp`.",
        ),
        Mistake(
            _with(_held, lambda o, x, pp, ep, data: (o + x / ep) / pp / data),
            "an expert lies on data / ep GPUs, and that many share its optimizer: you let all `data` share what each of them "
            "holds, and most of them do not hold it.",
        ),
        Mistake(
            _with(_held, _shared, kept=12),
            "Adam's moments take 2 bytes each here, not 4: they are kept in BF16 (section 3.3.2).",
        ),
        Mistake(
            _with(_held, _shared, grown=4),
            "gradients take 4 bytes: they are summed over many micro-batches, in FP32.",
        ),
        Mistake(
            _with(_held, _shared, grown=2),
            "the gradients are missing: between micro-batches they lie there whole, 4 bytes for each parameter held.",
        ),
    ],
    properties=[
        Property(
            "one GPU alone has 14 bytes of everything", _one_gpu, "with pp = ep = data = 1 nothing is spread or shared."
        )
    ],
)


# ---- wire_seconds ------------------------------------------------------------------------------------------------------

NETWORK, INSIDE = 50e9, 160e9


def _wire_seconds(tokens: int, row: int, nodes_reached: float, gpus_reached: float, nodes: int, gpus: int) -> float:
    """Copy by copy: one in `nodes` stays on the node, and one in `gpus` is there when it comes to its node."""
    away = nodes_reached - nodes_reached / nodes
    handed_on = gpus_reached - gpus_reached / gpus
    return max(tokens * row * away / NETWORK, tokens * row * handed_on / INSIDE)


def _travelling(what: str, network: bool, nodes: int, gpus: int) -> Case:
    def inputs(g: Generator) -> tuple[Any, ...]:
        reached = _whole(g, 20, 40) / 10
        on_each = (_whole(g, 11, 17) if network else _whole(g, 45, 70)) / 10
        return _whole(g, 2000, 9000), 2 * _whole(g, 1000, 8000), reached, reached * on_each, nodes, gpus

    return Case(what, inputs)


def _alone(answer: Callable[..., float]) -> bool:
    return abs(answer(10**6, 1000, 1.0, 4.0, 1, 8) - 10**6 * 1000 * 3.5 / INSIDE) < 1e-9


wire_seconds = Exercise(
    name="wire_seconds",
    reference=_wire_seconds,
    cases=[
        _travelling("5 nodes, few experts on each", True, 5, 8),
        _travelling("4 nodes, many experts on each", False, 4, 8),
        _travelling("16 nodes of 4 GPUs", True, 16, 4),
    ],
    mistakes=[
        Mistake(
            lambda t, row, n, g, nodes, gpus: max(t * row * n / NETWORK, t * row * g / INSIDE),
            "you send every copy, also to where it is: one node in `nodes` is the token's own, and on each node one GPU in "
            "`gpus` has the copy already when it arrives.",
        ),
        Mistake(
            lambda t, row, n, g, nodes, gpus: t * row * (n * (1 - 1 / nodes) / NETWORK + g * (1 - 1 / gpus) / INSIDE),
            "you add up the two wires: they work at one time, one copy on the network while another is handed on. The slower "
            "one counts.",
        ),
        Mistake(
            lambda t, row, n, g, nodes, gpus: min(
                t * row * n * (1 - 1 / nodes) / NETWORK, t * row * g * (1 - 1 / gpus) / INSIDE
            ),
            "this is the wire that is done first: the exchange is over when the slower one is.",
        ),
        Mistake(
            lambda t, row, n, g, nodes, gpus: t * row * g * (1 - 1 / nodes) / NETWORK,
            "a copy crosses the network for each GPU here: it crosses once for each *node*, and is handed on there over NVLink.",
        ),
        Mistake(
            lambda t, row, n, g, nodes, gpus: max(
                t * row * n * (1 - 1 / nodes) / INSIDE, t * row * g * (1 - 1 / gpus) / NETWORK
            ),
            "the speeds have changed places: the network (InfiniBand) has 50e9 bytes a second, NVLink inside a node 160e9.",
        ),
        Mistake(
            lambda t, row, n, g, nodes, gpus: max(t * row * n / nodes / NETWORK, t * row * g / gpus / INSIDE),
            "these are the copies that stay: one in `nodes` does, and the others, 1 - 1 / nodes, travel.",
        ),
        Mistake(
            lambda t, row, n, g, nodes, gpus: 8 * _wire_seconds(t, row, n, g, nodes, gpus),
            "eight times too long: the speeds are in bytes a second already, not in bits.",
        ),
    ],
    properties=[
        Property(
            "a group on one node sends nothing over the network", _alone, "with nodes = 1 every copy stays on its node."
        )
    ],
)


# ---- run_cost ----------------------------------------------------------------------------------------------------------


def _run_cost(step_seconds: float, batch_tokens: int, gpus: int, tokens: int, dollars: float) -> tuple[float, float]:
    on_one_gpu = Fraction(step_seconds) * tokens / batch_tokens
    hours = float(on_one_gpu * gpus / 3600)
    return hours, hours * dollars


def _training(what: str, gpus: int) -> Case:
    def inputs(g: Generator) -> tuple[Any, ...]:
        batch = 4096 * _whole(g, 500, 9000)
        return _whole(g, 40, 400) / 16, batch, gpus, batch * _whole(g, 900, 9000), _whole(g, 5, 20) / 4

    return Case(what, inputs)


def _changed(change: Callable[..., tuple[float, float]]) -> Callable[..., tuple[float, float]]:
    def answer(step: float, batch: int, gpus: int, tokens: int, dollars: float) -> tuple[float, float]:
        return change(*_run_cost(step, batch, gpus, tokens, dollars), gpus, dollars, tokens)

    return answer


run_cost = Exercise(
    name="run_cost",
    reference=_run_cost,
    cases=[_training("256 GPUs", 256), _training("2,048 GPUs", 2048), _training("8 GPUs", 8)],
    mistakes=[
        Mistake(
            _changed(lambda h, d, gpus, price, tokens: (h / gpus, d / gpus)),
            "these are hours on the clock: every GPU is paid for while the clock runs, so multiply by the GPUs.",
        ),
        Mistake(
            _changed(lambda h, d, gpus, price, tokens: (h / gpus, d)),
            "the dollars are right, and the hours are those on the clock: GPU hours count every GPU.",
        ),
        Mistake(
            _changed(lambda h, d, gpus, price, tokens: (h * 60, d * 60)),
            "these are minutes: an hour has 3,600 seconds.",
        ),
        Mistake(
            _changed(lambda h, d, gpus, price, tokens: (h * 3600, d * 3600)),
            "these are GPU *seconds*: divide by 3,600.",
        ),
        Mistake(
            _changed(lambda h, d, gpus, price, tokens: (h * 1e12 / tokens, d * 1e12 / tokens)),
            "this is the price of a trillion tokens: `tokens` are to be read, all of them.",
        ),
        Mistake(
            _changed(lambda h, d, gpus, price, tokens: h),
            "give both, (GPU hours, dollars).",
        ),
        Mistake(
            _changed(lambda h, d, gpus, price, tokens: (d, h)),
            "hours first, then dollars.",
        ),
    ],
)  # fmt: skip


# ---- choose_layout -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fits:
    """Whether a layout's state leaves room on a GPU: `fits(pp, ep)`. It asks nothing about the rules."""

    others: int
    experts: int
    gpus: int
    room: float

    def __call__(self, pp: int, ep: int) -> bool:
        return (
            6 * _held(self.others, self.experts, pp, ep, 0) + 8 * (self.others + self.experts) / self.gpus <= self.room
        )


Layout = tuple[int, int] | None
Search = Callable[[int, int, int, Callable[[int, int], bool]], Any]


def _lawful(gpus: int, layers: int, experts: int, forget: str = "") -> list[tuple[int, int]]:
    """Every (pp, ep) that the rules allow; `forget` leaves one out."""
    return [
        (pp, ep)
        for pp in range(1, gpus + 1)
        for ep in range(1, experts + 1)
        if (gpus % pp == 0 or forget == "gpus")
        and (pp == 1 or 2 * pp <= layers or forget == "layers")
        and (pp <= layers)
        and (experts % ep == 0 or forget == "experts")
        and (gpus % pp or (gpus // pp) % ep == 0 or forget == "data")
    ]


def _searched(
    key: Callable[[tuple[int, int]], Any] = lambda p: (p[1], p[0]), forget: str = "", keep: Any = None
) -> Search:
    def answer(gpus: int, layers: int, experts: int, fits: Callable[[int, int], bool]) -> Layout:
        found = [p for p in _lawful(gpus, layers, experts, forget) if (keep is None or keep(p)) and fits(*p)]
        return min(found, key=key, default=None)

    return answer


def _power(p: tuple[int, int]) -> bool:
    return all(n & (n - 1) == 0 for n in p)


def _all(gpus: int, layers: int, experts: int, fits: Callable[[int, int], bool]) -> list[tuple[int, int]]:
    return [p for p in _lawful(gpus, layers, experts) if fits(*p)]


def _first_at_any_price(gpus: int, layers: int, experts: int, fits: Callable[[int, int], bool]) -> Layout:
    return _searched()(gpus, layers, experts, fits) or (1, 1)


def _turned(gpus: int, layers: int, experts: int, fits: Callable[[int, int], bool]) -> Layout:
    found = _searched()(gpus, layers, experts, fits)
    return found and found[::-1]


def _machine(what: str, gpus: int, layers: int, experts: int, others: float, all_experts: float, room: float) -> Case:
    return Case(what, lambda g: (gpus, layers, experts, Fits(round(others), round(all_experts), gpus, room)))


choose_layout = Exercise(
    name="choose_layout",
    reference=_searched(),
    cases=[
        _machine("a model of 12 layers and 24 experts on 96 GPUs", 96, 12, 24, 2e9, 100e9, 44.2e9),
        _machine("one of 10 layers and 60 experts on 72 GPUs", 72, 10, 60, 2e9, 100e9, 52.1e9),
        _machine("one of 10 layers and 64 experts on 48 GPUs", 48, 10, 64, 2e9, 100e9, 52.7e9),
        _machine("a 16B model on 16 GPUs", 16, 27, 64, 1.7e9, 14.6e9, 16.3e9),
        _machine("a 671B model on 256 GPUs", 256, 61, 256, 18e9, 665e9, 45e9),
        _machine("the same on 8 GPUs", 8, 61, 256, 18e9, 665e9, 60e9),
    ],
    mistakes=[
        Mistake(
            _searched(key=lambda p: p),
            "the shallowest pipeline comes first here: fewest GPUs to share the experts (ep) is asked for first, and only "
            "then the fewest pipeline ranks.",
        ),
        Mistake(
            _searched(key=lambda p: (-p[1], p[0])),
            "this spreads the experts as *widely* as it can: the fewest wires carry a token where ep is smallest.",
        ),
        Mistake(
            _searched(key=lambda p: (p[1], -p[0])),
            "of the layouts with that ep this is the *deepest* pipeline: a shallow one has the shorter bubble.",
        ),
        Mistake(
            _searched(forget="layers"),
            "this pipeline has more stages than layers: with pp above 1 a rank has two stages, each with a layer or more, so "
            "2 * pp must not be above `layers`.",
        ),
        Mistake(
            _searched(forget="experts"),
            "so many GPUs cannot share the experts evenly: ep must divide `experts`.",
        ),
        Mistake(
            _searched(forget="data"),
            "the GPUs of a pipeline rank do not come out even: ep must divide gpus // pp, a whole number of groups.",
        ),
        Mistake(
            _searched(forget="gpus"),
            "the GPUs do not come out even: pp must divide `gpus`.",
        ),
        Mistake(
            _searched(keep=_power),
            "only powers of two were tried: 3 GPUs may share 24 experts just as well.",
        ),
        Mistake(
            _first_at_any_price,
            "nothing fits here, and a layout came back: give None, so that nobody rents the machine.",
        ),
        Mistake(_turned, "these are (ep, pp): pipeline ranks first."),
        Mistake(_all, "these are all that fit: choose one."),
    ],
)


# ---- mfu (find the bug) ------------------------------------------------------------------------------------------------


def _mfu(hours: float, total: int, activated: int, attention: float, peak: float) -> float:
    return (6 * activated + attention) * 1e12 / (hours * 3600 * peak)


def _measured(what: str) -> Case:
    def inputs(g: Generator) -> tuple[Any, ...]:
        activated = _whole(g, 10**9, 4 * 10**10)
        return (
            1000.0 * _whole(g, 20, 300), activated * _whole(g, 3, 20), activated, 1e9 * _whole(g, 5, 60), 1e12 * _whole(g, 200, 2000)
        )  # fmt: skip

    return Case(what, inputs)


mfu = Exercise(
    name="mfu",
    reference=_mfu,
    cases=[_measured("a sparse model"), _measured("another one"), _measured("a third one")],
    mistakes=[
        Mistake(
            lambda h, total, n, a, peak: _mfu(h, total, total, a, peak),
            "all parameters are counted, and a token meets only those of its own eight experts: take `activated`. No GPU is "
            "faster than itself.",
        ),
        Mistake(
            lambda h, total, n, a, peak: _mfu(h, total, total, 0, peak),
            "this is still the bug: a token is multiplied with the `activated` parameters, not with all of them. (And attention "
            "is missing.)",
        ),
        Mistake(
            lambda h, total, n, a, peak: _mfu(h, total, n, 0, peak),
            "attention is missing: its products have no parameters, and are counted on their own, `attention` for each token.",
        ),
        Mistake(
            lambda h, total, n, a, peak: _mfu(h, total, n / 3, a, peak),
            "2 FLOPs for each parameter are the forward pass: with the backward pass they are 6.",
        ),
        Mistake(
            lambda h, total, n, a, peak: _mfu(h, total, n, a, peak) * 3600,
            "`peak` is FLOPs a second, and you compare it with an hour's: 3,600 are missing.",
        ),
        Mistake(
            lambda h, total, n, a, peak: _mfu(h, total, n, a, peak) / 2048,
            "hours are GPU hours already: the number of GPUs has no place here.",
        ),
        Mistake(
            lambda h, total, n, a, peak: 100 * _mfu(h, total, n, a, peak),
            "this is in percent: give a share, 0.39 and not 39.",
        ),
    ],
    tolerance=1e-9,
)
