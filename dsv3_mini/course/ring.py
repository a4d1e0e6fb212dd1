"""Collectives from send and receive, as lesson 18 builds them: each function is what *one* rank does.

`n` is the number of ranks. In the ring a rank hears only the one before it and talks only to the one behind it, all at the
same time, so that every wire carries the same. Written for reading: torch.distributed has these, and its own are used to
train. A tensor's first dimension is cut into pieces, and must come out even.
"""

from __future__ import annotations

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from dsv3_mini.course.ranks import Rank


def all_gather(me: Rank, piece: Float[Tensor, " m"]) -> Float[Tensor, "n m"]:
    """All ranks' pieces, in the order of the ranks, at every rank."""
    right, left = (me.number + 1) % me.count, (me.number - 1) % me.count
    pieces = [piece] * me.count
    for step in range(1, me.count):
        me.send(piece, to=right)
        piece = me.receive(left)
        pieces[(me.number - step) % me.count] = piece
    return torch.stack(pieces)


def reduce_scatter(me: Rank, pieces: Float[Tensor, "n m"]) -> Float[Tensor, " m"]:
    """Rank r gets the sum of all ranks' piece r."""
    right, left = (me.number + 1) % me.count, (me.number - 1) % me.count
    partial = pieces[(me.number - 1) % me.count]
    for step in range(2, me.count + 1):
        me.send(partial, to=right)
        partial = me.receive(left) + pieces[(me.number - step) % me.count]
    return partial


def all_reduce(me: Rank, x: Float[Tensor, " d"]) -> Float[Tensor, " d"]:
    """The sum of all ranks' x, at every rank: each sums a piece up, and all pieces are gathered."""
    own = reduce_scatter(me, rearrange(x, "(n m) -> n m", n=me.count))
    return rearrange(all_gather(me, own), "n m -> (n m)")


def all_to_all(me: Rank, pieces: Float[Tensor, "n m"]) -> Float[Tensor, "n m"]:
    """Piece r of every rank goes to rank r, which has them in the order of the senders."""
    for step in range(1, me.count):
        to = (me.number + step) % me.count
        me.send(pieces[to], to)
    arrived = [me.receive(r) if r != me.number else pieces[r] for r in range(me.count)]
    return torch.stack(arrived)


def broadcast_tree(me: Rank, x: Float[Tensor, " d"]) -> Float[Tensor, " d"]:
    """Rank 0's x at every rank: who has it tells one more, so that those who have it double with each round."""
    reach = 1
    while reach < me.count:
        if me.number < reach and me.number + reach < me.count:
            me.send(x, me.number + reach)
        elif reach <= me.number < 2 * reach:
            x = me.receive(me.number - reach)
        reach *= 2
    return x


def all_reduce_at_zero(me: Rank, x: Float[Tensor, " d"]) -> Float[Tensor, " d"]:
    """The same sum by way of rank 0, to which all send and which sends it back to all."""
    if me.number > 0:
        me.send(x, to=0)
        return me.receive(0)
    total = x + sum(me.receive(r) for r in range(1, me.count))
    for r in range(1, me.count):
        me.send(total, to=r)
    return total


def all_reduce_by_doubling(me: Rank, x: Float[Tensor, " d"]) -> Float[Tensor, " d"]:
    """The same sum in few rounds: partners 1, 2, 4 ... places away exchange all that they have. `n` is a power of two."""
    distance = 1
    while distance < me.count:
        partner = me.number ^ distance
        me.send(x, to=partner)
        x = x + me.receive(partner)
        distance *= 2
    return x


def all_reduce_in_nodes(me: Rank, x: Float[Tensor, " d"], node: int) -> Float[Tensor, " d"]:
    """The same sum, with little of it between nodes of `node` ranks: rows and columns of a mesh (node, place).

    Inside, each place sums up a piece; then the ranks that have the same place sum it up over the nodes; inside again, all
    pieces are gathered. Only the step in the middle leaves the node, with 1/node of the bytes.
    """
    first = me.number - me.number % node
    inside = me.among(range(first, first + node))
    across = me.among(range(me.number % node, me.count, node))
    own = reduce_scatter(inside, rearrange(x, "(p m) -> p m", p=node))
    return rearrange(all_gather(inside, all_reduce(across, own)), "p m -> (p m)")
