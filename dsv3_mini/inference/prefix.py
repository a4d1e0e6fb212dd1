"""A beginning that many prompts share, read once: a system prompt, a document that many questions are asked about.

The caches of what was read are forked for each batch that goes on from it. All but the prefix's last token is read: that one
stays to be read with the rest of a prompt, as a model says what comes next only while it reads.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch

from dsv3_mini.errors import ConfigError, DataError
from dsv3_mini.inference.choosing import Greedy
from dsv3_mini.inference.sampling import Sampling
from dsv3_mini.inference.settings import checked_prompts
from dsv3_mini.inference.speculative import Drafter
from dsv3_mini.inference.writing import Reader
from dsv3_mini.model import DeepSeekV3


class Prefix:
    """`generate(model, prompts, prefix=Prefix(model, tokens))`: prompts that begin with `tokens` are read from there on.

    Args:
        use_mtp: whether the MTP modules read it too, for `generate(..., use_mtp=True)`.

    Raises:
        DataError: fewer than two tokens, unknown ones, or more than the model's context holds with one to come.
    """

    @torch.inference_mode()
    def __init__(self, model: DeepSeekV3, tokens: Sequence[int], use_mtp: bool = False) -> None:
        (self.tokens,) = checked_prompts([tokens], model, max_new_tokens=1)
        if len(self.tokens) < 2:
            raise DataError("a prefix of one token saves nothing: give at least two")
        self.model, self.use_mtp, self.read = model, use_mtp, 0
        self._depths = len(model.mtp) if use_mtp else 0
        self._reader = Reader.with_room(model, 1, len(self.tokens) - 1)
        self._drafter = Drafter(model, self._depths, 1, len(self.tokens) - 1, self._reader.few)
        self._read_on()

    @torch.inference_mode()
    def extended(self, more: Sequence[int]) -> Prefix:
        """The prefix with `more` tokens behind it, of which only the new ones are read: the next turn of a conversation.

        Raises:
            DataError: unknown tokens, or more than the model's context holds with one to come.
        """
        longer = copy.copy(self)
        (longer.tokens,) = checked_prompts([[*self.tokens, *more]], self.model, max_new_tokens=1)
        longer._reader, longer._drafter = self.fork(1)
        if more:
            longer._read_on()
        return longer

    def _read_on(self) -> None:
        """Read all that is unread but for the last token."""
        device = self.model.lm_head.weight.device
        ids = torch.tensor([self.tokens[self.read :]], device=device)
        new = ids.shape[1] - 1
        states = self._reader.read(ids[:, :-1])
        self._reader.keep([new])
        # The drafts are of no use; what counts is that the modules have read.
        greedy = Greedy(Sampling(), [[]], self.model.cfg.vocab_size, device)
        self._drafter.draft([self.tokens[self.read : -1]], states, [new], self.tokens[-1:], self._depths, greedy)
        self.read += new

    def check(self, prompts: Sequence[Sequence[int]], model: DeepSeekV3, drafts: int) -> None:
        """Whether these prompts can go on from here.

        Raises:
            DataError: a prompt begins differently.
            ConfigError: another model has read the prefix, or drafts are wanted and it was read without MTP.
        """
        if model is not self.model:
            raise ConfigError("the prefix was read by another model: make it with this one")
        if drafts and not self.use_mtp:
            raise ConfigError("use_mtp = True needs a prefix that the MTP modules have read: Prefix(..., use_mtp=True)")
        for number, prompt in enumerate(prompts):
            if list(prompt[: len(self.tokens)]) != self.tokens:
                raise DataError(f"prompt {number} does not begin with the prefix of {len(self.tokens)} tokens")

    def fork(self, batch: int) -> tuple[Reader, Drafter]:
        """A model and a drafter that have read the prefix in each of `batch` rows."""
        return self._reader.select([0] * batch), self._drafter.select([0] * batch)
