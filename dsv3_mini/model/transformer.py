"""DeepSeek-V3, whole: embedding, blocks, head, and the chain of multi-token prediction modules (report section 2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from dsv3_mini.config import ModelConfig
from dsv3_mini.errors import DataError
from dsv3_mini.model.attention import LayerCache
from dsv3_mini.model.block import Block
from dsv3_mini.model.experts import GroupedExperts
from dsv3_mini.model.mtp import MTPModule
from dsv3_mini.model.norm import RMSNorm
from dsv3_mini.model.rope import rotations
from dsv3_mini.model.router import Router, Routing


@dataclass(frozen=True)
class HiddenStates:
    """What the head reads: `main` [b s d], and `mtp[j]` [b s-j-1 d]; `routing` of every sparse layer, MTP's last."""

    main: Float[Tensor, "b s d"]
    mtp: list[Float[Tensor, "b s_j d"]]
    routing: list[Routing]


@dataclass(frozen=True)
class ModelOutput:
    """logits [b s v] for the next token; mtp_logits[j] [b s-j-1 v] for the token j + 2 ahead; routing, detached."""

    logits: Float[Tensor, "b s v"]
    mtp_logits: list[Float[Tensor, "b s_j v"]]
    routing: list[Routing]


class DeepSeekV3(nn.Module):
    """The model. Works on meta, CPU and CUDA, in FP32 and BF16 (norms and router compute in FP32 either way).

    Args:
        cfg: the shape of the model.
        experts: how the routed experts are computed (see `model/experts.py`).
    """

    def __init__(self, cfg: ModelConfig, experts: type[GroupedExperts] = GroupedExperts) -> None:
        super().__init__()
        self.cfg = cfg
        self.embed_tokens = nn.Embedding(cfg.vocab_size, cfg.hidden_size)
        self.layers = nn.ModuleList(Block(cfg, layer, experts) for layer in range(cfg.num_hidden_layers))
        self.norm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.lm_head = nn.Linear(cfg.hidden_size, cfg.vocab_size, bias=False)
        self.mtp = nn.ModuleList(
            MTPModule(cfg, cfg.num_hidden_layers + depth, experts) for depth in range(cfg.num_nextn_predict_layers)
        )
        self.initialise()

    @torch.no_grad()
    def initialise(self) -> None:
        """Every matrix from a normal of std `initializer_range`, norms at one, gate biases at zero (report section 4.2)."""
        if self.lm_head.weight.is_meta:
            return  # no numbers to draw; and torch would load its compiler to draw them
        for module in self.modules():
            for parameter in module.parameters(recurse=False):
                if isinstance(module, RMSNorm):
                    parameter.fill_(1.0)
                else:
                    parameter.normal_(0.0, self.cfg.initializer_range)
            if isinstance(module, Router) and module.e_score_correction_bias is not None:
                module.e_score_correction_bias.zero_()

    def forward(
        self,
        tokens: Int[Tensor, "b s"],
        document_ids: Int[Tensor, "b s"] | None = None,
        cache: Sequence[LayerCache] | None = None,
    ) -> ModelOutput:
        """Logits for every position.

        Args:
            tokens: token ids in [0, vocab_size).
            document_ids: which document of its row each token belongs to. Given, a token sees its own document only;
                None (pre-training, report section 4.1) lets it see all that stands before it in the row.
            cache: one layer cache per main layer, holding the positions before `tokens`. MTP modules do not run then.

        Raises:
            DataError: tokens is not a non-empty [b, s] of whole numbers, or a row is longer than the model's context.
        """
        if cache is not None:
            main, routing = self.main_states(tokens, document_ids, cache)
            states = HiddenStates(main, [], routing)
        else:
            states = self.hidden_states(tokens, document_ids)
        return ModelOutput(
            self.lm_head(states.main),
            [self.lm_head(hidden) for hidden in states.mtp],
            [routing.detach() for routing in states.routing],
        )

    def hidden_states(self, tokens: Int[Tensor, "b s"], document_ids: Int[Tensor, "b s"] | None = None) -> HiddenStates:
        """The states that the head turns into logits, with the routing still attached to the graph: for losses."""
        main, routing = self.main_states(tokens, document_ids)
        hidden, mtp = main, []
        embedding = self.embed_tokens(tokens)
        for depth, module in enumerate(self.mtp, start=1):
            # Depth j reads token i + j beside the state at i: the states lose their last position, the tokens their first.
            length = tokens.shape[1] - depth
            if length < 1:
                break
            turn = rotations(self.cfg, torch.arange(length, device=tokens.device))
            mask = None if document_ids is None else same_document(document_ids[:, :length])
            hidden, routed = module(embedding[:, depth:], hidden[:, :length], turn, mask)
            mtp.append(hidden)
            routing = routing + ([] if routed is None else [routed])
        return HiddenStates(main, mtp, routing)

    def main_states(
        self,
        tokens: Int[Tensor, "b s"],
        document_ids: Int[Tensor, "b s"] | None = None,
        cache: Sequence[LayerCache] | None = None,
    ) -> tuple[Float[Tensor, "b s d"], list[Routing]]:
        """The main model up to its final norm."""
        seen = 0 if cache is None else cache[0].length
        self._check(tokens, seen)
        new = tokens.shape[1]
        positions = torch.arange(new, device=tokens.device) if cache is None else cache[0].positions(new)
        turn = rotations(self.cfg, positions)
        mask = None if document_ids is None else same_document(document_ids)
        if seen:
            mask = visible(positions, seen + new)
        x, routings = self.embed_tokens(tokens), []
        for layer, block in enumerate(self.layers):
            x, routing = block(x, turn, mask, None if cache is None else cache[layer])
            routings += [] if routing is None else [routing]
        return self.norm(x), routings

    def _check(self, tokens: Tensor, seen: int) -> None:
        whole = not (tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool)
        if tokens.ndim != 2 or tokens.numel() == 0 or not whole:
            raise DataError(
                f"tokens of shape {tuple(tokens.shape)} and type {tokens.dtype} cannot be read: give whole numbers [b, s], "
                "at least one a row"
            )
        if seen + tokens.shape[1] > self.cfg.max_position_embeddings:
            raise DataError(
                f"{seen + tokens.shape[1]} tokens are more than max_position_embeddings = "
                f"{self.cfg.max_position_embeddings}: shorten the input, or extend the context with YaRN"
            )


def visible(positions: Int[Tensor, "b s"], keys: int) -> Bool[Tensor, "b s keys"]:
    """True where a query may see a cached key: not later. A key's slot in the cache is its position."""
    return rearrange(positions, "b s -> b s 1") >= torch.arange(keys, device=positions.device)


def same_document(document_ids: Int[Tensor, "b s"]) -> Bool[Tensor, "b s t"]:
    """True where a query may see a key: not later, and in the same document."""
    length = document_ids.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=document_ids.device).tril()
    return causal & (rearrange(document_ids, "b s -> b s 1") == rearrange(document_ids, "b t -> b 1 t"))
