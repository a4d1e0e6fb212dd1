"""The losses against torch's plain cross-entropy, and against the report's equations written out in loops."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dsv3_mini.config import ModelConfig
from dsv3_mini.data.packing import IGNORED
from dsv3_mini.model import DeepSeekV3
from dsv3_mini.model.router import Router
from dsv3_mini.train.balance import routers
from dsv3_mini.train.losses import CHUNK, cross_entropy, sequence_balance_loss, token_losses, training_losses


def problem(rows: int, length: int, ignored: float, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Tensor]:
    """Hidden states, a head, and targets of which a share is ignored."""
    random = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, length, 24, generator=random).to(dtype)
    head = torch.randn(37, 24, generator=random).mul(0.5).to(dtype)
    targets = torch.randint(0, 37, (rows, length), generator=random)
    targets[torch.rand(rows, length, generator=random) < ignored] = IGNORED
    return [hidden, head, targets]


def value_and_gradients(loss_of: object, hidden: Tensor, head: Tensor, targets: Tensor) -> list[Tensor]:
    hidden, head = hidden.clone().requires_grad_(), head.clone().requires_grad_()
    loss = loss_of(hidden, head, targets)
    (3.0 * loss).backward()  # not 1: the gradient that arrives from outside must be passed on
    return [loss.detach(), hidden.grad, head.grad]


def plain(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy((hidden @ head.T).flatten(0, 1), targets.flatten(), ignore_index=IGNORED)


@pytest.mark.parametrize(
    "rows, length",
    [(1, 1), (2, 5), (1, CHUNK - 1), (1, CHUNK), (1, CHUNK + 1), (2, CHUNK), (3, CHUNK + 7), (5, 211)],
)
@pytest.mark.parametrize("ignored", [0.0, 0.3])
def test_chunked_cross_entropy_is_torchs(rows: int, length: int, ignored: float) -> None:
    hidden, head, targets = problem(rows, length, ignored)
    targets[0, 0] = 7
    ours = value_and_gradients(cross_entropy, hidden, head, targets)
    exact = value_and_gradients(plain, hidden.double(), head.double(), targets)
    for got, expected in zip(ours, exact, strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("length", [3, CHUNK + 3])
def test_all_ignored_is_zero_and_not_a_nan(length: int) -> None:
    hidden, head, _ = problem(2, length, 0.0)
    loss, to_hidden, to_head = value_and_gradients(cross_entropy, hidden, head, torch.full((2, length), IGNORED))
    assert loss == 0 and not to_hidden.any() and not to_head.any()


def test_ignored_positions_weigh_nothing() -> None:
    hidden, head, targets = problem(2, 600, 0.4)
    _, to_hidden, _ = value_and_gradients(cross_entropy, hidden, head, targets)
    assert not to_hidden[targets == IGNORED].any() and to_hidden[targets != IGNORED].any(-1).all()


def test_bf16_is_as_close_as_bf16_allows_and_sums_its_chunks_in_fp32() -> None:
    hidden, head, targets = problem(8, 4 * CHUNK, 0.2, torch.bfloat16)
    ours = value_and_gradients(cross_entropy, hidden, head, targets)
    exact = value_and_gradients(plain, hidden.double(), head.double(), targets)
    assert [x.dtype for x in ours] == [torch.float32, torch.bfloat16, torch.bfloat16]
    assert ours[0].item() == pytest.approx(exact[0].item(), rel=2e-3)
    # Gradients of the head added up in BF16, chunk by chunk, would be 0.006 off.
    for got, expected, bound in zip(ours[1:], exact[1:], (0.005, 0.004), strict=True):
        assert (got.double() - expected).norm() < bound * expected.norm()


def test_large_logits_do_not_overflow() -> None:
    hidden, head, targets = problem(1, 9, 0.0)
    ours = value_and_gradients(cross_entropy, 1e4 * hidden, head, targets)
    exact = value_and_gradients(plain, 1e4 * hidden.double(), head.double(), targets)
    for got, expected in zip(ours, exact, strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-6)


def test_only_what_needs_a_gradient_gets_one() -> None:
    hidden, head, targets = problem(2, 9, 0.2)
    expected = plain(hidden, head, targets)
    torch.testing.assert_close(cross_entropy(hidden, head, targets), expected)
    hidden.requires_grad_()
    cross_entropy(hidden, head, targets).backward()
    assert hidden.grad is not None and head.grad is None


def test_token_losses_are_each_positions_cross_entropy() -> None:
    hidden, head, targets = problem(3, 40, 0.3)
    share = (hidden.double() @ head.double().T).softmax(-1)
    losses = token_losses(hidden, head, targets)
    for row in range(3):
        for i, target in enumerate(targets[row].tolist()):
            expected = 0.0 if target == IGNORED else -math.log(share[row, i, target])
            assert losses[row, i].item() == pytest.approx(expected, abs=1e-5)


# ---- multi-token prediction ------------------------------------------------------------------------------------------


def deep_model(**changes: object) -> DeepSeekV3:
    return DeepSeekV3(ModelConfig.preset("nano", num_nextn_predict_layers=3, initializer_range=0.2, **changes))


def test_depth_j_at_position_i_predicts_token_i_plus_j_plus_1() -> None:
    model = deep_model()
    row = torch.randint(0, 512, (2, 13))
    tokens, targets = row[:, :-1], row[:, 1:].clone()
    targets[1, -3:] = IGNORED  # a padded end: nothing that lies in it is anybody's target
    out = model(tokens)
    assert len(out.mtp_logits) == 3
    depths = []
    for j, logits in enumerate(out.mtp_logits, start=1):
        found = []
        for r in range(2):
            known = row[r].tolist() if r == 0 else row[r, :-3].tolist()
            for i in range(tokens.shape[1]):
                if i + j + 1 < len(known):
                    found.append(-logits[r, i].double().log_softmax(-1)[known[i + j + 1]].item())
        depths.append(sum(found) / len(found))
    losses = training_losses(model, tokens, targets, mtp_weight=0.3, balance_weight=0.0)
    assert losses.mtp.item() == pytest.approx(sum(depths) / 3, abs=1e-5)
    assert len({round(depth, 3) for depth in depths}) == 3
    assert losses.total.item() == pytest.approx(losses.main.item() + 0.3 * losses.mtp.item(), abs=1e-5)
    assert losses.main.item() == pytest.approx(plain_loss(out.logits, targets).item(), abs=1e-5)


def plain_loss(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED)


def test_at_lambda_zero_the_modules_do_not_run() -> None:
    model = deep_model()
    row = torch.randint(0, 512, (2, 13))
    losses = training_losses(model, row[:, :-1], row[:, 1:], mtp_weight=0.0, balance_weight=0.0)
    losses.total.backward()
    assert losses.mtp == 0 and losses.total == losses.main
    assert all(parameter.grad is None for parameter in model.mtp.parameters())
    main_layers = [
        r.layer
        for r in training_losses(model, row[:, :-1], row[:, 1:], 0.3, 0.0).routing
        if r.layer < len(model.layers)
    ]
    assert [r.layer for r in losses.routing] == main_layers
    assert model.lm_head.weight.grad.any()


@pytest.mark.parametrize("cut", [[1, 1, 1, 1], [3, 1], [2, 2]])
def test_micro_batches_add_up_to_the_batch(cut: list[int]) -> None:
    model = deep_model()
    row = torch.randint(0, 512, (4, 17))
    tokens, targets = row[:, :-1], row[:, 1:].clone()
    for r, padded in enumerate([0, 9, 3, 14]):  # rows of very different weight
        targets[r, 16 - padded :] = IGNORED
    whole = training_losses(model, tokens, targets, 0.3, 0.5)
    whole.total.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    parts = [
        training_losses(model, t, y, 0.3, 0.5, batch_targets=targets)
        for t, y in zip(tokens.split(cut), targets.split(cut), strict=True)
    ]
    for part in parts:
        part.total.backward()
    for name in ("total", "main", "mtp", "balance"):
        added = sum(getattr(part, name).item() for part in parts)
        assert added == pytest.approx(getattr(whole, name).item(), abs=1e-5), name
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=1e-6, msg=name)


# ---- sequence-wise balance -------------------------------------------------------------------------------------------


def balance_in_loops(scores: list[list[list[float]]], k: int) -> float:
    """Equations 17-20, one sum at a time; alpha is 1."""
    total = 0.0
    for sequence in scores:
        length, experts = len(sequence), len(sequence[0])
        for i in range(experts):
            count, mean_share = 0, 0.0
            for token in sequence:
                best = sorted(range(experts), key=lambda e: -token[e])[:k]
                count += i in best
                mean_share += token[i] / sum(token) / length
            total += experts / (k * length) * count * mean_share
    return total / len(scores)


@settings(max_examples=30)
@given(st.integers(1, 3), st.integers(1, 9), st.integers(2, 9), st.data())
def test_sequence_balance_loss_is_equations_17_to_20(rows: int, length: int, experts: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, experts))
    random = torch.Generator().manual_seed(data.draw(st.integers(0, 10**6)))
    scores = torch.rand(rows, length, experts, generator=random, dtype=torch.float64) + 1e-3
    assert sequence_balance_loss(scores, k).item() == pytest.approx(balance_in_loops(scores.tolist(), k), abs=1e-9)


@pytest.mark.parametrize("experts, k", [(4, 1), (8, 2), (6, 3)])
def test_balance_loss_at_its_ends(experts: int, k: int) -> None:
    turning = torch.stack([torch.eye(experts).roll(i, 0)[0] for i in range(experts)])
    spread = sum(turning.roll(shift, 0) for shift in range(k))[None] + 1e-6  # every expert as often as every other
    assert sequence_balance_loss(spread, k).item() == pytest.approx(1.0, abs=1e-4)
    collapsed = torch.full((1, 50, experts), 1e-6)
    collapsed[..., :k] = 1.0
    assert sequence_balance_loss(collapsed, k).item() == pytest.approx(experts / k, rel=1e-3)


def test_balance_gradient_flows_through_the_shares_alone() -> None:
    scores = torch.rand(2, 11, 6, dtype=torch.float64) + 0.05
    counted = torch.zeros(2, 6, dtype=torch.float64)
    for r in range(2):
        for token in scores[r]:
            counted[r, token.topk(2).indices] += 6 / (2 * 11)

    def with_frozen_counts(s: Tensor) -> Tensor:
        return (counted * (s / s.sum(-1, keepdim=True)).mean(1)).sum(-1).mean()

    ours, frozen = (scores.clone().requires_grad_() for _ in range(2))
    sequence_balance_loss(ours, 2).backward()
    with_frozen_counts(frozen).backward()
    torch.testing.assert_close(ours.grad, frozen.grad)
    assert ours.grad.abs().max() > 0
    # Numbers, not only graphs: a nudge that changes no choice changes the loss as the gradient says.
    nudged = scores.clone()
    nudged[0, 3, 1] += 1e-7
    slope = (sequence_balance_loss(nudged, 2) - sequence_balance_loss(scores, 2)).item() / 1e-7
    assert slope == pytest.approx(ours.grad[0, 3, 1].item(), rel=1e-4)


def test_biases_change_the_choice_but_not_the_balance_loss_of_their_layer() -> None:
    # The MTP block is the last to route, so its own bias reaches no other layer's input.
    model = DeepSeekV3(ModelConfig.preset("nano", initializer_range=0.2))
    row = torch.randint(0, 512, (2, 25))
    before = training_losses(model, row[:, :-1], row[:, 1:], 0.3, 1.0)
    last: Router = routers(model)[-1]
    assert last.layer == 3
    last.e_score_correction_bias.copy_(torch.linspace(-2, 2, 8))
    after = training_losses(model, row[:, :-1], row[:, 1:], 0.3, 1.0)
    assert not torch.equal(before.routing[-1].load, after.routing[-1].load)
    assert after.balance.item() == before.balance.item()
    assert after.mtp.item() != before.mtp.item()


def test_balance_loss_of_a_batch_adds_up_its_layers() -> None:
    model = DeepSeekV3(ModelConfig.preset("nano", initializer_range=0.2))
    row = torch.randint(0, 512, (2, 25))
    losses = training_losses(model, row[:, :-1], row[:, 1:], 0.3, 2.0)
    assert [r.layer for r in losses.routing] == [1, 2, 3]
    expected = sum(balance_in_loops(r.scores.tolist(), 2) for r in losses.routing)
    assert losses.balance.item() == pytest.approx(expected, rel=1e-5)
    others = losses.main.item() + 0.3 * losses.mtp.item()
    assert losses.total.item() == pytest.approx(others + 2 * expected, rel=1e-5)
    losses.total.backward()
    assert all(router.weight.grad.any() for router in routers(model))
