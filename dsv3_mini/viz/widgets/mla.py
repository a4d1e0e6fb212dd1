"""The cache explorer of lesson 06: heads, groups and latent width, from tiny to 671B, and what such cuts cost."""

from __future__ import annotations

from typing import Any

from ipywidgets import Dropdown, SelectionSlider
from matplotlib.figure import Figure

from dsv3_mini.config import ModelConfig
from dsv3_mini.course.smaller_cache import Measured
from dsv3_mini.ledger import cache_per_token, count_parameters
from dsv3_mini.viz.figures.mla import Kept, cache_figure
from dsv3_mini.viz.widgets.explorer import Explorer

MODELS = ("tiny", "small", "16b", "671b")
HEADS = (4, 8, 16, 32, 64, 128)
SHARING = (2, 4, 8, 16, 32, 64)  # heads that share a key and a value
LATENTS = (8, 16, 32, 64, 128, 256, 512, 1024)
CONTEXTS = tuple(2**power for power in range(9, 18))  # 512 to 131,072


def cache_explorer(measured: Measured, model: str = "671b", context: int = 131_072) -> Explorer:
    """Four caches of one model. Choosing a model sets heads and latent to its own; move them from there.

    Args:
        measured: what smaller caches cost the trained tiny model.
    """

    def draw(model: str, heads: int, sharing: int, latent: int, context: int) -> Figure:
        own = ModelConfig.preset(model)
        cfg = own.replace(num_attention_heads=heads, kv_lora_rank=latent)
        mha, *_, mla = rows = kinds(cfg, sharing)
        title = f"{model} with {heads} heads: MLA caches 1/{mha.numbers / mla.numbers:.0f} of what MHA would"
        tiny = measured.cfg
        rank = tiny.kv_lora_rank * min(latent / own.kv_lora_rank, 1)
        groups = max(tiny.num_attention_heads // sharing, 1)
        return cache_figure(rows, context, title, measured, max(rank, min(measured.cuts)), groups)

    chosen = ModelConfig.preset(model)
    explorer = Explorer(
        draw,
        "Bars on logarithmic axes: the cache and the attention weights of MHA, GQA, MQA and MLA in one model. Beside them, "
        "two curves: what cutting its latent or averaging its heads cost the trained tiny model.",
        model=Dropdown(options=MODELS, value=model, description="model"),
        heads=_slider(HEADS, chosen.num_attention_heads, "heads"),
        sharing=_slider(SHARING, 16, "GQA: heads that share"),
        latent=_slider(LATENTS, chosen.kv_lora_rank, "latent width"),
        context=_slider(CONTEXTS, context, "context (tokens)"),
    )

    def to_its_own(change: dict[str, Any]) -> None:
        cfg = ModelConfig.preset(change["new"])
        explorer.set(heads=cfg.num_attention_heads, latent=cfg.kv_lora_rank)

    explorer.controls["model"].observe(to_its_own, names="value")
    return explorer


def kinds(cfg: ModelConfig, sharing: int) -> list[Kept]:
    """The four kinds of attention with a model's heads and widths; in GQA `sharing` heads have one key and value."""
    heads, pair = cfg.num_attention_heads, cfg.qk_head_dim + cfg.v_head_dim
    groups = max(heads // sharing, 1)
    cache = cache_per_token(cfg, groups=groups)

    def weights(stores: int) -> int:
        """Queries and output for every head, a key and a value for every store: each pair costs d (q + v)."""
        return cfg.hidden_size * pair * (heads + stores)

    latent = count_parameters(cfg).attention.trainable
    return [
        Kept("MHA", "a pair\nfor each", cache.mha, weights(heads)),
        Kept("GQA", f"a pair\nfor {sharing}", cache.gqa, weights(groups)),
        Kept("MQA", "a pair\nfor all", cache.mqa, weights(1)),
        Kept("MLA", f"latent {cfg.kv_lora_rank}\n+ key {cfg.qk_rope_head_dim}", cache.mla, latent),
    ]


def _slider(options: tuple[int, ...], value: int, description: str) -> SelectionSlider:
    return SelectionSlider(
        options=[(f"{option:,}", option) for option in options],
        value=value,
        description=description,
        continuous_update=False,
    )
