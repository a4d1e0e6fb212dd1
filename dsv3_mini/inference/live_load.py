"""The load of experts while a model is in use: summed over the last batches, so that a placement can follow it.

The report measures what its online service does and places experts anew about every ten minutes (section 3.4).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from dsv3_mini.errors import ConfigError, DataError
from dsv3_mini.model.router import Routing


class LoadWindow:
    """The sum of `out.routing`'s loads over the last `batches` batches.

    Raises:
        ConfigError: `batches` is no whole number of at least 1.
    """

    def __init__(self, batches: int) -> None:
        if not isinstance(batches, int) or isinstance(batches, bool) or batches < 1:
            raise ConfigError(f"batches = {batches!r} must be a whole number of at least 1")
        self._loads: deque[Int[Tensor, "l e"]] = deque(maxlen=batches)

    def add(self, routing: Sequence[Routing]) -> None:
        """Take in one batch: the routing of each sparse layer, in order.

        Raises:
            DataError: no layers, or others than in the batches before.
        """
        if not routing:
            raise DataError("routing has no layers: the model has no experts to place")
        load = torch.stack([layer.load.detach().cpu() for layer in routing])
        if self._loads and self._loads[0].shape != load.shape:
            raise DataError(
                f"routing of {list(load.shape)} [layers, experts] does not fit {list(self._loads[0].shape)} of earlier "
                "batches: use one window for each model"
            )
        self._loads.append(load)

    @property
    def load(self) -> Int[Tensor, "l e"]:
        """Tokens that chose each expert, by layer.

        Raises:
            DataError: nothing was added yet.
        """
        if not self._loads:
            raise DataError("no batch was added yet: there is no load to go by")
        return torch.stack(tuple(self._loads)).sum(dim=0)
