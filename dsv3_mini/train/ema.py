"""The moving average of the weights, in the CPU's memory (report section 3.2.3).

    average  <-  decay x average + (1 - decay) x weight        after each step, starting at the first weights

It tells early how good a run will be when its learning rate has decayed. Read rarely, it need not take a GPU's memory, nor
its time: weights come over in a stream of their own, and a thread adds them up while the next step computes. All that the
next step waits for is that its weights have left before it changes them. Weights that lie on the CPU are added up at once:
there are no other hands that could do it.

Of a weight that processes share each averages its piece.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor


class MovingAverage(Mapping[str, Tensor]):
    """Name -> average of that weight, in FP32, on the CPU. Reading waits for the update that is under way.

    Args:
        weights: FP32 tensors, all on one device, that are changed in place by each step; none, and nothing is averaged.
        decay: what remains of the average at each update, from 0 to 1.
    """

    def __init__(self, weights: Mapping[str, Tensor], decay: float) -> None:
        self.decay = decay
        self._weights = {name: weight.detach() for name, weight in weights.items()}
        self._averages = {name: weight.to("cpu", copy=True) for name, weight in self._weights.items()}
        self._pending: Future[None] | None = None
        devices = {weight.device for weight in self._weights.values() if weight.is_cuda}
        self._device = devices.pop() if devices else None
        if self._device:
            self._stream, self._left = torch.cuda.Stream(self._device), torch.cuda.Event()
            self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="moving-average")
            # Pinned: what a GPU writes by itself must stay where it is.
            self._arrived = {n: torch.empty_like(average).pin_memory() for n, average in self._averages.items()}

    def update(self) -> None:
        """Take in the weights as they are now."""
        self._settle()
        if self._device is None:
            self._add_up(self._weights)
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            for name, weight in self._weights.items():
                self._arrived[name].copy_(weight, non_blocking=True)
            self._left.record()
        self._pending = self._worker.submit(self._when_arrived)

    def before_step(self) -> None:
        """Called before the weights change: their change waits, on the GPU, for those of the last update to have left."""
        if self._device is not None:
            torch.cuda.current_stream(self._device).wait_event(self._left)

    def _when_arrived(self) -> None:
        self._left.synchronize()
        self._add_up(self._arrived)

    @torch.no_grad()
    def _add_up(self, weights: Mapping[str, Tensor]) -> None:
        if weights:
            torch._foreach_lerp_(list(self._averages.values()), list(weights.values()), 1 - self.decay)

    def _settle(self) -> None:
        if self._pending is not None:
            self._pending.result()
            self._pending = None

    def __getitem__(self, name: str) -> Tensor:
        self._settle()
        return self._averages[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._averages)

    def __len__(self) -> int:
        return len(self._averages)
