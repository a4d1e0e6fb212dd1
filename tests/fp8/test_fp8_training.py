"""A run in FP8: what is kept of an activation, in what masters, gradients and moments are held, and that it learns."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from nano_runs import all_state, assert_bit_equal, nano_recipe, nano_trainer
from torch import Tensor

from dsv3_mini import ModelConfig, from_pretrained
from dsv3_mini.cli import main
from dsv3_mini.errors import ConfigError
from dsv3_mini.fp8.convert import from_fp8, to_fp8
from dsv3_mini.fp8.inference import load_fp8
from dsv3_mini.fp8.kept import bytes_kept
from dsv3_mini.hub.names import is_fp8_name
from dsv3_mini.hub.reader import read_tensors
from dsv3_mini.model.attention import MultiHeadLatentAttention
from dsv3_mini.model.block import Block
from dsv3_mini.model.rope import rotations
from dsv3_mini.train.checkpoint import checkpoints, load_checkpoint
from dsv3_mini.train.optimizer import MasterAdamW
from dsv3_mini.train.recipe import Recipe
from dsv3_mini.train.schedules import steps

# ---- what is kept for backward -----------------------------------------------------------------------------------------

BAR = 0.55
SHAPE = ModelConfig.preset(
    "671b", hidden_size=512, num_attention_heads=9, q_lora_rank=128, kv_lora_rank=64, moe_intermediate_size=128,
    n_routed_experts=16, rope_scaling=None, max_position_embeddings=4096,
)  # fmt: skip
"""A sparse layer of the released model at a fourteenth of its width. Heads are as they are (128 + 64 and 128 wide), and as many
as make them together as wide beside the model as 128 are at 671B; 8 of 16 experts are chosen, each a quarter as wide."""


def bytes_of(block: Block, tokens: int) -> dict[torch.dtype, int]:
    """What one block keeps of two sequences that have `tokens` tokens together."""
    x = torch.randn(2, tokens // 2, SHAPE.hidden_size).bfloat16().requires_grad_()
    turn = rotations(SHAPE, torch.arange(tokens // 2))
    owned = [*block.parameters(), *block.buffers(), turn]
    return bytes_kept(lambda: block(x, turn)[0], owned)


def plain_and_twin() -> tuple[Block, Block]:
    block = Block(SHAPE, layer=3)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    twin = to_fp8(copy.deepcopy(block))
    return block.to(torch.bfloat16), twin.to(torch.bfloat16)


def on_a_gpu(kept: dict[torch.dtype, int], cores: int, tokens: int) -> int:
    """The same count where attention's core works in BF16 and not, as on a CPU, in FP32: queries, keys, values and output,
    the last two filled up to the width of the first; the log of the softmax's sum, a number a head, stays FP32."""
    heads, width = SHAPE.num_attention_heads, SHAPE.qk_head_dim
    return sum(kept.values()) - cores * tokens * heads * 4 * width * (4 - 2)


def test_an_fp8_block_keeps_at_most_055_of_what_a_bf16_block_keeps() -> None:
    block, twin = plain_and_twin()
    tokens = 256
    plain, small = bytes_of(block, tokens), bytes_of(twin, tokens)
    ratio = sum(small.values()) / sum(plain.values())
    fair = on_a_gpu(small, 0, tokens) / on_a_gpu(plain, 1, tokens)
    assert ratio <= BAR and fair <= BAR
    # It is linear in the tokens: nothing of it is weights in disguise.
    twice = bytes_of(twin, 2 * tokens)
    assert sum(twice.values()) == pytest.approx(2 * sum(small.values()), rel=0.01)


def test_fp8_alone_is_not_enough_and_recomputation_alone_is_not_either() -> None:
    """The bar needs both: operands in FP8, and queries, keys and values built again."""
    block, twin = plain_and_twin()
    tokens = 256
    plain, whole = bytes_of(block, tokens), bytes_of(twin, tokens)
    for module in twin.modules():
        if isinstance(module, MultiHeadLatentAttention):
            module.__class__ = MultiHeadLatentAttention
    operands_only = bytes_of(twin, tokens)
    core = tokens * SHAPE.num_attention_heads * 4 * (4 * SHAPE.qk_head_dim + 1)
    assert sum(operands_only.values()) - sum(whole.values()) > core
    assert sum(operands_only.values()) > BAR * sum(plain.values())
    in_bf16 = on_a_gpu(plain, 1, tokens)
    recomputation_only = in_bf16 - tokens * SHAPE.num_attention_heads * 4 * 2 * SHAPE.qk_head_dim
    assert recomputation_only > BAR * in_bf16


