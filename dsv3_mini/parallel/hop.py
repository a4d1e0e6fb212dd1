"""A hop: every process sends each of its tokens once to each member of a group that needs it, and gets the results back.

    there    token i goes to member m where needed[i, m]; what arrives lies in the order of the senders
    back     each member returns one row for every row that it got, and the rows of a token are added up

How much travels between two members follows from the routing and is known only now. So the members first tell each other
how many rows will come, and then exchange exactly these: nothing is padded and nothing is dropped.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor
from torch.distributed._functional_collectives import all_to_all_single_autograd, wait_tensor

from dsv3_mini.model.add_up import add_up


class Hop:
    """One exchange with its way back, for tokens that `needed` [T members] names. All members must make it together."""

    def __init__(self, group: dist.ProcessGroup, needed: Bool[Tensor, "T members"]) -> None:
        self.group = group
        self.tokens = len(needed)
        self.sender_row = needed.T.nonzero()[:, 1]  # the token of each row that leaves, member by member
        leaving = needed.sum(dim=0)
        arriving = torch.empty_like(leaving)
        dist.all_to_all_single(arriving, leaving, group=group)
        self.leaving, self.arriving = leaving.tolist(), arriving.tolist()

    def carry(
        self, x: Float[Tensor, "T d"], chosen: Int[Tensor, "T k"], gates: Float[Tensor, "T k"]
    ) -> tuple[Float[Tensor, "arrived d"], Int[Tensor, "arrived k"], Float[Tensor, "arrived k"]]:
        """Tokens with their choices and gates, at those that need them."""
        return self.rows_there(x), self.there(chosen), self.there(gates)

    def rows_there(self, x: Float[Tensor, "T d"]) -> Float[Tensor, "arrived d"]:
        """The tokens' vectors, nearly all of what travels: here as they are."""
        return self.there(x)

    def there(self, x: Shaped[Tensor, "T ..."]) -> Shaped[Tensor, "arrived ..."]:
        """What belongs to the tokens (a vector, a gate, a choice), at those that need it. Gradients travel back."""
        return self._exchange(x.index_select(0, self.sender_row), self.leaving, self.arriving)

    def back(self, results: Float[Tensor, "arrived d"]) -> Float[Tensor, "T d"]:
        """The sum of what each token's members made of it; zero for a token that went nowhere."""
        returned = self._exchange(results, self.arriving, self.leaving)
        return add_up(returned, self.sender_row, self.tokens)

    def _exchange(self, rows: Tensor, leaving: list[int], arriving: list[int]) -> Tensor:
        # A process that has nothing to send, or gets nothing, takes part all the same: in backward, too, the others wait
        # for it, and autograd calls the same exchange there, as an empty tensor has a history like any other.
        # What comes back at once is a promise, a tensor without memory; the next thing that is done needs all of it.
        return wait_tensor(all_to_all_single_autograd(rows.contiguous(), arriving, leaving, self.group))
