"""Ranks of a cluster in one process, for lesson 19: exchanges between lists, and programs that meet.

`all_to_all` sees all ranks at once, as no program on a cluster can. `meet` runs a program for each rank, which sees its own
tensors only. Such a program is a generator:

    arrived = yield leaving     gives leaving[j] to rank j, and goes on when every rank has come this far, with what they gave
    return result               has done its part

They run in turn, so that nothing hangs: a rank that others wait for in vain is found and named.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any

import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from dsv3_mini.errors import UserError

Program = Generator[list[Any], list[Any], Any]


class Deadlock(UserError):
    """Some ranks wait in an exchange, and others will never come."""


def all_to_all(
    rows: Sequence[Shaped[Tensor, "leaving ..."]], leaving: Int[Tensor, "sender receiver"]
) -> list[Shaped[Tensor, "arrived ..."]]:
    """What each rank has after an exchange.

    Args:
        rows: of each rank, all that it sends, receiver by receiver. leaving: how many of them go to whom.

    Returns:
        Of each rank, what it got, sender by sender.
    """
    parts = [sent.split(counts) for sent, counts in zip(rows, leaving.tolist(), strict=True)]
    return [torch.cat(received) for received in zip(*parts, strict=True)]


def meet(programs: Sequence[Program]) -> list[Any]:
    """Run a program for each rank to its end; what each of them returned.

    Raises:
        Deadlock: a rank has returned while others still exchange.
        UserError: a program never yields, or gives not one message for each rank.
    """
    ranks = len(programs)
    results: dict[int, Any] = {}
    inbox: list[Any] = [None] * ranks
    exchange = 0
    while True:
        exchange += 1
        outgoing: dict[int, list[Any]] = {}
        for rank, program in enumerate(programs):
            if rank in results:
                continue
            if not isinstance(program, Generator):
                raise UserError(f"the program of rank {rank} has no `yield`: without an exchange nothing can travel")
            try:
                outgoing[rank] = program.send(inbox[rank])
            except StopIteration as end:
                results[rank] = end.value
                continue
            if not isinstance(outgoing[rank], (list, tuple)) or len(outgoing[rank]) != ranks:
                raise UserError(
                    f"exchange {exchange}: rank {rank} must give a list of {ranks} messages, one for each rank"
                )
        if not outgoing:
            return [results[rank] for rank in range(ranks)]
        if results:
            raise Deadlock(
                f"exchange {exchange}: {_ranks(outgoing)} wait for {_ranks(results)}, who came no more. On a cluster they would "
                "wait for ever: every rank takes part in every exchange, with empty messages where it has nothing to say"
            )
        inbox = [[outgoing[sender][receiver] for sender in range(ranks)] for receiver in range(ranks)]


def _ranks(which: Sequence[int] | dict[int, Any]) -> str:
    return ("rank " if len(which) == 1 else "ranks ") + ", ".join(map(str, which))
