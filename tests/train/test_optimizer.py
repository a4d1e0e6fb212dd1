"""MasterAdamW against torch's AdamW, and against what FP32 masters and a moving average are there for."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

from dsv3_mini.errors import CheckpointError
from dsv3_mini.train.checkpoint import Checkpoint
from dsv3_mini.train.optimizer import MasterAdamW

BETAS, DECAY = (0.9, 0.95), 0.1


class Net(nn.Module):
    """Matrices, a vector and a 3-dimensional stack, as the model has them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 12, bias=False)
        self.norm = nn.Parameter(torch.rand(12) + 0.5)
        self.stack = nn.Parameter(0.3 * torch.randn(3, 12, 4))
        self.never_used = nn.Parameter(torch.ones(5, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("bd,edf->bef", torch.tanh(self.first(x)) * self.norm, self.stack)


def backward(model: Net, step: int) -> None:
    random = torch.Generator().manual_seed(step)
    x = torch.randn(16, 6, generator=random).to(model.norm)
    (model(x) - torch.randn(16, 3, 4, generator=random).to(x)).square().mean().backward()


def reference(model: Net, fused: bool) -> Callable[[float, float], torch.Tensor]:
    """AdamW as a user of torch would write it: matrices decay, the vector does not."""
    matrices = [model.first.weight, model.stack, model.never_used]
    groups = [{"params": matrices, "weight_decay": DECAY}, {"params": [model.norm], "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=1.0, betas=BETAS, fused=fused)

    def step(learning_rate: float, clip_norm: float) -> torch.Tensor:
        norm = nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
        for group in adamw.param_groups:
            group["lr"] = learning_rate
        adamw.step()
        adamw.zero_grad()
        return norm

    return step


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("clip_norm", [1e9, 0.05])
def test_fp32_is_torchs_adamw(fused: bool, clip_norm: float) -> None:
    ours = Net()
    theirs = copy.deepcopy(ours)
    optimizer, step = MasterAdamW(ours, BETAS, DECAY, 0.0), reference(theirs, fused)
    for i in range(12):
        backward(ours, i)
        backward(theirs, i)
        learning_rate = 1e-2 * (i + 1)
        norm = optimizer.clip_gradients(clip_norm)
        optimizer.step(learning_rate)
        reference_norm = step(learning_rate, clip_norm)
        assert norm.item() == pytest.approx(reference_norm.item(), rel=0 if fused else 1e-5)
        assert norm > 0.05  # so that the small clip_norm does clip
        for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
            if fused:
                assert torch.equal(p, q), name
            else:
                torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)
    assert all(parameter.grad is None for parameter in ours.parameters())


def test_matrices_decay_and_vectors_do_not() -> None:
    model = Net()
    before = copy.deepcopy(model)
    optimizer = MasterAdamW(model, BETAS, DECAY, 0.0)
    for _ in range(3):
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.clip_gradients(1.0)
        optimizer.step(0.5)
    for (name, p), q in zip(model.named_parameters(), before.parameters(), strict=True):
        torch.testing.assert_close(p, q if name == "norm" else q * (1 - 0.5 * DECAY) ** 3, msg=name)


def test_clipping_scales_all_gradients_by_one_number() -> None:
    model = Net()
    optimizer = MasterAdamW(model, BETAS, DECAY, 0.0)
    backward(model, 0)
    raw = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    norm = optimizer.clip_gradients(0.01)
    assert norm.item() == pytest.approx(sum(g.double().square().sum().item() for g in raw) ** 0.5, rel=1e-5)
    clipped = [p.grad for p in model.parameters() if p.grad is not None]
    for g, c in zip(raw, clipped, strict=True):
        torch.testing.assert_close(c, g * (0.01 / norm), rtol=1e-3, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gradient_that_is_not_finite_is_kept_to_be_looked_at(dtype: torch.dtype) -> None:
    model = Net().to(dtype)
    optimizer = MasterAdamW(model, BETAS, DECAY, 0.9)
    backward(model, 0)
    model.stack.grad[1, 2, 3] = torch.inf
    assert optimizer.clip_gradients(1.0) == torch.inf
    assert optimizer.masters["stack"].grad.isinf().sum() == 1
    assert optimizer.masters["norm"].grad.isfinite().all() and optimizer.masters["first.weight"].grad.isfinite().all()


# ---- BF16 ------------------------------------------------------------------------------------------------------------


def test_updates_too_small_for_bf16_add_up_in_the_masters() -> None:
    model = Net().to(torch.bfloat16)
    with torch.no_grad():
        model.norm.fill_(1.0)  # the next BF16 numbers are 1.0078 and 0.9961
    optimizer = MasterAdamW(model, BETAS, DECAY, 0.0)
    seen = []
    for _ in range(40):
        model.norm.grad = torch.ones_like(model.norm)
        optimizer.clip_gradients(1e9)
        optimizer.step(1e-4)  # Adam moves by the learning rate where all gradients are equal
        seen.append(model.norm[0].item())
        assert optimizer.masters["norm"].dtype == torch.float32
        assert torch.equal(model.norm.detach(), optimizer.masters["norm"].to(torch.bfloat16))
    assert seen[0] == seen[9] == 1.0, "a tenth of a BF16 step does not move the weight at once"
    assert seen[-1] == 0.99609375
    torch.testing.assert_close(optimizer.masters["norm"], torch.full((12,), 1 - 40e-4), rtol=0, atol=1e-6)


def test_bf16_masters_take_the_steps_of_adamw_on_the_bf16_gradients() -> None:
    model = Net().to(torch.bfloat16)
    theirs = copy.deepcopy(model).float()
    optimizer, step = MasterAdamW(model, BETAS, DECAY, 0.0), reference(theirs, fused=True)
    for i in range(6):
        backward(model, i)
        for p, q in zip(model.parameters(), theirs.parameters(), strict=True):
            q.grad = None if p.grad is None else p.grad.float()
        norm = optimizer.clip_gradients(0.1)
        optimizer.step(1e-2)
        assert norm == step(1e-2, 0.1)
        for (name, master), q in zip(optimizer.masters.items(), theirs.parameters(), strict=True):
            assert torch.equal(master, q), name


def test_masters_start_at_the_weights_before_rounding() -> None:
    exact = Net()
    start = {name: parameter.detach().clone() for name, parameter in exact.named_parameters()}
    optimizer = MasterAdamW(copy.deepcopy(exact).to(torch.bfloat16), BETAS, DECAY, 0.9, start)
    assert all(torch.equal(optimizer.masters[name], start[name]) for name in start)
    assert all(torch.equal(optimizer.ema[name], start[name]) for name in start)
    assert not torch.equal(start["stack"], start["stack"].bfloat16().float())


def test_gradients_of_micro_batches_add_up_in_fp32() -> None:
    model = Net().to(torch.bfloat16)
    optimizer = MasterAdamW(model, BETAS, DECAY, 0.0)
    for part in [1.0] + [2.0**-9] * 256:  # in BF16, 1 + 2^-9 is 1
        model.norm.grad = torch.full_like(model.norm, part)
        optimizer.collect_gradients()
    assert torch.equal(optimizer.masters["norm"].grad, torch.full((12,), 1.5))
    assert model.norm.grad is None


# ---- moving average --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_moving_average_is_its_closed_formula(dtype: torch.dtype, device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    model, decay = Net().to(device, dtype), 0.8
    optimizer = MasterAdamW(model, BETAS, DECAY, decay)
    history = [{name: m.detach().double().cpu().clone() for name, m in optimizer.masters.items()}]
    for i in range(9):
        backward(model, i)
        optimizer.clip_gradients(1.0)
        optimizer.step(0.05)
        history.append({name: m.detach().double().cpu().clone() for name, m in optimizer.masters.items()})
    for name, average in optimizer.ema.items():
        expected = decay**9 * history[0][name]
        expected = expected + sum((1 - decay) * decay ** (9 - i) * history[i][name] for i in range(1, 10))
        torch.testing.assert_close(average.double(), expected, rtol=1e-5, atol=1e-6)
        assert average.dtype == torch.float32 and not average.requires_grad and average.device.type == "cpu"


def test_no_average_is_kept_where_none_is_wanted() -> None:
    optimizer = MasterAdamW(Net(), BETAS, DECAY, 0.0)
    assert not optimizer.ema and not any(name.startswith("ema.") for name in optimizer.tensors())


# ---- in and out ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("steps_before", [0, 4])
def test_state_that_went_out_and_in_goes_on_to_the_bit(dtype: torch.dtype, steps_before: int, tmp_path) -> None:
    def go(model: Net, optimizer: MasterAdamW, steps: range) -> None:
        for i in steps:
            backward(model, i)
            optimizer.clip_gradients(1.0)
            optimizer.step(0.03)

    first = Net().to(dtype)
    one = MasterAdamW(first, BETAS, DECAY, 0.9)
    go(first, one, range(steps_before))
    kept = {name: tensor.clone() for name, tensor in one.tensors().items()}
    second = Net().to(dtype)
    two = MasterAdamW(second, BETAS, DECAY, 0.9)
    go(second, two, range(20, 20 + steps_before))  # somewhere else entirely
    two.load_tensors(Checkpoint(tmp_path, kept, {}))
    go(first, one, range(steps_before, 9))
    go(second, two, range(steps_before, 9))
    left, right = one.tensors(), two.tensors()
    assert left.keys() == right.keys() and {"master.norm", "ema.stack", "exp_avg.norm", "step.norm"} <= left.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name
    for p, q in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("name", ["master.stack", "ema.norm", "exp_avg.norm", "exp_avg_sq.first.weight", "step.stack"])
@pytest.mark.parametrize("damage", ["missing", "reshaped"])
def test_a_tensor_that_does_not_fit_is_named(name: str, damage: str, tmp_path) -> None:
    model = Net()
    optimizer = MasterAdamW(model, BETAS, DECAY, 0.9)
    backward(model, 0)
    optimizer.step(0.01)
    tensors = optimizer.tensors()
    if damage == "missing":
        del tensors[name]
    else:
        tensors[name] = torch.zeros(2, 2)
    with pytest.raises(CheckpointError) as caught:
        optimizer.load_tensors(Checkpoint(tmp_path, tensors, {}))
    message = str(caught.value)
    assert name in message and ("is missing" if damage == "missing" else "(2, 2)") in message and "\n" not in message
