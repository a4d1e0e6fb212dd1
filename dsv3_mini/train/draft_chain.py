"""Teaching an MTP module to draft on, beside its own states: what is done to the tiny model after its pre-training.

    python -m dsv3_mini.train.draft_chain data/tiny --out runs/tiny-drafts

In pre-training each module reads beside the states of the depth before it (report section 2.2). Who decodes with one module and
wants several drafts lets it read beside its *own* states (`inference/speculative.py`), of which it has never seen one. Here it
sees them. The main model rests, and so do embedding and head, which are its own: what it writes stays the same to the bit. In every
row, behind every place, the module drafts as it will in decoding:

    depth 1 at place i reads token i + 1 beside the main model's state after token i
    depth d at place i reads token i + d beside what depth d - 1 made at place i

Depth 1 sees what depth 1 has read at the places before, as in pre-training. A deeper one sees that too, up to its own place, and
behind it what the depths before it have read at this place: just what lies in the cache when it drafts.

A draft holds if the main model agrees. So the module learns from what the main model says after the same tokens, from its
whole distribution, and not from the text.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dsv3_mini.config import ModelConfig
from dsv3_mini.data.stream import TokenStream
from dsv3_mini.data.tokenizer import Tokenizer
from dsv3_mini.errors import ConfigError, UserError
from dsv3_mini.hub import from_pretrained, save_pretrained
from dsv3_mini.model import DeepSeekV3
from dsv3_mini.model.rope import rotations
from dsv3_mini.train.ema import MovingAverage
from dsv3_mini.train.recipe import Recipe
from dsv3_mini.train.schedules import Piece, Schedule


@dataclass(frozen=True)
class ChainRecipe:
    """How the chain is taught: on rows of `context` tokens of the pre-training's mixture."""

    total_tokens: int = 2_000_000
    depths: int = 4
    learning_rate: float = 1e-3  # at its highest; warmed up over the first 2.5%, then half a cosine down to a fiftieth
    batch_size: int = 8  # rows
    context: int = 208
    clip_norm: float = 1.0
    ema_decay: float = 0.99
    seed: int = 7

    def schedule(self) -> Schedule:
        high, warmup = self.learning_rate, self.total_tokens / 40
        pieces = (Piece(warmup, 0.0, high), Piece(float(self.total_tokens), high, high / 50, "cosine"))
        return Schedule("learning_rate", pieces)


class ChainStep(NamedTuple):
    """One step. losses[d]: cross-entropy of depth d + 1 with the main model, in nats. agreed[d]: how often both found the same token likeliest."""

    tokens: int
    losses: list[float]
    agreed: list[float]


def chain_states(
    model: DeepSeekV3, tokens: Int[Tensor, "b s"], main: Float[Tensor, "b s d"], depths: int
) -> list[Float[Tensor, "b n d"]]:
    """What the last MTP module makes at each depth, ready for the head, for the n = s - depths places that have all of them.

    states[d][:, i] has read the tokens up to i + d + 1, and so speaks of token i + d + 2.

    Args:
        main: the main model's states for the tokens, after its final norm.
    """
    module, places = model.mtp[-1], tokens.shape[1] - depths
    embedding, read = model.embed_tokens(tokens), _Read()
    hidden, states = main[:, :places], []
    for depth in range(1, depths + 1):
        turn = rotations(model.cfg, torch.arange(places, device=tokens.device) + depth - 1)
        mask = chain_mask(places, depth).to(tokens.device)
        hidden, _ = module(embedding[:, depth : depth + places], hidden, turn, mask, read)
        states.append(hidden)
    return states


def chain_mask(places: int, depth: int) -> Bool[Tensor, "1 n m"]:
    """Which of the keys of all depths so far (m = depth x places, depth 1 first) a place of this depth sees."""
    before, own = torch.ones(places, places, dtype=torch.bool).tril(), torch.eye(places, dtype=torch.bool)
    return torch.cat([before] + [own] * (depth - 1), dim=1)[None]


class _Read:
    """The keys of all depths of a chain, side by side: a layer's cache that gradients pass through, told which to see by its mask."""

    length = 0

    def __init__(self) -> None:
        self.latents: list[Float[Tensor, "b n c"]] = []
        self.keys: list[Float[Tensor, "b n r"]] = []

    def positions(self, new: int) -> Int[Tensor, "1 new"]:
        return torch.arange(new)[None]

    def extend(
        self, latent: Float[Tensor, "b n c"], key_rope: Float[Tensor, "b n r"]
    ) -> tuple[Float[Tensor, "b m c"], Float[Tensor, "b m r"]]:
        self.latents.append(latent)
        self.keys.append(key_rope)
        return torch.cat(self.latents, dim=1), torch.cat(self.keys, dim=1)


