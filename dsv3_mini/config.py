"""ModelConfig: one frozen dataclass with the field names of the released config.json.

A config is checked when it is made: a value that breaks a rule raises a `ConfigError` that names the field,
the value and the rule. Nothing else in the package checks these rules again.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsv3_mini.errors import ConfigError


@dataclass(frozen=True)
class RopeScaling:
    """YaRN's settings (report section 4.3), named as in config.json's `rope_scaling`.

    `factor` is the report's s, `beta_fast` its beta and `beta_slow` its alpha. `mscale` and `mscale_all_dim` set
    the two temperature factors that `model/rope.py` explains.
    """

    factor: float = 40.0
    original_max_position_embeddings: int = 4096
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 1.0

    def __post_init__(self) -> None:
        for name in ("factor", "beta_fast", "beta_slow", "mscale"):
            _require(
                _is_number(getattr(self, name)) and getattr(self, name) > 0,
                f"rope_scaling.{name}",
                getattr(self, name),
                "must be a number above 0",
            )
        all_dim = self.mscale_all_dim
        _require(_is_number(all_dim) and all_dim >= 0, "rope_scaling.mscale_all_dim", all_dim, "must be at least 0")
        _require(
            self.factor >= 1, "rope_scaling.factor", self.factor, "must be at least 1: YaRN only extends a context"
        )
        _require(
            self.beta_fast > self.beta_slow,
            "rope_scaling.beta_fast",
            self.beta_fast,
            f"must be above beta_slow ({self.beta_slow}): the ramp runs from fast to slow rotations",
        )
        _require_int("rope_scaling.original_max_position_embeddings", self.original_max_position_embeddings, 1)


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a DeepSeek-V3 model. The defaults are the released 671B model, exact to the parameter.

    Raises:
        ConfigError: a field breaks a rule; the message names the field, its value and the rule.
    """

    vocab_size: int = 129280
    hidden_size: int = 7168
    num_hidden_layers: int = 61
    first_k_dense_replace: int = 3
    intermediate_size: int = 18432

    # DeepSeekMoE (report section 2.1.2)
    moe_intermediate_size: int = 2048
    n_routed_experts: int = 256
    n_shared_experts: int = 1
    num_experts_per_tok: int = 8
    n_group: int = 8
    topk_group: int = 4
    routed_scaling_factor: float = 2.5
    norm_topk_prob: bool = True
    scoring_func: str = "sigmoid"  # or "softmax", for comparison
    topk_method: str = "noaux_tc"  # or "aux_loss": the choice ignores the bias; a loss balances instead

    # Multi-head latent attention (report section 2.1.1)
    num_attention_heads: int = 128
    q_lora_rank: int | None = 1536
    kv_lora_rank: int = 512
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = dataclasses.field(default_factory=RopeScaling)
    max_position_embeddings: int = 163840

    # Multi-token prediction (report section 2.2)
    num_nextn_predict_layers: int = 1

    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.006  # the report's value; the released config.json says 0.02

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "hidden_size",
            "num_hidden_layers",
            "intermediate_size",
            "moe_intermediate_size",
            "n_routed_experts",
            "num_experts_per_tok",
            "n_group",
            "topk_group",
            "num_attention_heads",
            "kv_lora_rank",
            "qk_nope_head_dim",
            "qk_rope_head_dim",
            "v_head_dim",
            "max_position_embeddings",
        ):
            _require_int(name, getattr(self, name), 1)
        for name in ("first_k_dense_replace", "n_shared_experts", "num_nextn_predict_layers"):
            _require_int(name, getattr(self, name), 0)
        for name in ("routed_scaling_factor", "rope_theta", "rms_norm_eps", "initializer_range"):
            value = getattr(self, name)
            _require(_is_number(value) and value > 0, name, value, "must be a number above 0")
        _require(isinstance(self.norm_topk_prob, bool), "norm_topk_prob", self.norm_topk_prob, "must be true or false")
        if self.q_lora_rank is not None:
            _require_int("q_lora_rank", self.q_lora_rank, 1, " (or null: queries are then projected directly)")

        _require(
            self.scoring_func in ("sigmoid", "softmax"),
            "scoring_func",
            self.scoring_func,
            "must be 'sigmoid' (DeepSeek-V3) or 'softmax' (for comparison)",
        )
        _require(
            self.topk_method in ("noaux_tc", "aux_loss"),
            "topk_method",
            self.topk_method,
            "must be 'noaux_tc' (bias-corrected choice) or 'aux_loss' (for comparison)",
        )
        _require(
            self.first_k_dense_replace <= self.num_hidden_layers,
            "first_k_dense_replace",
            self.first_k_dense_replace,
            f"must be at most num_hidden_layers ({self.num_hidden_layers})",
        )
        _require(
            self.qk_rope_head_dim % 2 == 0,
            "qk_rope_head_dim",
            self.qk_rope_head_dim,
            "must be even: RoPE turns pairs of dimensions",
        )
        _require(
            self.n_routed_experts % self.n_group == 0,
            "n_group",
            self.n_group,
            f"must divide n_routed_experts ({self.n_routed_experts}): groups are of equal size",
        )
        _require(
            self.topk_group <= self.n_group, "topk_group", self.topk_group, f"must be at most n_group ({self.n_group})"
        )
        _require(
            self.num_experts_per_tok <= self.topk_group * self.experts_per_group,
            "num_experts_per_tok",
            self.num_experts_per_tok,
            f"must be at most topk_group x group size ({self.topk_group} x "
            f"{self.experts_per_group} = {self.topk_group * self.experts_per_group}): a token chooses within its groups",
        )
        _require(
            self.n_group == 1 or self.experts_per_group >= 2,
            "n_group",
            self.n_group,
            f"leaves {self.experts_per_group} expert in a group: a group is ranked by its two best, use at most "
            f"{self.n_routed_experts // 2} groups",
        )
        if self.rope_scaling is not None:
            _require(
                isinstance(self.rope_scaling, RopeScaling),
                "rope_scaling",
                self.rope_scaling,
                "must be a RopeScaling or None",
            )

    # ---- derived -------------------------------------------------------------------------------------------------

    @property
    def experts_per_group(self) -> int:
        return self.n_routed_experts // self.n_group

    @property
    def qk_head_dim(self) -> int:
        """Width of one query or key: the part without position and the rotated part."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def uses_yarn(self) -> bool:
        """YaRN is a property of the configured maximum length, never of an input's length."""
        scaling = self.rope_scaling
        return scaling is not None and self.max_position_embeddings > scaling.original_max_position_embeddings

    def is_moe_layer(self, layer: int) -> bool:
        """MTP modules count on from `num_hidden_layers`, as in the released checkpoint, and are MoE layers."""
        return layer >= self.first_k_dense_replace

    # ---- making one ------------------------------------------------------------------------------------------------

    @classmethod
    def preset(cls, name: str, **changes: Any) -> ModelConfig:
        """A named configuration, with any field changed: `ModelConfig.preset("tiny", n_group=1, topk_group=1)`.

        nano: for tests. tiny: trains on a laptop in an hour. small: one GPU for a day. 16b: the size of the report's
        FP8 study (section 3.3). 671b: the released model.
        """
        if name not in PRESETS:
            raise ConfigError(f"preset {name!r} is not known: choose one of {', '.join(PRESETS)}")
        return cls(**_known_fields(cls, {**PRESETS[name], **changes}, f"preset {name!r}"))

    def replace(self, **changes: Any) -> ModelConfig:
        """A copy with some fields changed, checked again."""
        return dataclasses.replace(self, **_known_fields(type(self), changes, "replace"))

    @classmethod
    def from_hf(cls, source: str | Path | dict[str, Any]) -> ModelConfig:
        """Read a Hugging Face config: a dict, a config.json, or the folder that holds one.

        Accepts the released file and what transformers 4 and 5 write (`rope_parameters`). Fields that do not shape
        the model (token ids, dtype, ...) are passed over.
        """
        values = source if isinstance(source, dict) else _read_config_json(Path(source))
        model_type = values.get("model_type", "deepseek_v3")
        _require(model_type == "deepseek_v3", "model_type", model_type, "must be 'deepseek_v3'")
        _require(values.get("hidden_act", "silu") == "silu", "hidden_act", values.get("hidden_act"), "must be 'silu'")
        for name in ("attention_bias", "tie_word_embeddings"):
            _require(not values.get(name, False), name, values.get(name), "must be false: DeepSeek-V3 has none")
        _require(
            values.get("rope_interleave", True) is True,
            "rope_interleave",
            values.get("rope_interleave"),
            "must be true: RoPE pairs neighbouring dimensions here, as in the released weights",
        )
        _require(values.get("moe_layer_freq", 1) == 1, "moe_layer_freq", values.get("moe_layer_freq"), "must be 1")
        heads, kv_heads = values.get("num_attention_heads"), values.get("num_key_value_heads")
        _require(
            kv_heads is None or kv_heads == heads,
            "num_key_value_heads",
            kv_heads,
            f"must equal num_attention_heads ({heads}): MLA gives every head its own key and value",
        )

        names = {field.name for field in dataclasses.fields(cls)}
        fields = {name: values[name] for name in names & values.keys() if name != "rope_scaling"}
        rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
        _require(
            isinstance(rope, dict), "rope_scaling", rope, 'must be an object such as {"type": "yarn", ...}, or null'
        )
        rope = dict(rope)
        if "rope_theta" in rope:
            fields["rope_theta"] = rope.pop("rope_theta")
        kind = rope.pop("rope_type", None) or rope.pop("type", None) or "default"
        rope.pop("type", None)
        _require(kind in ("yarn", "default"), "rope_scaling.type", kind, "must be 'yarn' or absent")
        fields["rope_scaling"] = None
        if kind == "yarn":
            known = {field.name for field in dataclasses.fields(RopeScaling)}
            given = {k: v for k, v in rope.items() if k in known and v is not None}
            # A file without the two mscales means YaRN's plain temperature on cos and sin, and none on the softmax scale.
            fields["rope_scaling"] = RopeScaling(**{"mscale": 1.0, "mscale_all_dim": 0.0, **given})
        missing = [name for name in ("vocab_size", "hidden_size", "num_hidden_layers") if name not in fields]
        if missing:
            raise ConfigError(
                f"{missing[0]} is missing from the config: a Hugging Face config.json of DeepSeek-V3 has it"
            )
        return cls(**fields)

    def to_hf(self) -> dict[str, Any]:
        """The config as a Hugging Face dict, which transformers and `from_hf` both read."""
        values = dataclasses.asdict(self)
        scaling = values.pop("rope_scaling")
        # transformers stretches whenever the field is there; here, as in the released inference code, only beyond the
        # original length. Where it would do nothing it is left out, so that both compute the same.
        values["rope_scaling"] = {"type": "yarn", **scaling} if self.uses_yarn else None
        return {
            "architectures": ["DeepseekV3ForCausalLM"],
            "model_type": "deepseek_v3",
            **values,
            "num_key_value_heads": self.num_attention_heads,
            "hidden_act": "silu",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "rope_interleave": True,
            "moe_layer_freq": 1,
            "ep_size": 1,
            "tie_word_embeddings": False,
            "use_cache": True,
        }


