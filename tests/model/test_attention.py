"""MLA against its equations written out per token and head in FP64, and against what attention must never do."""

import cmath
import math

import pytest
import torch
from einops import rearrange
from random_models import YARN, nano
from torch import Tensor

from dsv3_mini.config import ModelConfig
from dsv3_mini.ledger.decode import attention_flops
from dsv3_mini.model.attention import MultiHeadLatentAttention, attention
from dsv3_mini.model.norm import RMSNorm
from dsv3_mini.model.rope import rotations
from dsv3_mini.model.transformer import same_document

CONFIGS = {
    "compressed queries": nano(hidden_size=32),
    "direct queries": nano(hidden_size=32, q_lora_rank=None),
    "YaRN": nano(hidden_size=32, **YARN),
    "wide values": nano(hidden_size=32, v_head_dim=40),
}


def make(cfg: ModelConfig) -> MultiHeadLatentAttention:
    layer = MultiHeadLatentAttention(cfg)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.3)
    return layer


def run(
    layer: MultiHeadLatentAttention, cfg: ModelConfig, x: Tensor, mask: Tensor | None = None, start: int = 0
) -> Tensor:
    return layer(x, rotations(cfg, torch.arange(start, start + x.shape[1])), mask)


def normed(x: Tensor, norm: RMSNorm) -> Tensor:
    return x / (x.square().mean() + 1e-6).sqrt() * norm.weight.double()


def turned(x: Tensor, position: int, cfg: ModelConfig) -> Tensor:
    """Neighbouring pairs as complex numbers; YaRN's frequencies by its definition (the ramp is checked in test_rope)."""
    pairs = cfg.qk_rope_head_dim // 2
    out = []
    for pair in range(pairs):
        w = cfg.rope_theta ** (-pair / pairs)
        if cfg.uses_yarn:
            low, high = 0, 2  # of nano's 4 pairs, for 64 positions stretched to 256
            keep = 1 - min(max((pair - low) / (high - low), 0), 1)
            w = w * keep + w / 4 * (1 - keep)
        z = complex(x[2 * pair], x[2 * pair + 1]) * cmath.exp(1j * position * w)
        out += [z.real, z.imag]
    return torch.tensor(out, dtype=torch.float64)


def by_the_equations(layer: MultiHeadLatentAttention, cfg: ModelConfig, x: Tensor) -> Tensor:
    """Equations 1-11 for one row of tokens."""
    h, n, r, v, c = (
        cfg.num_attention_heads,
        cfg.qk_nope_head_dim,
        cfg.qk_rope_head_dim,
        cfg.v_head_dim,
        cfg.kv_lora_rank,
    )
    w = {name: p.double() for name, p in layer.named_parameters()}
    scale = 1 / math.sqrt(n + r)
    if cfg.uses_yarn:
        scale *= (0.1 * math.log(4) + 1) ** 2
    keys, values, queries = [], [], []
    for position, token in enumerate(x.double()):
        down = w["kv_a_proj_with_mqa.weight"] @ token
        latent, key_rope = normed(down[:c], layer.kv_a_layernorm), turned(down[c:], position, cfg)
        up = (w["kv_b_proj.weight"] @ latent).view(h, n + v)
        if cfg.q_lora_rank is None:
            query = w["q_proj.weight"] @ token
        else:
            query = w["q_proj.q_b_proj.weight"] @ normed(
                w["q_proj.q_a_proj.weight"] @ token, layer.q_proj.q_a_layernorm
            )
        query = query.view(h, n + r)
        keys.append([torch.cat([up[i, :n], key_rope]) for i in range(h)])
        values.append([up[i, n:] for i in range(h)])
        queries.append([torch.cat([query[i, :n], turned(query[i, n:], position, cfg)]) for i in range(h)])
    rows = []
    for s in range(len(x)):
        heads = []
        for i in range(h):
            weights = [math.exp(scale * float(queries[s][i] @ keys[t][i])) for t in range(s + 1)]
            heads.append(sum(weights[t] / sum(weights) * values[t][i] for t in range(s + 1)))
        rows.append(w["o_proj.weight"] @ torch.cat(heads))
    return torch.stack(rows)


@torch.no_grad()
@pytest.mark.parametrize("name", CONFIGS)
def test_equals_the_equations(name: str) -> None:
    cfg = CONFIGS[name]
    layer, x = make(cfg), torch.randn(1, 9, 32)
    expected = by_the_equations(layer, cfg, x[0])
    out = run(layer, cfg, x)[0].double()
    assert (out - expected).abs().max() / expected.abs().max() < 1e-5


@pytest.mark.parametrize("name", CONFIGS)
def test_absorbed_equals_expanded_forward_and_backward(name: str) -> None:
    cfg = CONFIGS[name]
    layer, x = make(cfg), torch.randn(2, 12, 32)
    turn, causal = rotations(cfg, torch.arange(12)), torch.ones(1, 12, 12, dtype=torch.bool).tril()
    results, gradients = [], []
    upstream = torch.randn(2, 12, cfg.num_attention_heads, cfg.v_head_dim)
    for attend in (layer.expanded, layer.absorbed):
        query_nope, query_rope = layer._queries(x, turn)
        latent, key_rope = layer._latents(x, turn)
        mixed = attend(query_nope, query_rope, latent, key_rope, causal)
        layer.zero_grad()
        (mixed * upstream).sum().backward()
        results.append(mixed.detach())
        gradients.append([p.grad.clone() for p in layer.parameters() if p.grad is not None])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)
    assert len(gradients[0]) == len(gradients[1]) >= 4
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3 * one.abs().max().item())


