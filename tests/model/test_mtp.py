"""Multi-token prediction against transformers' MtpModel, and against what each depth may know."""

from pathlib import Path

import pytest
import torch
from random_models import YARN, assert_routing_is_awake, nano, random_model, random_tokens
from transformers import AutoModelForCausalLM
from transformers.modeling_layers import MtpModel

from dsv3_mini import DeepSeekV3, save_pretrained


def mtp_of_transformers(model: DeepSeekV3, folder: Path) -> tuple[torch.nn.Module, MtpModel]:
    """Main model and MTP, both read by transformers from the folder that we wrote."""
    save_pretrained(model, folder, dtype=torch.float32, max_shard_bytes=200_000)
    main = AutoModelForCausalLM.from_pretrained(folder)
    # It knows where MTP's tensors lie by the released model's layer number, 61.
    main._keys_to_ignore_on_load_unexpected = [rf"model\.layers\.{model.cfg.num_hidden_layers + d}\." for d in range(3)]
    return main, MtpModel.from_pretrained(main).eval()


@torch.no_grad()
@pytest.mark.parametrize("changes", [{}, YARN], ids=["plain", "YaRN"])
@pytest.mark.parametrize("depths", [1, 2])
def test_logits_of_every_depth_equal_transformers(depths: int, changes: dict, tmp_path: Path) -> None:
    model = random_model(nano(num_nextn_predict_layers=depths, **changes))
    tokens = random_tokens(model.cfg)
    assert_routing_is_awake(model, tokens)
    ours = model(tokens)
    assert len(ours.mtp_logits) == depths
    main, mtp = mtp_of_transformers(model, tmp_path / "saved")
    hidden = main.model(tokens).last_hidden_state  # after the final norm
    length = tokens.shape[1]
    for depth in range(1, depths + 1):
        kept = length - depth
        # There, MTP's positions are those of the tokens that it reads; here, of the states: RoPE sees distances only.
        positions = torch.arange(depth, length)[None].expand(len(tokens), -1)
        hidden = mtp.forward_layer(depth - 1, hidden[:, :kept], positions, None, input_ids=tokens[:, depth:])
        expected = main.lm_head(hidden)
        assert ours.mtp_logits[depth - 1].shape == expected.shape
        difference = (ours.mtp_logits[depth - 1] - expected).abs().max() / expected.abs().max()
        assert difference <= 1e-5
        assert (ours.mtp_logits[depth - 1] - ours.logits[:, :kept]).abs().max() > 0.5  # not the main logits again


def test_the_loss_of_one_depth_reaches_every_tensor_of_mtp_and_of_the_main_model() -> None:
    model = random_model(nano(num_nextn_predict_layers=2))
    logits = model(random_tokens(model.cfg, rows=4)).mtp_logits[1]
    (logits * torch.randn_like(logits)).mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, f"{name} gets no gradient"


def test_the_embedding_learns_from_both_of_its_uses() -> None:
    """The last token is read by MTP's input alone: the main state at its position has no depth after it."""
    model = random_model(nano())
    tokens = random_tokens(model.cfg, rows=1)
    tokens[0, -1] = 11
    assert (tokens == 11).sum() == 1
    logits = model(tokens).mtp_logits[0]
    (logits * torch.randn_like(logits)).mean().backward()
    assert model.embed_tokens.weight.grad[11].abs().max() > 0
    assert model.embed_tokens.weight.grad[tokens[0, 0]].abs().max() > 0


def test_a_shallower_depth_does_not_train_a_deeper_one() -> None:
    model = random_model(nano(num_nextn_predict_layers=2))
    logits = model(random_tokens(model.cfg)).mtp_logits[0]
    (logits * torch.randn_like(logits)).mean().backward()
    reached = {
        name.split(".")[1] for name, p in model.named_parameters() if name.startswith("mtp") and p.grad is not None
    }
    assert reached == {"0"}


@torch.no_grad()
def test_a_depth_reads_as_far_as_it_may_and_no_further() -> None:
    """At position i depth j has read tokens 0 .. i + j: it predicts the one after."""
    model = random_model(nano(num_nextn_predict_layers=2))
    tokens = random_tokens(model.cfg, rows=1, length=20)
    before = model(tokens)
    for place in (5, 12):
        changed = tokens.clone()
        changed[0, place] = (changed[0, place] + 1) % model.cfg.vocab_size
        after = model(changed)
        for depth, (old, new) in enumerate(zip(before.mtp_logits, after.mtp_logits, strict=True), start=1):
            moved = (new - old).abs().amax(-1)[0]
            assert (moved[: place - depth] < 1e-5).all()
            assert (moved[place - depth :] > 1e-4).all()


@torch.no_grad()
def test_short_inputs_have_fewer_depths() -> None:
    model = random_model(nano(num_nextn_predict_layers=2))
    for length, shapes in ((1, []), (2, [1]), (3, [2, 1])):
        out = model(random_tokens(model.cfg, length=length))
        assert [logits.shape[1] for logits in out.mtp_logits] == shapes
        assert len(out.routing) == 2 + len(shapes)


@torch.no_grad()
def test_main_logits_do_not_depend_on_mtp() -> None:
    with_mtp, without = random_model(nano()), random_model(nano(num_nextn_predict_layers=0))
    missing = without.load_state_dict(
        {name: tensor for name, tensor in with_mtp.state_dict().items() if not name.startswith("mtp")}
    )
    assert not missing.missing_keys
    tokens = random_tokens(with_mtp.cfg)
    assert torch.equal(with_mtp(tokens).logits, without(tokens).logits)
    assert without(tokens).mtp_logits == []


@torch.no_grad()
def test_documents_are_isolated_at_every_depth() -> None:
    """The part of a document whose whole view lies inside it: equal to running the document alone."""
    model = random_model(nano(num_nextn_predict_layers=2))
    tokens = random_tokens(model.cfg, rows=1, length=24)
    ids = torch.tensor([[0] * 7 + [1] * 9 + [2] * 8])
    together = model(tokens, document_ids=ids)
    for start, stop in ((0, 7), (7, 16), (16, 24)):
        alone = model(tokens[:, start:stop])
        for depth in (1, 2):
            part = together.mtp_logits[depth - 1][:, start : stop - depth]
            torch.testing.assert_close(part, alone.mtp_logits[depth - 1], rtol=1e-4, atol=1e-4)