PRESETS: dict[str, dict[str, Any]] = {
    "nano": dict(
        vocab_size=4096,
        hidden_size=64,
        num_hidden_layers=3,
        first_k_dense_replace=1,
        intermediate_size=128,
        moe_intermediate_size=32,
        n_routed_experts=8,
        n_shared_experts=1,
        num_experts_per_tok=2,
        n_group=4,
        topk_group=2,
        num_attention_heads=4,
        q_lora_rank=32,
        kv_lora_rank=16,
        qk_nope_head_dim=16,
        qk_rope_head_dim=8,
        v_head_dim=16,
        max_position_embeddings=256,
        rope_scaling=None,
        initializer_range=0.02,
    ),
    "tiny": dict(
        vocab_size=4096,
        hidden_size=192,
        num_hidden_layers=4,
        first_k_dense_replace=1,
        intermediate_size=512,
        moe_intermediate_size=64,
        n_routed_experts=16,
        n_shared_experts=1,
        num_experts_per_tok=4,
        n_group=4,
        topk_group=2,
        num_attention_heads=4,
        q_lora_rank=96,
        kv_lora_rank=64,
        qk_nope_head_dim=32,
        qk_rope_head_dim=16,
        v_head_dim=32,
        max_position_embeddings=512,
        rope_scaling=None,
        # About 1 / sqrt(192). At 0.02 what a token *is* drowns in what all tokens of its class share, and the model needs
        # many times the tokens until it repeats a name (see it: dsv3 train --set initializer_range=0.02).
        initializer_range=0.08,
    ),
    "small": dict(
        vocab_size=32768,
        hidden_size=1024,
        num_hidden_layers=16,
        first_k_dense_replace=1,
        intermediate_size=2816,
        moe_intermediate_size=384,
        n_routed_experts=64,
        n_shared_experts=1,
        num_experts_per_tok=6,
        n_group=8,
        topk_group=4,
        num_attention_heads=16,
        q_lora_rank=512,
        kv_lora_rank=256,
        qk_nope_head_dim=64,
        qk_rope_head_dim=32,
        v_head_dim=64,
        max_position_embeddings=4096,
        rope_scaling=None,
    ),
    "16b": dict(
        vocab_size=102400,
        hidden_size=2048,
        num_hidden_layers=27,
        first_k_dense_replace=1,
        intermediate_size=10944,
        moe_intermediate_size=1408,
        n_routed_experts=64,
        n_shared_experts=2,
        num_experts_per_tok=6,
        n_group=1,
        topk_group=1,
        num_attention_heads=16,
        q_lora_rank=None,
        kv_lora_rank=512,
        max_position_embeddings=4096,
        rope_scaling=None,
    ),
    "671b": {},
}