@torch.no_grad()
def test_absorbed_equals_expanded_for_one_query_over_many_keys() -> None:
    """As in decoding, where the mask is None and every key is in the past."""
    cfg = CONFIGS["compressed queries"]
    layer, x = make(cfg), torch.randn(3, 12, 32)
    turn = rotations(cfg, torch.arange(12))
    query_nope, query_rope = layer._queries(x, turn)
    latent, key_rope = layer._latents(x, turn)
    mixed = layer.absorbed(query_nope[:, -1:], query_rope[:, -1:], latent, key_rope, None)
    expected = layer.expanded(query_nope, query_rope, latent, key_rope, None)[:, -1:]
    torch.testing.assert_close(mixed, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("value_width", [4, 6, 12, 16], ids=["narrow", "narrower", "equal", "wide"])
@pytest.mark.parametrize("masked", [False, True])
def test_padding_to_equal_widths_changes_nothing(value_width: int, masked: bool) -> None:
    query, key, value = torch.randn(2, 7, 3, 12), torch.randn(2, 7, 3, 12), torch.randn(2, 7, 3, value_width)
    mask = torch.ones(2, 7, 7, dtype=torch.bool).tril()
    if masked:
        mask &= torch.rand(2, 7, 7) > 0.3
        mask |= torch.eye(7, dtype=torch.bool)
    scores = torch.einsum("bshq,bthq->bhst", query.double(), key.double()) * 0.37
    share = scores.masked_fill(~mask[:, None], -math.inf).softmax(-1)
    expected = torch.einsum("bhst,bthv->bshv", share, value.double())
    out = attention(query, key, value, 0.37, mask if masked else None)
    assert out.shape == expected.shape
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-6)


# ---- what attention must not do --------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_later_token_changes_nothing_before_it() -> None:
    cfg = CONFIGS["compressed queries"]
    layer, x = make(cfg), torch.randn(1, 16, 32)
    before = run(layer, cfg, x)
    for place in (1, 8, 15):
        changed = x.clone()
        changed[:, place] += 3.0
        after = run(layer, cfg, changed)
        torch.testing.assert_close(after[:, :place], before[:, :place], rtol=0, atol=1e-6)
        assert ((after - before)[:, place:].abs().amax(-1) > 1e-4).all()


@torch.no_grad()
def test_only_distances_matter() -> None:
    """All positions moved by 100: equal, as queries' and keys' rope parts both turn. Moved apart: not equal."""
    cfg = CONFIGS["compressed queries"]
    layer, x = make(cfg), torch.randn(1, 10, 32)
    here = run(layer, cfg, x)
    torch.testing.assert_close(run(layer, cfg, x, start=100), here, rtol=1e-3, atol=1e-4)
    stretched = layer(x, rotations(cfg, torch.arange(10) * 2))
    assert (stretched - here).abs().max() > 1e-2


@torch.no_grad()
def test_documents_do_not_see_each_other() -> None:
    cfg = CONFIGS["compressed queries"]
    layer, x = make(cfg), torch.randn(1, 12, 32)
    ids = torch.tensor([[0] * 5 + [1] * 4 + [2] * 3])
    together = run(layer, cfg, x, same_document(ids))
    alone = torch.cat([run(layer, cfg, part) for part in x.split([5, 4, 3], dim=1)], dim=1)
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    assert (run(layer, cfg, x) - together)[:, 5:].abs().max() > 1e-2


def test_same_document_by_definition() -> None:
    ids = torch.tensor([[3, 3, 1, 1, 3], [0, 0, 0, 0, 0]])
    mask = same_document(ids)
    for b in range(2):
        for s in range(5):
            for t in range(5):
                assert mask[b, s, t].item() == (t <= s and ids[b, s] == ids[b, t])


@torch.no_grad()
def test_heads_and_latent_norm_are_in_place() -> None:
    """The latent is normed and the rope key is not: scaling the latent's rows changes nothing, the rope's rows does."""
    cfg = CONFIGS["compressed queries"]
    layer, x = make(cfg), torch.randn(1, 10, 32)
    before = run(layer, cfg, x)
    layer.kv_a_proj_with_mqa.weight[: cfg.kv_lora_rank] *= 100
    torch.testing.assert_close(run(layer, cfg, x), before, rtol=1e-3, atol=1e-3)
    layer.kv_a_proj_with_mqa.weight[cfg.kv_lora_rank :] *= 100
    assert (run(layer, cfg, x) - before).abs().max() > 0.1
    assert rearrange(before, "1 s d -> s d").isfinite().all()


# ---- which of the two ways -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["nano", "tiny", "16b", "671b"])
def test_the_way_is_the_one_with_fewer_flops_by_the_ledger(preset: str) -> None:
    cfg = ModelConfig.preset(preset)
    with torch.device("meta"):
        layer = MultiHeadLatentAttention(cfg)
    names = set()
    for context in (2, 3, 17, 160, 1024, 4096, 131_072):
        for new in {1, 2, 3, 16, 31, 60, 64, 100, 146, 147, 159, 160, 161, 170, 171, 1024, context - 1}:
            if new < context:
                flops = attention_flops(cfg, new, context)
                name = "absorbed" if flops.absorbed < flops.rebuilt else "expanded"
                assert layer.absorbs(new, context) == (name == "absorbed")
                names.add(name)
    # nano's latent is as narrow as a head's key and value together: it is never dearer to attend to it.
    assert names == ({"absorbed"} if preset == "nano" else {"absorbed", "expanded"})


@pytest.mark.parametrize("preset", ["nano", "671b"])
def test_what_has_nothing_before_it_is_expanded(preset: str) -> None:
    """Training, and prompts: by the count a narrow latent would absorb here, and without a mask see the future."""
    with torch.device("meta"):
        layer = MultiHeadLatentAttention(ModelConfig.preset(preset, kv_lora_rank=8))
    for new in (1, 2, 1024):
        assert not layer.absorbs(new, new)
