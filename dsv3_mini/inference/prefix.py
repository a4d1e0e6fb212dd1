"""A beginning that many prompts share, read once: a system prompt, a document that many questions are asked about.

The caches of what was read are forked for each batch that goes on from it. All but the prefix's last token is read: that one
stays to be read with the rest of a prompt, as a model says what comes next only while it reads.
"""

from __future__ import annotations

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
        self.model, self.use_mtp = model, use_mtp
        self.read = len(self.tokens) - 1
        device = model.lm_head.weight.device
        ids = torch.tensor([self.tokens], device=device)
        depths = len(model.mtp) if use_mtp else 0
        self._reader = Reader.with_room(model, 1, self.read)
        self._drafter = Drafter(model, depths, 1, self.read, self._reader.few)
        states = self._reader.read(ids[:, :-1])
        self._reader.keep([self.read])
        # The drafts are of no use; what counts is that the modules have read.
        greedy = Greedy(Sampling(), [[]], model.cfg.vocab_size, device)
        self._drafter.draft([self.tokens[:-1]], states, [self.read], self.tokens[-1:], depths, greedy)

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
