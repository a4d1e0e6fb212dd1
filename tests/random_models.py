"""Models with random weights whose routing is awake, and the assertions that say so.

At the usual initialisation every affinity is near 1/2 and every attention near uniform: a test on such a model passes with
half of the model missing. Here weights are large, norms are no ones, and gate biases are negative and spread.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dsv3_mini.config import ModelConfig, RopeScaling
from dsv3_mini.model import DeepSeekV3
from dsv3_mini.model.experts import GroupedExperts
from dsv3_mini.model.norm import RMSNorm
from dsv3_mini.model.router import Router

YARN = dict(max_position_embeddings=256, rope_scaling=RopeScaling(factor=4.0, original_max_position_embeddings=64))


def nano(**changes: Any) -> ModelConfig:
    return ModelConfig.preset("nano", **{"vocab_size": 512, "initializer_range": 0.08, **changes})


def random_model(cfg: ModelConfig, experts: type[GroupedExperts] = GroupedExperts, seed: int = 0) -> DeepSeekV3:
    torch.manual_seed(seed)
    model = DeepSeekV3(cfg, experts)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, RMSNorm):
                module.weight.uniform_(0.5, 1.5)
            if isinstance(module, Router):
                module.weight.mul_(4)
                if module.e_score_correction_bias is not None:
                    module.e_score_correction_bias.normal_(-0.8, 0.2)
    return model


def random_tokens(cfg: ModelConfig, rows: int = 2, length: int = 48, seed: int = 1) -> Tensor:
    return torch.randint(0, cfg.vocab_size, (rows, length), generator=torch.Generator().manual_seed(seed))


def assert_routing_is_awake(model: DeepSeekV3, tokens: Tensor) -> None:
    """Choices vary, biases are negative and change choices, the group limit changes choices."""
    cfg = model.cfg
    with torch.no_grad():
        routing = model(tokens).routing
    biases = {m.layer: m.e_score_correction_bias for m in model.modules() if isinstance(m, Router)}
    assert len(routing) == len(biases) > 0
    for r in routing:
        bias = biases[r.layer]
        assert (bias < 0).float().mean() > 0.9 and ((r.scores + bias) < 0).float().mean() > 0.2
        choices = r.chosen.sort(dim=-1).values
        assert len(choices.flatten(0, 1).unique(dim=0)) > 3, f"layer {r.layer}: tokens all choose alike"
        assert (r.load > 0).sum() > cfg.num_experts_per_tok

        def differs(preference: Tensor, choices: Tensor = choices) -> float:
            free = preference.topk(cfg.num_experts_per_tok, dim=-1).indices.sort(dim=-1).values
            return (free != choices).any(-1).float().mean().item()

        assert differs(r.scores) > 0.1, f"layer {r.layer}: the bias changes nothing"
        if cfg.topk_group < cfg.n_group:
            assert differs(r.scores + bias) > 0.05, f"layer {r.layer}: the group limit changes nothing"


def of_few_words() -> DeepSeekV3:
    """Its head knows few tokens: an untrained chain is often right with it, and often wrong."""
    model = random_model(nano(vocab_size=4096)).eval()
    with torch.no_grad():
        few = model.lm_head.weight[:3].clone()
        model.lm_head.weight.zero_()
        model.lm_head.weight[[300, 400, 500]] = 3 * few
    return model