def test_an_fp8_block_keeps_in_high_precision_what_norms_and_router_need_and_nothing_else() -> None:
    _, twin = plain_and_twin()
    tokens = 256
    kept = bytes_of(twin, tokens)
    d, e, k = SHAPE.hidden_size, SHAPE.n_routed_experts, SHAPE.num_experts_per_tok
    residual = 2 * d  # the inputs of both norms
    latents = SHAPE.q_lora_rank + SHAPE.kv_lora_rank + SHAPE.qk_rope_head_dim
    assert kept[torch.bfloat16] == 2 * tokens * (residual + latents)
    heads = SHAPE.num_attention_heads * SHAPE.v_head_dim
    assert kept[torch.uint8] == tokens * heads * 3 // 2
    f = SHAPE.moe_intermediate_size
    rows = 2 * d + (d + 2 * f) + k * (d + 2 * f)  # q_a and kv_a; the shared expert; the routed ones
    assert kept[torch.float8_e4m3fn] == tokens * rows
    # The router's input in FP32 (the largest part), its scores and gates, a number a token of each norm, and scales.
    most = tokens * (d + 4 * e + 8 * k + 2 + rows / 128 + heads / 128) + e * d  # the router's weights in FP32
    assert 4 * tokens * d < kept[torch.float32] < 4 * most


# ---- masters, gradients, moments ---------------------------------------------------------------------------------------


def test_bf16_moments_are_adamws_rounded_after_every_step() -> None:
    """AdamW by its definition (decoupled weight decay), in FP64, with moments that pass through BF16 between steps."""
    weight, beta1, beta2, decay, rate = torch.nn.Parameter(torch.randn(40, 3)), 0.9, 0.95, 0.1, 1e-2
    holder = torch.nn.Module()
    holder.weight = weight
    optimizer = MasterAdamW(holder, (beta1, beta2), decay, 0.0, moments=torch.bfloat16)
    w, m, v = weight.detach().double(), torch.zeros(40, 3).double(), torch.zeros(40, 3).double()
    for step in range(1, 8):
        weight.grad = torch.randn(40, 3)
        g = weight.grad.double()
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
        w = w * (1 - rate * decay) - rate * (m / (1 - beta1**step)) / ((v / (1 - beta2**step)).sqrt() + 1e-8)
        m, v = m.float().bfloat16().double(), v.float().bfloat16().double()
        optimizer.step(rate)
        kept = optimizer.tensors()
        assert kept["exp_avg.weight"].dtype == kept["exp_avg_sq.weight"].dtype == torch.bfloat16
        # FP32 may land on the other side of a BF16 rounding now and then: one step of 2^-8 in a few numbers.
        torch.testing.assert_close(kept["exp_avg.weight"].double(), m, rtol=2**-7, atol=1e-6)
        m, v = kept["exp_avg.weight"].double(), kept["exp_avg_sq.weight"].double()
        torch.testing.assert_close(weight.detach().double(), w, rtol=1e-5, atol=1e-6)
        w = weight.detach().double()


