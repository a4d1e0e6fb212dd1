"""Smaller caches: each cut is what its name says, and a model has its own weights back afterwards."""

from __future__ import annotations

import pytest
import torch
from random_models import nano, random_model, random_tokens

from dsv3_mini.course.smaller_cache import (
    CUTS,
    at_random,
    collect_latents,
    fitted_to_the_data,
    from_the_weights,
    heads_averaged,
    loss_after,
    ups_of,
)
from dsv3_mini.errors import ConfigError
from dsv3_mini.evaluate.bits_per_byte import held_out_loss
from dsv3_mini.model.norm import RMSNorm
from dsv3_mini.model.rope import rotations


def problem() -> tuple[torch.Tensor, torch.Tensor]:
    """An up-projection and latents that point in some directions far more than in others."""
    latents = torch.randn(80, 6) * torch.tensor([4.0, 0.2, 2.0, 0.5, 1.0, 0.1]) + torch.randn(6)
    return torch.randn(10, 6), latents


@pytest.mark.parametrize("name", CUTS)
@pytest.mark.parametrize("rank", [1, 3, 6])
def test_a_cut_has_its_rank_and_all_of_it_is_up(name: str, rank: int) -> None:
    up, latents = problem()
    cut = CUTS[name](up, latents, rank)
    assert cut.shape == up.shape and torch.linalg.matrix_rank(cut, rtol=1e-4) == rank
    if rank == 6:
        torch.testing.assert_close(cut, up, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(CUTS[name](up, latents, rank), cut, rtol=0, atol=0)


def test_the_fitted_cut_leaves_the_least_error_and_no_other_does() -> None:
    up, latents = problem()
    outputs = latents @ up.T

    def error(cut: torch.Tensor) -> float:
        return (latents @ cut.T - outputs).square().sum().item()

    for rank in (1, 2, 4):
        least = torch.linalg.svdvals(outputs.double())[rank:].square().sum().item()
        fitted = error(fitted_to_the_data(up, latents, rank))
        assert fitted == pytest.approx(least, rel=1e-3, abs=1e-3)
        assert fitted <= error(from_the_weights(up, latents, rank)) * 1.001
        assert fitted < error(at_random(up, latents, rank))
        nearest = (from_the_weights(up, latents, rank) - up).square().sum().item()
        assert nearest == pytest.approx(torch.linalg.svdvals(up)[rank:].square().sum().item(), rel=1e-3)


def test_averaged_heads_share_the_mean_of_their_neighbours() -> None:
    up = torch.randn(4 * 5, 3)
    by_head = up.view(4, 5, 3)
    two = heads_averaged(up, heads=4, groups=2).view(4, 5, 3)
    for head in range(4):
        first = head // 2 * 2
        torch.testing.assert_close(two[head], (by_head[first] + by_head[first + 1]) / 2)
    assert torch.equal(heads_averaged(up, 4, 4), up)
    for groups in (0, 3):
        with pytest.raises(ConfigError, match="must divide heads"):
            heads_averaged(up, 4, groups)


def test_latents_are_those_that_a_layer_would_cache() -> None:
    cfg = nano()
    model, tokens = random_model(cfg), random_tokens(cfg, rows=2, length=20)
    latents = collect_latents(model, tokens)
    assert [z.shape for z in latents] == [(40, cfg.kv_lora_rank)] * cfg.num_hidden_layers
    first = model.layers[0]
    with torch.no_grad():
        x = first.input_layernorm(model.embed_tokens(tokens))
        latent, _ = first.self_attn._latents(x, rotations(cfg, torch.arange(20)))
    torch.testing.assert_close(latents[0], latent.flatten(0, 1))
    assert not any(norm._forward_hooks for norm in model.modules() if isinstance(norm, RMSNorm))


def test_loss_with_other_matrices_and_the_model_as_it_was() -> None:
    cfg = nano(num_hidden_layers=2)
    model, rows = random_model(cfg), random_tokens(cfg, rows=2, length=33)
    ups = ups_of(model)
    whole = held_out_loss(model, rows, pad_id=-1).per_token
    assert loss_after(model, ups, rows, -1) == whole
    silent = loss_after(model, [torch.zeros_like(up) for up in ups], rows, -1)
    assert abs(silent - whole) > 1e-3
    assert all(torch.equal(now, then) for now, then in zip(ups_of(model), ups, strict=True))
    with pytest.raises(RuntimeError):
        loss_after(model, [torch.zeros(1, 2, 3)] * 2, rows, -1)
    assert all(torch.equal(now, then) for now, then in zip(ups_of(model), ups, strict=True)), "also after an error"
