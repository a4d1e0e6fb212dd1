"""Lesson 21's checks: each right answer accepted, each wrong one refused with its own hint, a blank one only noted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lesson_answers import (  # noqa: F401
    test_blank_is_unsolved_and_every_exercise_knows_mistakes,
    test_right_answers_are_accepted,
    test_wrong_answers_get_their_own_hint,
)

from dsv3_mini.config import ModelConfig
from dsv3_mini.course.checks import lesson_21 as check
from dsv3_mini.course.checks.framework import Exercise, exercises_of
from dsv3_mini.errors import ConfigError
from dsv3_mini.parallel.dry_run.sketch import lay_out

# ---- right answers, each written in two ways ---------------------------------------------------------------------------


def state_by_bytes(others: int, experts: int, pp: int, ep: int, data: int) -> float:
    return (6 * others + 6 * experts / ep + 8 * (others + experts) / data) / pp


def state_by_zero(others: int, experts: int, pp: int, ep: int, data: int) -> float:
    stage = {"others": (others / pp, data), "experts": (experts / pp / ep, data // ep)}
    return sum(2 * held + 4 * held + 4 * held / sharers + 2 * 2 * held / sharers for held, sharers in stage.values())


def wires_by_loads(tokens: int, row: int, nodes_reached: float, gpus_reached: float, nodes: int, gpus: int) -> float:
    leaving = tokens * row
    loads = {50e9: nodes_reached * (nodes - 1) / nodes, 160e9: gpus_reached * (gpus - 1) / gpus}
    return max(leaving * copies / speed for speed, copies in loads.items())


def cost_by_steps(step_seconds: float, batch_tokens: int, gpus: int, tokens: int, dollars: float) -> list[float]:
    seconds = gpus * step_seconds * (tokens / batch_tokens)
    return [seconds / 60 / 60, dollars * seconds / 60 / 60]


def cost_by_speed(
    step_seconds: float, batch_tokens: int, gpus: int, tokens: int, dollars: float
) -> tuple[float, float]:
    a_second_each = batch_tokens / step_seconds / gpus
    hours = tokens / a_second_each / 3600
    return hours, dollars * hours


def layout_by_list(gpus: int, layers: int, experts: int, fits: Callable[[int, int], bool]) -> tuple[int, int] | None:
    pps = [n for n in range(1, gpus + 1) if gpus % n == 0 and (n == 1 or 2 * n <= layers)]
    found = sorted((ep, pp) for pp in pps for ep in range(1, experts + 1) if experts % ep == 0 and gpus // pp % ep == 0)
    return next(((pp, ep) for ep, pp in found if fits(pp, ep)), None)


def layout_by_recursion(gpus: int, layers: int, experts: int, fits: Callable[[int, int], bool], ep: int = 1) -> Any:
    if ep > experts:
        return None
    depths = (pp for pp in range(1, layers + 1) if gpus % (pp * ep) == 0 and (pp == 1 or pp <= layers / 2))
    here = next((pp for pp in depths if experts % ep == 0 and fits(pp, ep)), None)
    return (here, ep) if here else layout_by_recursion(gpus, layers, experts, fits, ep + 1)


def mfu_by_rate(hours: float, total: int, activated: int, attention: float, peak: float) -> float:
    return (1e12 / 3600 / hours) * (2 * activated + 4 * activated + attention) / peak


RIGHT: list[tuple[Exercise, Callable[..., Any]]] = [
    (check.state_bytes, state_by_bytes),
    (check.state_bytes, state_by_zero),
    (check.wire_seconds, wires_by_loads),
    (
        check.wire_seconds,
        lambda t, row, n, g, nodes, gpus: t * row * max((n - n / nodes) / 5, (g - g / gpus) / 16) / 1e10,
    ),
    (check.run_cost, cost_by_steps),
    (check.run_cost, cost_by_speed),
    (check.choose_layout, layout_by_list),
    (check.choose_layout, layout_by_recursion),
    (check.mfu, mfu_by_rate),
    (check.mfu, lambda h, total, n, a, peak: (1e12 * a + 6e12 * n) / peak / h / 3600),
]


# ---- wrong answers -----------------------------------------------------------------------------------------------------


def search(
    gpus: int, layers: int, experts: int, fits: Callable[[int, int], bool], eps: Callable[[int], bool] | None = None,
    pps: Callable[[int], bool] | None = None, together: Callable[[int, int], bool] | None = None, depth_first: bool = False,
) -> tuple[int, int] | None:  # fmt: skip
    eps = eps or (lambda ep: experts % ep == 0)
    pps = pps or (lambda pp: gpus % pp == 0 and (pp == 1 or 2 * pp <= layers))
    together = together or (lambda pp, ep: gpus // pp % ep == 0)
    both = [(pp, ep) for ep in range(1, experts + 1) if eps(ep) for pp in range(1, layers + 1) if pps(pp)]
    found = [(pp, ep) for pp, ep in both if together(pp, ep) and fits(pp, ep)]
    if depth_first:
        found.sort()
    return found[0] if found else None


def widest(gpus: int, layers: int, experts: int, fits: Callable[[int, int], bool]) -> tuple[int, int] | None:
    for ep in range(experts, 0, -1):
        for pp in range(1, layers // 2 + 1):
            if experts % ep == 0 and gpus % pp == 0 and gpus // pp % ep == 0 and fits(pp, ep):
                return pp, ep
    return None


def deepest(gpus: int, layers: int, experts: int, fits: Callable[[int, int], bool]) -> tuple[int, int] | None:
    for ep in range(1, experts + 1):
        for pp in range(layers // 2, 0, -1):
            if experts % ep == 0 and gpus % pp == 0 and gpus // pp % ep == 0 and fits(pp, ep):
                return pp, ep
    return None


def every(gpus: int, layers: int, experts: int, fits: Callable[[int, int], bool]) -> list[tuple[int, int]]:
    found = [(pp, ep) for pp in range(1, gpus + 1) for ep in range(1, experts + 1)]
    found = [(pp, ep) for pp, ep in found if gpus % pp == 0 and experts % ep == 0 and gpus // pp % ep == 0]
    return [(pp, ep) for pp, ep in found if (pp == 1 or 2 * pp <= layers) and fits(pp, ep)]


def two(n: int) -> bool:
    return n.bit_count() == 1


WRONG: list[tuple[Exercise, Callable[..., Any], str]] = [
    (check.state_bytes, lambda o, x, pp, ep, data: 14 * (o / pp + x / pp / ep), "every GPU keeps the optimizer"),
    (check.state_bytes, lambda o, x, pp, ep, data: 14 * (o + x) / (pp * data), "that is ZeRO-3"),
    (check.state_bytes, lambda o, x, pp, ep, data: (6 + 8 / data) * (o + x) / pp, "every GPU holds all experts"),
    (check.state_bytes, lambda o, x, pp, ep, data: (6 / ep + 8 / data) * (o + x) / pp, "only the experts are"),
    (check.state_bytes, lambda o, x, pp, ep, data: 6 * (o + x / ep) + 8 * (o + x) / data, "the stages are missing"),
    (check.state_bytes, lambda o, x, pp, ep, data: (6 + 8 / data) * (o + x / ep) / pp, "most of them do not hold it"),
    (check.state_bytes, lambda o, x, pp, ep, data: (6 * o + 6 * x / ep + 12 * (o + x) / data) / pp, "2 bytes each here"),
    (check.state_bytes, lambda o, x, pp, ep, data: (4 * o + 4 * x / ep + 8 * (o + x) / data) / pp, "gradients take 4 bytes"),
    (check.state_bytes, lambda o, x, pp, ep, data: (2 * o + 2 * x / ep + 8 * (o + x) / data) / pp, "gradients are missing"),
    (check.wire_seconds, lambda t, row, n, g, nodes, gpus: t * row * max(n / 50e9, g / 160e9), "also to where it is"),
    (check.wire_seconds, lambda t, row, n, g, nodes, gpus: t * row * ((n - n / nodes) / 50e9 + (g - g / gpus) / 160e9), "add up"),
    (check.wire_seconds, lambda t, row, n, g, nodes, gpus: t * row * min((n - n / nodes) / 50e9, (g - g / gpus) / 160e9), "first"),
    (check.wire_seconds, lambda t, row, n, g, nodes, gpus: t * row * (g - g / nodes) / 50e9, "once for each *node*"),
    (check.wire_seconds, lambda t, row, n, g, nodes, gpus: t * row * max((n - n / nodes) / 160e9, (g - g / gpus) / 50e9), "changed places"),
    (check.wire_seconds, lambda t, row, n, g, nodes, gpus: t * row * max(n / nodes / 50e9, g / gpus / 160e9), "that stay"),
    (check.wire_seconds, lambda *a: 8 * wires_by_loads(*a), "not in bits"),
    (check.run_cost, lambda s, b, gpus, t, d: (t / b * s / 3600, d * t / b * s / 3600), "hours on the clock: every GPU"),
    (check.run_cost, lambda s, b, gpus, t, d: (t / b * s / 3600, d * gpus * t / b * s / 3600), "the dollars are right"),
    (check.run_cost, lambda s, b, gpus, t, d: (gpus * t / b * s / 60, d * gpus * t / b * s / 60), "minutes"),
    (check.run_cost, lambda s, b, gpus, t, d: (gpus * t / b * s, d * gpus * t / b * s), "GPU *seconds*"),
    (check.run_cost, lambda s, b, gpus, t, d: (gpus * 1e12 / b * s / 3600, d * gpus * 1e12 / b * s / 3600), "of a trillion"),
    (check.run_cost, lambda *a: cost_by_steps(*a)[0], "give both"),
    (check.run_cost, lambda *a: tuple(reversed(cost_by_steps(*a))), "hours first"),
    (check.choose_layout, lambda *a: search(*a, depth_first=True), "the shallowest pipeline comes first here"),
    (check.choose_layout, widest, "as *widely* as it can"),
    (check.choose_layout, deepest, "the *deepest* pipeline"),
    (check.choose_layout, lambda gpus, n, e, f: search(gpus, n, e, f, pps=lambda pp: gpus % pp == 0), "more stages than layers"),
    (check.choose_layout, lambda *a: search(*a, eps=lambda ep: True), "ep must divide `experts`"),
    (check.choose_layout, lambda *a: search(*a, together=lambda pp, ep: True), "ep must divide gpus // pp"),
    (check.choose_layout, lambda gpus, n, e, f: search(
        gpus, n, e, f, pps=lambda pp: pp == 1 or 2 * pp <= n, together=lambda pp, ep: gpus % pp or gpus // pp % ep == 0),
     "pp must divide `gpus`"),
    (check.choose_layout, lambda gpus, n, e, f: search(
        gpus, n, e, f, eps=lambda ep: two(ep) and e % ep == 0,
        pps=lambda pp: two(pp) and gpus % pp == 0 and (pp == 1 or 2 * pp <= n)),
     "only powers of two"),
    (check.choose_layout, lambda *a: layout_by_list(*a) or (1, 1), "so that nobody rents the machine"),
    (check.choose_layout, lambda *a: (p := layout_by_list(*a)) and (p[1], p[0]), "these are (ep, pp)"),
    (check.choose_layout, every, "choose one"),
    (check.mfu, lambda h, total, n, a, peak: 6e12 * total / (3600 * h * peak), "this is still the bug"),
    (check.mfu, lambda h, total, n, a, peak: (6 * total + a) * 1e12 / (3600 * h * peak), "No GPU is faster than itself"),
    (check.mfu, lambda h, total, n, a, peak: 6e12 * n / (3600 * h * peak), "attention is missing"),
    (check.mfu, lambda h, total, n, a, peak: (2 * n + a) * 1e12 / (3600 * h * peak), "are the forward pass"),
    (check.mfu, lambda h, total, n, a, peak: (6 * n + a) * 1e12 / (h * peak), "3,600 are missing"),
    (check.mfu, lambda h, total, n, a, peak: (6 * n + a) * 1e12 / (3600 * h * peak) / 2048, "GPU hours already"),
    (check.mfu, lambda h, total, n, a, peak: (6 * n + a) * 1e14 / (3600 * h * peak), "in percent"),
]  # fmt: skip


def test_the_rules_of_the_search_are_the_packages() -> None:
    """What an exercise calls lawful is what `lay_out` lays out: the same layouts of 64 GPUs, one after the other."""
    cfg = ModelConfig.preset("16b")
    experts, layers = cfg.n_routed_experts, cfg.num_hidden_layers
    lawful = set(check._lawful(64, layers, experts))
    for pp in range(1, layers + 1):
        for ep in range(1, experts + 1):
            try:
                plan = lay_out(cfg, 64, pp, ep)
            except ConfigError:
                assert (pp, ep) not in lawful
            else:
                assert (pp, ep) in lawful and (plan.pp, plan.ep, plan.processes) == (pp, ep, 64)


def test_the_lessons_exercises_in_their_order() -> None:
    assert list(exercises_of(check)) == ["state_bytes", "wire_seconds", "run_cost", "choose_layout", "mfu"]
