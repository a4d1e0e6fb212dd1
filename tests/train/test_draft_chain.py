"""Teaching an MTP module to draft on: what it reads is what it reads when it drafts, and nothing else of the model changes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from random_models import assert_routing_is_awake, nano, random_model, random_tokens

from dsv3_mini import from_pretrained, save_pretrained
from dsv3_mini.errors import ConfigError
from dsv3_mini.inference.cache import LatentCache
from dsv3_mini.model import DeepSeekV3
from dsv3_mini.model.rope import rotations
from dsv3_mini.model.transformer import visible
from dsv3_mini.train import draft_chain
from dsv3_mini.train.draft_chain import ChainRecipe, chain_mask, chain_states, teach

RECIPE = ChainRecipe(total_tokens=6_000, depths=3, learning_rate=3e-3, batch_size=4, context=24)


@torch.no_grad()
def drafted_one_by_one(model: DeepSeekV3, tokens: torch.Tensor, main: torch.Tensor, place: int, depths: int) -> list:
    """As a decoder drafts behind `place`: a cache of what is certain, then token for token beside the module's own state."""
    module, cache = model.mtp[-1], LatentCache(model.cfg, 1, 64, torch.float32, torch.device("cpu"))

    def read(text: torch.Tensor, beside: torch.Tensor) -> torch.Tensor:
        positions = cache.positions(text.shape[1])
        mask = visible(positions, cache.length + text.shape[1])
        return module(model.embed_tokens(text), beside, rotations(model.cfg, positions), mask, cache)[0][:, -1:]

    state = read(tokens[:, 1 : place + 2], main[:, : place + 1])
    states = [state]
    for depth in range(2, depths + 1):
        state = read(tokens[:, place + depth : place + depth + 1], state)
        states.append(state)
    return [state[:, 0] for state in states]


@torch.no_grad()
def test_each_place_drafts_as_a_decoder_does() -> None:
    model = random_model(nano())
    tokens = random_tokens(model.cfg, 1, 12)
    assert_routing_is_awake(model, tokens)
    main, _ = model.main_states(tokens)
    states = chain_states(model, tokens, main, 4)
    assert [s.shape[1] for s in states] == [8] * 4
    for place in range(8):
        for depth, wanted in enumerate(drafted_one_by_one(model, tokens, main, place, 4)):
            torch.testing.assert_close(states[depth][:, place], wanted, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_depth_one_is_the_module_of_pre_training() -> None:
    model = random_model(nano())
    tokens = random_tokens(model.cfg, 2, 10)
    hidden = model.hidden_states(tokens)
    torch.testing.assert_close(
        chain_states(model, tokens, hidden.main, 3)[0], hidden.mtp[0][:, :7], rtol=1e-4, atol=1e-4
    )


def test_the_mask_shows_the_past_of_depth_one_and_its_own_place_of_the_others() -> None:
    mask = chain_mask(3, 3)[0].long().tolist()
    assert mask == [[1, 0, 0] + [1, 0, 0] * 2, [1, 1, 0] + [0, 1, 0] * 2, [1, 1, 1] + [0, 0, 1] * 2]


def test_only_the_module_learns_and_every_depth_comes_nearer_to_the_main_model() -> None:
    model = random_model(nano())
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    # Eight rows again and again: what the main model says of them can be learnt.
    rows = [random_tokens(model.cfg, 4, 24, seed) for seed in (1, 2)] * 30
    steps = list(teach(model, rows, RECIPE))
    for name, weight in model.state_dict().items():
        moved = not torch.equal(weight, before[name])
        assert moved == (name.startswith("mtp.") and "e_score_correction_bias" not in name), name
    first, last = steps[0], steps[-1]
    assert len(first.losses) == 3 and all(b < a - 0.2 for a, b in zip(first.losses, last.losses, strict=True))
    assert steps[-1].tokens == 60 * 4 * 24


def test_the_loss_is_the_cross_entropy_with_what_the_main_model_says_after_the_same_tokens() -> None:
    model = random_model(nano())
    tokens = random_tokens(model.cfg, 1, 9)
    losses, _ = draft_chain._losses(model, tokens, 2)
    with torch.no_grad():
        output = model(tokens)
        states = chain_states(model, tokens, model.main_states(tokens)[0], 2)
        for depth, (loss, state) in enumerate(zip(losses, states, strict=True)):
            terms = []
            for place in range(7):  # depth d at place i has read the tokens up to i + d + 1
                p = output.logits[0, place + depth + 1].softmax(-1)
                terms.append(-(p * model.lm_head(state[0, place]).log_softmax(-1)).sum())
            torch.testing.assert_close(loss, torch.stack(terms).mean())


def test_the_average_of_the_weights_is_what_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a decay of 1 it never leaves the first weights."""
    model = random_model(nano())
    before = model.mtp[-1].eh_proj.weight.detach().clone()
    list(teach(model, [random_tokens(model.cfg, 2, 24)] * 3, ChainRecipe(total_tokens=200, depths=2, ema_decay=1.0)))
    assert torch.equal(model.mtp[-1].eh_proj.weight, before)


def test_refusals() -> None:
    with pytest.raises(ConfigError, match="num_nextn_predict_layers = 0: the model has no MTP module to teach"):
        next(teach(random_model(nano(num_nextn_predict_layers=0)), [], RECIPE))
    model = random_model(nano())
    with pytest.raises(ConfigError, match="depths = 3 needs rows of more tokens than 4"):
        next(teach(model, [random_tokens(model.cfg, 1, 4)], RECIPE))


def test_the_command_writes_a_model_with_the_same_main_model(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    torch.manual_seed(0)
    folder, out = tmp_path / "nano", tmp_path / "taught"
    save_pretrained(random_model(nano(vocab_size=4096)), folder)
    assert draft_chain.main([str(folder), "--out", str(out), "--tokens", "3400"]) == 0
    assert "agreed by depth" in capsys.readouterr().out
    one, other = from_pretrained(folder).state_dict(), from_pretrained(out).state_dict()
    changed = {name.split(".")[0] for name in one if not torch.equal(one[name], other[name])}
    assert changed == {"mtp"}
    with pytest.raises(ConfigError, match="exists: choose another --out"):
        draft_chain.main([str(folder), "--out", str(out)])
    with pytest.raises(ConfigError, match="--tokens 100 must be at least 1664"):
        draft_chain.main([str(folder), "--out", str(tmp_path / "other"), "--tokens", "100"])
    assert not (tmp_path / "other").exists()
