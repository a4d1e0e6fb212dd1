"""Context extension: a trained model under a config that reads further, as the start of another training (report section 4.3).

The weights stay; YaRN changes what their rotations mean (`model/rope.py`). The report does it in two phases, 4K to 32K to
128K, each a short training at the lowest rate of pre-training. Adam's moments start at zero and the rate with a warm-up: what
the moments held were averages over gradients of the unstretched model, and a model folder has none.
"""

from __future__ import annotations

import dataclasses

import torch

from dsv3_mini.config import ModelConfig, RopeScaling
from dsv3_mini.errors import ConfigError
from dsv3_mini.model import DeepSeekV3

POSITIONS = ("max_position_embeddings", "rope_scaling", "num_nextn_predict_layers")  # all that an extension may change


def extended_config(cfg: ModelConfig, context: int, trained: int | None = None) -> ModelConfig:
    """The config that reads `context` tokens, stretched by YaRN from the `trained` context; MTP modules are left out.

    Args:
        trained: the length of the rows that the model was trained on. None: the original length that its config names, of a
            model that was stretched before (the factor then counts from there, as YaRN wants it).

    Raises:
        ConfigError: trained is missing, or not below the context.
    """
    if trained is None and cfg.rope_scaling is None:
        raise ConfigError(
            "the trained context is missing: a config's max_position_embeddings is the most that a model was made for, "
            "not what it was trained on; give it"
        )
    scaling = cfg.rope_scaling or RopeScaling()
    original = trained or scaling.original_max_position_embeddings
    if context <= original:
        raise ConfigError(f"context = {context} must be more than the trained {original}: there is nothing to extend")
    yarn = dataclasses.replace(scaling, factor=context / original, original_max_position_embeddings=original)
    return cfg.replace(max_position_embeddings=context, rope_scaling=yarn, num_nextn_predict_layers=0)


def with_config(model: DeepSeekV3, cfg: ModelConfig) -> DeepSeekV3:
    """The same weights and gate biases under another config of positions. MTP modules that it does not name are dropped.

    Raises:
        ConfigError: more than positions would change, or MTP modules are asked for that the model has not.
    """
    kept = {field.name for field in dataclasses.fields(ModelConfig)} - set(POSITIONS)
    other = next((name for name in sorted(kept) if getattr(cfg, name) != getattr(model.cfg, name)), None)
    if other is not None:
        raise ConfigError(
            f"{other} = {getattr(cfg, other)!r} and the model has {getattr(model.cfg, other)!r}: an extension changes "
            f"{', '.join(POSITIONS)} alone"
        )
    if cfg.num_nextn_predict_layers > model.cfg.num_nextn_predict_layers:
        raise ConfigError(
            f"num_nextn_predict_layers = {cfg.num_nextn_predict_layers} and the model has "
            f"{model.cfg.num_nextn_predict_layers}: an extension can only leave MTP modules out"
        )
    with torch.device("meta"):
        copy = DeepSeekV3(cfg)
    weights = {
        name: weight.detach().clone() for name, weight in model.state_dict().items() if name in copy.state_dict()
    }
    copy.load_state_dict(weights, assign=True)
    return copy.train(model.training)
