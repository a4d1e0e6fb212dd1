"""The whole model: initialisation, causality, documents, precision, devices, and inputs that it must refuse."""

import pytest
import torch
from random_models import YARN, nano, random_model, random_tokens

from dsv3_mini import DeepSeekV3
from dsv3_mini.errors import DataError
from dsv3_mini.model.experts import LoopExperts
from dsv3_mini.model.norm import RMSNorm


def test_initialisation_is_the_reports() -> None:
    """Normal of std 0.006 for every matrix, ones for norms, zeros for biases (report section 4.2)."""
    model = DeepSeekV3(nano(initializer_range=0.006, num_nextn_predict_layers=2))
    norms = {id(module.weight) for module in model.modules() if isinstance(module, RMSNorm)}
    assert len(norms) == 3 * 4 + 1 + 2 * 7
    for name, parameter in model.named_parameters():
        if id(parameter) in norms:
            assert (parameter == 1).all(), name
            continue
        assert parameter.std().item() == pytest.approx(0.006, rel=0.15), name
        assert abs(parameter.mean().item()) < 0.006 * 5 / parameter.numel() ** 0.5, name
        assert parameter.abs().max() > 0.012, name  # a normal has tails
    assert all((bias == 0).all() for bias in model.buffers())


def test_the_norm_is_computed_in_fp32() -> None:
    norm = RMSNorm(64, eps=1e-6).bfloat16()
    torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
    x = (torch.randn(5, 64) * 100).bfloat16()
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight.double()
    assert torch.equal(norm(x), exact.to(torch.bfloat16))
    assert norm(torch.zeros(1, 64)).abs().max() == 0  # eps keeps 0/0 away


@torch.no_grad()
def test_a_later_token_changes_nothing_before_it() -> None:
    model = random_model(nano(**YARN))
    tokens = random_tokens(model.cfg, rows=1, length=30)
    before = model(tokens)
    for place in (1, 15, 29):
        changed = tokens.clone()
        changed[0, place] = (changed[0, place] + 7) % model.cfg.vocab_size
        after = model(changed)
        moved = (after.logits - before.logits).abs().amax(-1)[0]
        assert (moved[:place] < 1e-5).all() and (moved[place:] > 1e-3).all()
        for old, new in zip(before.routing[:2], after.routing[:2], strict=True):
            assert torch.equal(old.chosen[:, :place], new.chosen[:, :place])


@torch.no_grad()
def test_rows_do_not_see_each_other() -> None:
    """Experts sort all rows' tokens together, and put them back."""
    model = random_model(nano())
    tokens = random_tokens(model.cfg, rows=3)
    together = model(tokens).logits
    alone = torch.cat([model(row[None]).logits for row in tokens])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_packed_documents_equal_documents_alone() -> None:
    model = random_model(nano(**YARN))
    tokens = random_tokens(model.cfg, rows=2, length=20)
    ids = torch.tensor([[4] * 3 + [1] * 10 + [9] * 7, [0] * 12 + [1] * 8])
    packed = model(tokens, document_ids=ids).logits
    for row, cuts in ((0, (0, 3, 13, 20)), (1, (0, 12, 20))):
        for start, stop in zip(cuts, cuts[1:], strict=False):
            alone = model(tokens[row : row + 1, start:stop]).logits
            torch.testing.assert_close(packed[row : row + 1, start:stop], alone, rtol=1e-4, atol=2e-4)
    assert (model(tokens).logits - packed)[:, 13:].abs().max() > 0.1  # without the mask, documents run together


@torch.no_grad()
def test_grouped_and_loop_experts_are_one_model() -> None:
    grouped, loop = random_model(nano()), DeepSeekV3(nano(), experts=LoopExperts)
    loop.load_state_dict(grouped.state_dict())
    tokens = random_tokens(grouped.cfg)
    one, other = grouped(tokens), loop(tokens)
    torch.testing.assert_close(one.logits, other.logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(one.mtp_logits[0], other.mtp_logits[0], rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("experts", [None, LoopExperts], ids=["grouped", "loop"])
def test_bf16_stays_close_to_fp32(experts: type | None) -> None:
    """Where both choose the same experts; a rounding may swap two of nearly equal affinity, for few tokens."""
    kind = {} if experts is None else {"experts": experts}
    exact = random_model(nano(), **kind)
    tokens = random_tokens(exact.cfg, rows=4)
    expected = exact(tokens)
    out = exact.bfloat16()(tokens)
    assert out.logits.dtype == torch.bfloat16
    same = torch.stack(
        [
            (a.chosen.sort(-1).values == b.chosen.sort(-1).values).all(-1)
            for a, b in zip(out.routing[:2], expected.routing[:2], strict=True)
        ]
    ).all(0)
    assert same.float().mean() > 0.9
    error = (out.logits.float() - expected.logits)[same].norm() / expected.logits[same].norm()
    assert 1e-4 < error < 0.04


def test_meta_gives_the_shapes_of_the_real_thing() -> None:
    cfg = nano(num_nextn_predict_layers=2)
    real = random_model(cfg)(random_tokens(cfg, length=9))
    with torch.device("meta"):
        out = DeepSeekV3(cfg)(torch.zeros(2, 9, dtype=torch.long))
    assert out.logits.is_meta and out.logits.shape == real.logits.shape
    assert [x.shape for x in out.mtp_logits] == [x.shape for x in real.mtp_logits]
    assert [r.chosen.shape for r in out.routing] == [r.chosen.shape for r in real.routing]
    with torch.device("meta"):
        half = DeepSeekV3(cfg).bfloat16()(torch.zeros(2, 9, dtype=torch.long))
    assert half.logits.dtype == torch.bfloat16


BAD_TOKENS = {
    "one row without a batch": (torch.zeros(5, dtype=torch.long), "(5,)"),
    "three dimensions": (torch.zeros(1, 2, 3, dtype=torch.long), "(1, 2, 3)"),
    "no tokens": (torch.zeros(2, 0, dtype=torch.long), "(2, 0)"),
    "no rows": (torch.zeros(0, 4, dtype=torch.long), "(0, 4)"),
    "floats": (torch.zeros(1, 4), "float32"),
    "booleans": (torch.zeros(1, 4, dtype=torch.bool), "bool"),
    "longer than the context": (torch.zeros(1, 257, dtype=torch.long), "max_position_embeddings = 256"),
}


@pytest.mark.parametrize("name", BAD_TOKENS)
def test_tokens_that_cannot_be_read_are_refused_in_one_line(name: str) -> None:
    tokens, says = BAD_TOKENS[name]
    with pytest.raises(DataError) as error:
        DeepSeekV3(nano())(tokens)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_the_longest_context_is_accepted() -> None:
    cfg = nano()
    with torch.no_grad():
        assert DeepSeekV3(cfg)(random_tokens(cfg, rows=1, length=256)).logits.isfinite().all()
