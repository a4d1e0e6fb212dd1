"""The config: rules that hold, messages that say which one was broken, and Hugging Face's spelling, both ways."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from random_models import YARN, nano
from transformers import DeepseekV3Config

from dsv3_mini import ModelConfig
from dsv3_mini.config import PRESETS, RopeScaling
from dsv3_mini.errors import ConfigError, UserError

RELEASED = {  # the released config.json, as published with the weights
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"},
    "aux_loss_alpha": 0.001,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "ep_size": 1,
    "first_k_dense_replace": 3,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "initializer_range": 0.02,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "pretraining_tp": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    },
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "seq_aux": True,
    "tie_word_embeddings": False,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.33.1",
    "use_cache": True,
    "v_head_dim": 128,
    "vocab_size": 129280,
}


# ---- rules -----------------------------------------------------------------------------------------------------------

RULES: list[tuple[dict[str, Any], str]] = [
    *(({name: 0}, f"{name} = 0 must be a whole number of at least 1") for name in (
        "vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size", "moe_intermediate_size", "n_routed_experts",
        "num_experts_per_tok", "n_group", "topk_group", "num_attention_heads", "kv_lora_rank", "qk_nope_head_dim",
        "qk_rope_head_dim", "v_head_dim", "max_position_embeddings", "q_lora_rank",
    )),
    *(({name: -1}, f"{name} = -1 must be a whole number of at least 0") for name in (
        "first_k_dense_replace", "n_shared_experts", "num_nextn_predict_layers",
    )),
    *(({name: value}, f"{name} = {value!r} must be a number above 0")
      for name in ("routed_scaling_factor", "rope_theta", "rms_norm_eps", "initializer_range")
      for value in (0, -1.0, float("nan"), float("inf"), "1", None, True)),
    ({"hidden_size": 64.0}, "hidden_size = 64.0 must be a whole number"),
    ({"hidden_size": "64"}, "hidden_size = '64' must be a whole number"),
    ({"n_group": True}, "n_group = True must be a whole number"),
    ({"vocab_size": None}, "vocab_size = None must be a whole number"),
    ({"q_lora_rank": "none"}, "q_lora_rank = 'none' must be a whole number of at least 1 (or null"),
    ({"n_group": 3}, "n_group = 3 must divide n_routed_experts (8)"),
    ({"n_group": 16}, "n_group = 16 must divide n_routed_experts (8)"),
    ({"n_group": 8, "topk_group": 4}, "n_group = 8 leaves 1 expert in a group"),
    ({"topk_group": 5}, "topk_group = 5 must be at most n_group (4)"),
    ({"num_experts_per_tok": 5}, "num_experts_per_tok = 5 must be at most topk_group x group size (2 x 2 = 4)"),
    ({"first_k_dense_replace": 4}, "first_k_dense_replace = 4 must be at most num_hidden_layers (3)"),
    ({"qk_rope_head_dim": 7}, "qk_rope_head_dim = 7 must be even"),
    ({"norm_topk_prob": 1}, "norm_topk_prob = 1 must be true or false"),
    ({"scoring_func": "tanh"}, "scoring_func = 'tanh' must be 'sigmoid'"),
    ({"topk_method": "greedy"}, "topk_method = 'greedy' must be 'noaux_tc'"),
    ({"rope_scaling": {"factor": 4}}, "rope_scaling = {'factor': 4} must be a RopeScaling or None"),
    ({"hidden_sizes": 1}, "hidden_sizes is not a field of ModelConfig (preset 'nano'): did you mean hidden_size?"),
    ({"wings": 2}, "wings is not a field of ModelConfig"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "says"), RULES, ids=lambda value: str(value)[:40] if isinstance(value, dict) else ""
)
def test_a_broken_rule_is_named_with_field_and_value(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as error:
        ModelConfig.preset("nano", **changes)
    assert says in str(error.value) and "\n" not in str(error.value)
    assert isinstance(error.value, UserError) and isinstance(error.value, ValueError)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"factor": 0.5}, "rope_scaling.factor = 0.5 must be at least 1"),
        ({"factor": "40"}, "rope_scaling.factor = '40' must be a number above 0"),
        ({"beta_fast": 1.0}, "rope_scaling.beta_fast = 1.0 must be above beta_slow (1.0)"),
        ({"beta_slow": 0}, "rope_scaling.beta_slow = 0 must be a number above 0"),
        ({"mscale": -1}, "rope_scaling.mscale = -1 must be a number above 0"),
        ({"mscale_all_dim": -0.1}, "rope_scaling.mscale_all_dim = -0.1 must be at least 0"),
        ({"mscale_all_dim": None}, "rope_scaling.mscale_all_dim = None must be at least 0"),
        ({"original_max_position_embeddings": 0}, "rope_scaling.original_max_position_embeddings = 0 must be"),
    ],
)
def test_a_broken_rule_of_yarn_is_named(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as error:
        RopeScaling(**changes)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_presets_and_changes() -> None:
    assert ModelConfig.preset("671b") == ModelConfig()
    for name in PRESETS:
        cfg = ModelConfig.preset(name)
        assert cfg.num_nextn_predict_layers == 1 and cfg.n_routed_experts > cfg.num_experts_per_tok
    with pytest.raises(ConfigError, match="preset 'big' is not known: choose one of nano, tiny, small, 16b, 671b"):
        ModelConfig.preset("big")
    assert nano().replace(vocab_size=7).vocab_size == 7
    with pytest.raises(ConfigError, match="topk_group = 9 must be at most"):
        nano().replace(topk_group=9)
    with pytest.raises(ConfigError, match=r"vocab is not a field of ModelConfig \(replace\): did you mean vocab_size"):
        nano().replace(vocab=7)
    with pytest.raises(dataclasses.FrozenInstanceError):
        nano().vocab_size = 7


def test_which_layers_are_sparse() -> None:
    cfg = ModelConfig()
    assert [layer for layer in range(62) if not cfg.is_moe_layer(layer)] == [0, 1, 2]
    assert cfg.qk_head_dim == 192 and cfg.experts_per_group == 32 and cfg.uses_yarn


# ---- Hugging Face ----------------------------------------------------------------------------------------------------


def test_the_released_file_is_the_default(tmp_path: Path) -> None:
    expected = ModelConfig(initializer_range=0.02)  # the only field in which file and report differ
    assert ModelConfig.from_hf(RELEASED) == expected
    (tmp_path / "config.json").write_text(json.dumps(RELEASED))
    assert ModelConfig.from_hf(tmp_path) == ModelConfig.from_hf(str(tmp_path / "config.json")) == expected
    written = expected.to_hf()
    assert {name: written[name] for name in written if name in RELEASED} == {
        name: value for name, value in RELEASED.items() if name in written
    }


@given(
    st.builds(
        lambda groups, size, kept, k, **fields: nano(
            n_group=groups, n_routed_experts=groups * size, topk_group=min(kept, groups),
            num_experts_per_tok=min(k, min(kept, groups) * size), **fields,
        ),
        groups=st.integers(1, 8), size=st.integers(2, 8), kept=st.integers(1, 8), k=st.integers(1, 8),
        hidden_size=st.integers(1, 500), n_shared_experts=st.integers(0, 3), q_lora_rank=st.none() | st.integers(1, 99),
        qk_rope_head_dim=st.integers(1, 40).map(lambda pairs: 2 * pairs), v_head_dim=st.integers(1, 99),
        first_k_dense_replace=st.integers(0, 3), num_nextn_predict_layers=st.integers(0, 3),
        norm_topk_prob=st.booleans(), rope_theta=st.floats(10, 1e6), rms_norm_eps=st.floats(1e-8, 1e-3),
        routed_scaling_factor=st.floats(0.1, 9), scoring_func=st.sampled_from(["sigmoid", "softmax"]),
        topk_method=st.sampled_from(["noaux_tc", "aux_loss"]),
        rope_scaling=st.none() | st.builds(
            RopeScaling, factor=st.floats(1, 64), original_max_position_embeddings=st.integers(1, 255),
            mscale=st.floats(0.1, 2), mscale_all_dim=st.just(0.0) | st.floats(0.1, 2), beta_fast=st.floats(16, 64),
        ),
    )
)  # fmt: skip
def test_any_config_survives_the_way_there_and_back(cfg: ModelConfig) -> None:
    assert ModelConfig.from_hf(cfg.to_hf()) == cfg
    assert ModelConfig.from_hf(json.loads(json.dumps(cfg.to_hf()))) == cfg


@pytest.mark.parametrize("changes", [{}, YARN, {"q_lora_rank": None}, {"num_nextn_predict_layers": 2}])
def test_transformers_understands_each_field_and_what_it_writes_is_understood(changes: dict[str, Any]) -> None:
    cfg = nano(**changes)
    theirs = DeepseekV3Config(**cfg.to_hf())
    for field in dataclasses.fields(cfg):
        if not field.name.startswith("rope"):
            assert getattr(theirs, field.name) == getattr(cfg, field.name)
    assert theirs.rope_interleave is True and theirs.rope_parameters["rope_theta"] == cfg.rope_theta
    assert theirs.rope_parameters["rope_type"] == ("yarn" if changes is YARN else "default")
    assert ModelConfig.from_hf(theirs.to_dict()) == cfg
    assert ModelConfig.from_hf(json.loads(theirs.to_json_string(use_diff=False))) == cfg


def test_yarn_that_does_nothing_is_not_handed_on() -> None:
    """transformers would stretch whenever the field is there; here the configured length decides."""
    idle = nano(**{**YARN, "max_position_embeddings": 64})
    assert not idle.uses_yarn and idle.to_hf()["rope_scaling"] is None


def test_a_yarn_without_mscales_has_yarns_plain_temperature() -> None:
    rope = {"type": "yarn", "factor": 4, "original_max_position_embeddings": 64}
    scaling = ModelConfig.from_hf({**nano().to_hf(), "rope_scaling": rope}).rope_scaling
    assert (scaling.mscale, scaling.mscale_all_dim, scaling.beta_fast, scaling.beta_slow) == (1.0, 0.0, 32.0, 1.0)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model_type": "deepseek_v2"}, "model_type = 'deepseek_v2' must be 'deepseek_v3'"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu' must be 'silu'"),
        ({"attention_bias": True}, "attention_bias = True must be false"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings = True must be false"),
        ({"moe_layer_freq": 2}, "moe_layer_freq = 2 must be 1"),
        ({"num_key_value_heads": 1}, "num_key_value_heads = 1 must equal num_attention_heads (4)"),
        ({"rope_interleave": False}, "rope_interleave = False must be true"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "rope_scaling.type = 'linear' must be 'yarn' or absent"),
        ({"rope_scaling": {"type": "yarn", "factor": 0}}, "rope_scaling.factor = 0 must be a number above 0"),
        ({"rope_scaling": "yarn"}, "rope_scaling = 'yarn' must be an object"),
        ({"rope_parameters": [1]}, "rope_scaling = [1] must be an object"),
        ({"rope_parameters": {"rope_theta": -1}}, "rope_theta = -1 must be a number above 0"),
        ({"n_group": None}, "n_group = None must be a whole number"),
        ({"topk_method": "group_limited_greedy"}, "topk_method = 'group_limited_greedy' must be"),
    ],
)
def test_what_another_model_would_need_is_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as error:
        ModelConfig.from_hf({**nano().to_hf(), **changes})
    assert says in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("field", ["vocab_size", "hidden_size", "num_hidden_layers"])
def test_a_file_without_the_sizes_is_no_config(field: str) -> None:
    values = nano().to_hf()
    del values[field]
    with pytest.raises(ConfigError, match=f"{field} is missing from the config"):
        ModelConfig.from_hf(values)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "cannot be read as JSON"),
        (b"{", "cannot be read as JSON"),
        (b"\xff\xfe", "cannot be read as JSON"),
        (b"[]", "must hold a JSON object"),
        (b"null", "must hold a JSON object"),
        (None, "does not exist: give a folder with a config.json"),
    ],
)
def test_files_that_are_no_config_are_refused(content: bytes | None, says: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ConfigError) as error:
        ModelConfig.from_hf(tmp_path)
    assert says in str(error.value) and "config.json" in str(error.value) and "\n" not in str(error.value)