def teach(model: DeepSeekV3, rows: Iterable[Int[Tensor, "b s"]], recipe: ChainRecipe) -> Iterator[ChainStep]:
    """Train the last MTP module on these rows, one step for each `next`; at the end it holds the moving average of its weights.

    Raises:
        ConfigError: the model has no MTP module, or a row has no more tokens than the chain has depths and the main model one.
    """
    if not len(model.mtp):
        raise ConfigError("num_nextn_predict_layers = 0: the model has no MTP module to teach; load one with mtp=True")
    model.requires_grad_(False)
    weights = {name: weight.requires_grad_() for name, weight in model.mtp[-1].named_parameters()}
    adamw = torch.optim.AdamW(weights.values(), betas=(0.9, 0.95), weight_decay=0.0)
    average, schedule, seen = MovingAverage(weights, recipe.ema_decay), recipe.schedule(), 0
    for tokens in rows:
        if tokens.shape[1] <= recipe.depths + 1:
            raise ConfigError(f"depths = {recipe.depths} needs rows of more tokens than {tokens.shape[1]}: give fewer")
        losses, agreed = _losses(model, tokens, recipe.depths)
        torch.stack(losses).mean().backward()
        torch.nn.utils.clip_grad_norm_(weights.values(), recipe.clip_norm)
        for group in adamw.param_groups:
            group["lr"] = schedule(seen)
        adamw.step()
        adamw.zero_grad()
        average.update()
        seen += tokens.numel()
        yield ChainStep(seen, [loss.item() for loss in losses], agreed)
    with torch.no_grad():
        for name, weight in weights.items():
            weight.copy_(average[name])


def _losses(model: DeepSeekV3, tokens: Int[Tensor, "b s"], depths: int) -> tuple[list[Float[Tensor, ""]], list[float]]:
    with torch.no_grad():
        main, _ = model.main_states(tokens)
        said = model.lm_head(main[:, 1:])  # after token i + 1: what depth 1 is to say at place i
        shares, likeliest = said.softmax(dim=-1), said.argmax(dim=-1)
    losses, agreed = [], []
    for depth, states in enumerate(chain_states(model, tokens, main, depths)):
        logits, here = model.lm_head(states), slice(depth, depth + states.shape[1])
        losses.append(-(shares[:, here] * logits.log_softmax(dim=-1)).sum(dim=-1).mean())
        agreed.append((logits.argmax(dim=-1) == likeliest[:, here]).float().mean().item())
    return losses, agreed


def rows_of(recipe: ChainRecipe, tokenizer: Tokenizer, cfg: ModelConfig) -> Iterator[Int[Tensor, "b s"]]:
    """As many rows as the recipe wants, of the text that tiny is pre-trained on, in another order."""
    if tokenizer.n_vocab > cfg.vocab_size:
        raise ConfigError(f"vocab_size = {cfg.vocab_size} is less than the tokenizer's {tokenizer.n_vocab} tokens")
    stream = TokenStream(tokenizer, recipe.context, Recipe.preset("tiny").mixture, seed=recipe.seed)
    try:
        for _ in range(recipe.total_tokens // (recipe.batch_size * recipe.context)):
            yield stream.next_batch(recipe.batch_size)[:, :-1]
    finally:
        stream.close()


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    recipe = ChainRecipe()
    parser = argparse.ArgumentParser(
        prog="python -m dsv3_mini.train.draft_chain", description="Teach a model's last MTP module to draft on and on."
    )
    parser.add_argument("model", type=Path, help="a model folder with an MTP module")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write; it must not exist")
    parser.add_argument("--tokens", type=int, default=recipe.total_tokens, help="default: two million")
    parser.add_argument("--threads", type=int, help="torch's threads (default: as torch chooses)")
    options = parser.parse_args(arguments)
    if options.out.exists():
        raise ConfigError(f"{options.out} exists: choose another --out")
    least = recipe.batch_size * recipe.context
    if options.tokens < least:
        raise ConfigError(f"--tokens {options.tokens} must be at least {least}: a step reads so many")
    if options.threads:
        torch.set_num_threads(options.threads)
    recipe = ChainRecipe(total_tokens=options.tokens)
    model = from_pretrained(options.model).float()
    for step in teach(model, rows_of(recipe, Tokenizer.shipped(), model.cfg), recipe):
        agreed = "  ".join(f"{share:.1%}" for share in step.agreed)
        print(f"{step.tokens / 1e6:5.2f}M tokens   agreed by depth: {agreed}", flush=True)
    save_pretrained(model, options.out)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(f"draft_chain: {error}")
