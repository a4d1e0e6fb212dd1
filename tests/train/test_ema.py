"""The moving average against its closed formula, and against weights that do not wait for it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dsv3_mini.train.ema import MovingAverage

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
DECAY, UPDATES = 0.8, 12


def weights(device: str, size: int = 7) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(3)
    return {name: torch.randn(shape, generator=draw).to(device).requires_grad_() for name, shape in
            (("matrix", (size, 5)), ("row", (size,)), ("scalar", ()), ("none", (0, 4)))}  # fmt: skip


@pytest.mark.parametrize("device", DEVICES)
def test_it_is_the_sum_of_all_that_it_saw(device: str) -> None:
    """decay^N w_0 + sum_i (1 - decay) decay^(N - i) w_i, in FP64."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    # On a GPU, large enough that a copy takes longer than what follows it takes to be asked for.
    own = weights(device, 7 if device == "cpu" else 4_000_000)
    average, history = MovingAverage(own, DECAY), [{name: w.detach().double().cpu() for name, w in own.items()}]
    for step in range(UPDATES):
        average.before_step()
        with torch.no_grad():
            for weight in own.values():
                weight.mul_(0.9).add_(torch.ones_like(weight) * step)
        if device == "cpu" or step == UPDATES - 1:
            history.append({name: w.detach().double().cpu() for name, w in own.items()})
        else:  # nothing is read in between: a read would wait for the copies
            history.append({name: 0.9 * w + step for name, w in history[-1].items()})
        average.update()
    average.before_step()
    with torch.no_grad():
        for weight in own.values():
            weight.fill_(1e6)  # what comes after the last update must not be in it
    assert list(average) == list(own) and len(average) == len(own)
    for name, found in average.items():
        expected = DECAY**UPDATES * history[0][name]
        expected = expected + sum(
            (1 - DECAY) * DECAY ** (UPDATES - i) * history[i][name] for i in range(1, UPDATES + 1)
        )
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
        assert found.dtype == torch.float32 and found.device.type == "cpu" and not found.requires_grad


def test_it_starts_at_the_first_weights_and_shares_nothing_with_them() -> None:
    own = weights("cpu")
    average = MovingAverage(own, DECAY)
    assert all(torch.equal(average[name], weight) for name, weight in own.items())
    with torch.no_grad():
        own["matrix"].zero_()
    assert average["matrix"].any()


def test_of_nothing_it_is_nothing() -> None:
    average = MovingAverage({}, 0.0)
    average.before_step()
    average.update()
    assert not average and list(average) == []
