"""A model that recomputes against itself: the same gradients to the bit, for the work and the memory that it says."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dsv3_mini.config import ModelConfig
from dsv3_mini.inference.cache import LatentCache
from dsv3_mini.model import DeepSeekV3
from dsv3_mini.model.norm import RMSNorm
from dsv3_mini.parallel.recompute import recompute
from dsv3_mini.train.losses import Losses, training_losses

ROWS, LENGTH = 4, 32
ATTENTION = "aten::_scaled_dot_product_flash_attention_for_cpu"


class Watch(TorchDispatchMode):
    """Counts operations, and knows which of the memory that they made is still held."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[func.name()] += 1
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self.made[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return out

    def held(self) -> int:
        return sum(size for reference, size in self.made.values() if not reference.expired())


def step(model: DeepSeekV3) -> tuple[Losses, Watch, Watch]:
    draw = torch.Generator().manual_seed(3)
    tokens, targets = (torch.randint(0, model.cfg.vocab_size, (ROWS, LENGTH), generator=draw) for _ in range(2))
    model.zero_grad()
    with Watch() as forward:
        losses = training_losses(model, tokens, targets, 0.3, 1e-2)
    with Watch() as backward:
        losses.total.backward()
    return losses, forward, backward


@pytest.mark.parametrize("q_lora_rank", [32, None])
def test_the_same_gradients_for_two_products_a_block(q_lora_rank: int | None) -> None:
    model = DeepSeekV3(ModelConfig.preset("nano", vocab_size=64, q_lora_rank=q_lora_rank))
    kept, _, plain = step(model)
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    names = list(model.state_dict())
    recompute(model)
    losses, _, again = step(model)
    assert list(model.state_dict()) == names
    assert torch.equal(losses.total, kept.total)
    assert all(torch.equal(parameter.grad, gradients[name]) for name, parameter in model.named_parameters())
    blocks = model.cfg.num_hidden_layers + model.cfg.num_nextn_predict_layers
    up_projections = 1 if q_lora_rank is None else 2  # of keys and values, and of queries where they have a latent
    assert again.calls["aten::mm"] == plain.calls["aten::mm"] + up_projections * blocks
    assert again.calls["aten::_grouped_mm"] == plain.calls["aten::_grouped_mm"]
    assert again.calls[ATTENTION] == plain.calls[ATTENTION] == 0


def test_what_is_made_again_is_not_held() -> None:
    cfg = ModelConfig.preset("nano", vocab_size=64)
    model, rows = DeepSeekV3(cfg), torch.zeros(ROWS, LENGTH, dtype=torch.long)
    norms: dict[str, StorageWeakRef] = {}
    for name, module in model.named_modules():
        if isinstance(module, RMSNorm) and ("layers." in name or ".block." in name):
            module.register_forward_hook(
                lambda _, __, out, name=name: norms.update({name: StorageWeakRef(out.untyped_storage())})
            )
    held, kept = [], []
    for change in (lambda _: None, recompute):
        change(model)
        with Watch() as forward:
            losses = training_losses(model, rows, rows, 0.3, 1e-2)  # held, as backward is still to come
        held.append(forward.held())
        kept.append(sum(not reference.expired() for reference in norms.values()))
        del losses
    assert kept == [4 * 4, 0]  # the block's two norms and the latents' two, in three blocks and MTP's
    tokens = ROWS * (LENGTH * cfg.num_hidden_layers + (LENGTH - 1) * cfg.num_nextn_predict_layers)
    heads = cfg.num_attention_heads * 3 * cfg.qk_head_dim  # queries, keys, and values padded to their width
    widths = 2 * cfg.hidden_size + cfg.q_lora_rank + cfg.kv_lora_rank
    assert held[0] - held[1] >= 4 * tokens * (heads + widths)


def test_decoding_with_a_cache_is_left_alone() -> None:
    cfg = ModelConfig.preset("nano", vocab_size=64)
    model, tokens = DeepSeekV3(cfg), torch.arange(6)[None]
    expected = model(tokens).logits
    recompute(model)
    cache = LatentCache.for_model(cfg, 1, 6, torch.float32, torch.device("cpu"))
    cached = torch.cat([model(tokens[:, :5], cache=cache).logits, model(tokens[:, 5:], cache=cache).logits], dim=1)
    torch.testing.assert_close(cached, expected, rtol=1e-4, atol=1e-5)