def test_a_run_in_fp8_has_fp32_masters_and_gradients_and_bf16_moments(tmp_path: Path) -> None:
    trainer = nano_trainer(tmp_path / "fp8", nano_recipe(precision="fp8", batch=4, micro_batch=2))
    plain = nano_trainer(tmp_path / "fp32", nano_recipe())
    for name, master in trainer.optimizer.masters.items():
        assert master.dtype == torch.float32 and torch.equal(master, plain.optimizer.masters[name]), name
    seen: dict[str, torch.dtype] = {}
    clip = trainer.optimizer.clip_gradients

    def watched(clip_norm: float) -> Tensor:
        norm = clip(clip_norm)
        seen.update({name: master.grad.dtype for name, master in trainer.optimizer.masters.items()})
        return norm

    trainer.optimizer.clip_gradients = watched
    trainer.train_step()
    assert len(seen) == len(trainer.optimizer.masters) and set(seen.values()) == {torch.float32}
    for name, parameter in trainer.model.named_parameters():
        in_fp8 = is_fp8_name(name if name.endswith("weight") else name + ".weight")
        assert parameter.dtype == (torch.float32 if in_fp8 else torch.bfloat16), name
        assert (trainer.optimizer.masters[name] is parameter) == in_fp8, name
    for name, tensor in trainer.optimizer.tensors().items():
        assert tensor.dtype == (torch.bfloat16 if name.startswith("exp_avg") else torch.float32), name


def test_fp8_starts_where_bf16_starts_and_learns_as_well(tmp_path: Path) -> None:
    losses = {}
    for precision in ("bf16", "fp8"):
        trainer = nano_trainer(tmp_path / precision, nano_recipe(steps=15, precision=precision))
        losses[precision] = [trainer.train_step().loss for _ in range(15)]
    assert losses["fp8"][0] == pytest.approx(losses["bf16"][0], rel=2e-3)
    assert losses["fp8"] != losses["bf16"]
    assert sum(losses["fp8"][-5:]) == pytest.approx(sum(losses["bf16"][-5:]), rel=0.02)
    assert losses["fp8"][-1] < losses["fp8"][0] - 1


def test_a_resumed_fp8_run_ends_bit_equal(tmp_path: Path) -> None:
    context = steps("context", 16, (2 * 4 * 16, 32))
    recipe = nano_recipe(total_tokens=4 * (2 * 16 + 3 * 32), context=context, precision="fp8")
    unbroken = nano_trainer(tmp_path / "unbroken", recipe)
    unbroken.run()
    for stop_at in (1, 3):
        trainer = nano_trainer(tmp_path / "broken", recipe)
        while trainer.step < stop_at:
            trainer.train_step()
        trainer.save()
    stored = load_checkpoint(checkpoints(tmp_path / "broken")[-1]).tensors
    assert stored["exp_avg.lm_head.weight"].dtype == torch.bfloat16
    last = nano_trainer(tmp_path / "broken", recipe)
    assert last.run() and last.step == unbroken.step == 5
    assert_bit_equal(all_state(last), all_state(unbroken))


def test_a_twin_that_is_turned_back_goes_on_in_high_precision(tmp_path: Path) -> None:
    """One switch in the middle of a run: parameters are the same objects, so the optimizer goes on."""
    trainer = nano_trainer(tmp_path / "run", nano_recipe(precision="fp8"))
    before = trainer.train_step().loss
    from_fp8(trainer.model).float()
    for name, parameter in trainer.model.named_parameters():
        if trainer.optimizer.masters[name] is parameter:
            assert parameter.dtype == torch.float32
    assert trainer.train_step().loss < before + 0.1


def test_an_fp8_run_ends_in_the_released_layout(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    command = ["train", "--preset", "nano", "--precision", "fp8", "--tokens", "512", "--judge", "0"]
    assert main([*command, "--mixture", "sums", "--out", str(run)]) == 0
    assert "trained" in capsys.readouterr().out
    tensors = read_tensors(run / "model")
    assert {name for name in tensors if tensors.stored_dtype(name) == "F8_E4M3"} == set(filter(is_fp8_name, tensors))
    tokens = torch.randint(0, 4096, (1, 12))
    with torch.no_grad():
        stored, dequantized = load_fp8(run / "model")(tokens).logits, from_pretrained(run / "model")(tokens).logits
    assert (stored.float() - dequantized).norm() < 0.2 * dequantized.norm()


@pytest.mark.parametrize("precision", ["fp16", "FP8", None])
def test_another_precision_is_refused(precision: object) -> None:
    with pytest.raises(ConfigError, match="must be 'fp32', 'bf16' or 'fp8'"):
        Recipe.preset("nano", precision=precision)
