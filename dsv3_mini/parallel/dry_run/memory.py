"""Memory, counted by the byte while a step runs on paper: what lives, what it is, and the most that ever lived at one time.

Every tensor that an operation makes has a storage, which lives until the last one that refers to it is gone. Views share a
storage and are counted once. Torch's FSDP frees storages by making them empty, and fills them again: that is watched too.

Simplifications: an allocator that rounds sizes up and leaves gaps is not counted, nor is what libraries keep for themselves
(`roofline.py` has room for both), nor what a kernel uses inside.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from dsv3_mini.parallel.dry_run.exchanges import tensors_in


class MemoryCounter:
    """A watcher. `kind`: says what is made at this moment; `named` says it later, when one knows better."""

    def __init__(self, kind: Callable[[], str]) -> None:
        self._kind = kind
        self._sizes: dict[int, int] = {}
        self._kinds: dict[int, str] = {}
        self._watched: dict[int, weakref.ref] = {}
        self._count: Counter[str] = Counter()
        self.total = 0
        self.peak = 0
        self.at_peak: dict[str, int] = {}

    def saw(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any], result: Any) -> None:
        for tensor in tensors_in(result):
            self._add(tensor.untyped_storage())

    def named(self, tensors: Iterable[Tensor], kind: str) -> int:
        """Their memory is of this kind from now on, whoever made it. Returns its bytes."""
        keys = set()
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self._add(storage)
            key = storage._cdata
            self._count[self._kinds[key]] -= self._sizes[key]
            self._count[kind] += self._sizes[key]
            self._kinds[key] = kind
            keys.add(key)
        return sum(self._sizes[key] for key in keys)

    def by_kind(self) -> dict[str, int]:
        """Bytes that live now."""
        return {kind: size for kind, size in self._count.items() if size}

    def start_peak(self) -> int:
        """Forget the peak so far; returns what lives now, from which a new one is measured."""
        self.peak, self.at_peak = self.total, self.by_kind()
        return self.total

    @contextmanager
    def watching_sizes(self) -> Iterator[None]:
        """Inside, storages that are emptied and filled are noticed."""
        before = torch.UntypedStorage.resize_

        def resize(storage: torch.UntypedStorage, size: int) -> torch.UntypedStorage:
            done = before(storage, size)
            if storage._cdata in self._sizes:
                self._change(storage._cdata, storage.nbytes())
            else:
                self._add(storage)
            return done

        with mock.patch.object(torch.UntypedStorage, "resize_", resize):
            yield

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._sizes:
            return
        self._watched[key] = weakref.ref(storage, lambda _: self._forget(key))
        self._sizes[key], self._kinds[key] = 0, self._kind()
        self._change(key, storage.nbytes())

    def _change(self, key: int, size: int) -> None:
        self._count[self._kinds[key]] += size - self._sizes[key]
        self.total += size - self._sizes[key]
        self._sizes[key] = size
        if self.total > self.peak:
            self.peak, self.at_peak = self.total, self.by_kind()

    def _forget(self, key: int) -> None:
        self._change(key, 0)
        del self._sizes[key], self._kinds[key], self._watched[key]