def _require(holds: bool, field: str, value: Any, rule: str) -> None:
    if not holds:
        raise ConfigError(f"{field} = {value!r} {rule}")


def _require_int(field: str, value: Any, least: int, hint: str = "") -> None:
    is_int = isinstance(value, int) and not isinstance(value, bool)
    _require(is_int and value >= least, field, value, f"must be a whole number of at least {least}{hint}")


def _is_number(value: Any) -> bool:
    return (
        isinstance(value, (int, float))
        and not isinstance(value, bool)
        and value == value
        and abs(value) != float("inf")
    )


def _known_fields(cls: type, values: dict[str, Any], where: str) -> dict[str, Any]:
    names = [field.name for field in dataclasses.fields(cls)]
    for name in values:
        if name not in names:
            close = difflib.get_close_matches(name, names, n=1)
            raise ConfigError(
                f"{name} is not a field of ModelConfig ({where})" + (f": did you mean {close[0]}?" if close else "")
            )
    return values


def _read_config_json(path: Path) -> dict[str, Any]:
    path = path / "config.json" if path.is_dir() else path
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist: give a folder with a config.json, or the file itself") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"{path} cannot be read as JSON: {error}") from None
    _require(isinstance(values, dict), str(path), type(values).__name__, "must hold a JSON object")
    return values
