"""The ways to send tokens to experts on other processes, by name: the `dispatch` of a ParallelPlan.

| name    | tokens travel as                       | results come back as | by whom                                             |
|---------|----------------------------------------|----------------------|-----------------------------------------------------|
| plain   | what they are: BF16 in a BF16 model    | the same             | torch.distributed, any machine                      |
| fp8     | E4M3 with power-of-two scales          | BF16                 | torch.distributed, any machine                      |
| deep_ep | E4M3 with power-of-two scales          | BF16                 | DeepSeek's kernels, where the package is installed  |

`plain` is exact and for comparison; `fp8` is the report's (section 3.3.3), at about half of its bytes there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch.distributed as dist

from dsv3_mini.errors import ConfigError
from dsv3_mini.parallel import deep_ep
from dsv3_mini.parallel.expert_parallel import Stretch, legs
from dsv3_mini.parallel.fp8_hop import Fp8Hop
from dsv3_mini.parallel.hop import Hop

Group = dist.ProcessGroup


@dataclass(frozen=True)
class Dispatch:
    """One of them.

    way: from the number of experts, the group across nodes, the group inside a node, and a function that makes the group of
    both together. missing: why this machine cannot run it and what to use, or None.
    """

    way: Callable[[int, Group, Group, Callable[[], Group]], tuple[Stretch, ...]]
    missing: Callable[[], str | None] = lambda: None


DISPATCHES: dict[str, Dispatch] = {
    "plain": Dispatch(lambda experts, nodes, inside, both: legs(experts, nodes, inside, Hop)),
    "fp8": Dispatch(lambda experts, nodes, inside, both: legs(experts, nodes, inside, Fp8Hop)),
    "deep_ep": Dispatch(lambda experts, nodes, inside, both: (deep_ep.DeepEpLeg(experts, both()),), deep_ep.missing),
}


def dispatch(name: str) -> Dispatch:
    """The one of that name. ConfigError says why, where there is none or this machine cannot run it."""
    if name not in DISPATCHES:
        raise ConfigError(f"dispatch {name!r} is not known: choose one of {', '.join(DISPATCHES)}")
    if reason := DISPATCHES[name].missing():
        raise ConfigError(f"dispatch {name!r} cannot run here: {reason}")
    return DISPATCHES[name]
