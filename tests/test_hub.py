"""Checkpoint folders: what is written, what is read back, and what is refused in one line that names the thing."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_models import YARN, nano, random_model, random_tokens
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.checkpoint.quantized_hf_storage import QuantizedHuggingFaceStorageReader
from torch.distributed.checkpoint.state_dict_loader import load
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

import dsv3_mini.hub.save as save_module
from dsv3_mini import DeepSeekV3, ModelConfig, from_pretrained, save_pretrained
from dsv3_mini.errors import CheckpointError, ConfigError, UserError
from dsv3_mini.hub import Fp8Weight, quantise_blocks, read_tensors
from dsv3_mini.hub.names import released_tensors, shared_names
from dsv3_mini.hub.save import stored_layout
from dsv3_mini.model.experts import LoopExperts

FP8 = torch.float8_e4m3fn
INDEX = "model.safetensors.index.json"


def wide() -> ModelConfig:
    """Sides above 128, and no multiples of it: several blocks, ragged at both edges."""
    return nano(hidden_size=136, kv_lora_rank=130, intermediate_size=264, vocab_size=300, num_nextn_predict_layers=2)


def stored(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder's files, without the code under test."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def assert_equal_models(one: DeepSeekV3, other: DeepSeekV3) -> None:
    a, b = one.state_dict(), other.state_dict()
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]), name


# ---- names and layout ------------------------------------------------------------------------------------------------


def test_the_fp8_layout_at_671b_counts_as_the_hub_counts_the_released_files() -> None:
    """The hub's metadata of the released checkpoint: numbers by type, embedding and head of the MTP layer included.

    One of the 58 equal sparse layers is built and counted 58 times.
    """
    cfg = ModelConfig.preset("671b", num_hidden_layers=4)
    with torch.device("meta"):
        tensors = released_tensors(DeepSeekV3(cfg))
    tensors.update({copy: tensors[main] for copy, main in shared_names(cfg).items()})
    count: Counter[torch.dtype] = Counter()
    for name, tensor in tensors.items():
        times = 58 if name.startswith("model.layers.3.") else 1
        for shape, dtype in stored_layout(name, tensor.shape, FP8).values():
            count[dtype] += times * shape.numel()
    assert count == {FP8: 680_571_043_840, torch.bfloat16: 3_918_786_560, torch.float32: 41_555_600}


def test_names_are_the_released_ones(tmp_path: Path) -> None:
    cfg = nano(num_hidden_layers=2, n_routed_experts=4, n_group=2, topk_group=1)
    save_pretrained(random_model(cfg), tmp_path / "saved")
    attention = {
        "self_attn.q_a_proj", "self_attn.q_a_layernorm", "self_attn.q_b_proj", "self_attn.kv_a_proj_with_mqa",
        "self_attn.kv_a_layernorm", "self_attn.kv_b_proj", "self_attn.o_proj", "input_layernorm", "post_attention_layernorm",
    }  # fmt: skip
    three = {"gate_proj", "up_proj", "down_proj"}
    dense = attention | {f"mlp.{name}" for name in three}
    sparse = attention | {"mlp.gate"} | {f"mlp.shared_experts.{name}" for name in three}
    sparse |= {f"mlp.experts.{e}.{name}" for e in range(4) for name in three}
    mtp = sparse | {"enorm", "hnorm", "eh_proj", "shared_head.norm", "shared_head.head", "embed_tokens"}
    names = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    for layer, parts in enumerate((dense, sparse, mtp)):
        names |= {f"model.layers.{layer}.{part}.weight" for part in parts}
    names |= {f"model.layers.{layer}.mlp.gate.e_score_correction_bias" for layer in (1, 2)}
    assert stored(tmp_path / "saved").keys() == names


def test_fused_parameters_are_cut_at_the_right_places(tmp_path: Path) -> None:
    model = random_model(wide())
    save_pretrained(model, tmp_path / "saved", dtype=torch.float32)
    files = stored(tmp_path / "saved")
    experts = model.mtp[1].block.mlp.experts
    for e in range(8):
        stem = f"model.layers.4.mlp.experts.{e}."
        assert torch.equal(files[stem + "gate_proj.weight"], experts.gate_up_proj[e, :32])
        assert torch.equal(files[stem + "up_proj.weight"], experts.gate_up_proj[e, 32:])
        assert torch.equal(files[stem + "down_proj.weight"], experts.down_proj[e])
    assert torch.equal(files["model.layers.0.mlp.up_proj.weight"], model.layers[0].mlp.gate_up_proj.weight[264:])
    assert torch.equal(files["model.layers.4.shared_head.norm.weight"], model.mtp[1].norm.weight)
    assert torch.equal(files["model.layers.3.embed_tokens.weight"], model.embed_tokens.weight)
    assert torch.equal(files["model.layers.4.shared_head.head.weight"], model.lm_head.weight)


def test_views_share_the_models_memory() -> None:
    """Loading writes into them, so nothing may be a copy; together they are the model, each number once."""
    model = random_model(nano())
    views = released_tensors(model)
    assert sum(view.numel() for view in views.values()) == sum(t.numel() for t in model.state_dict().values())
    for number, view in enumerate(views.values()):
        view.fill_(number)
    seen = torch.cat([tensor.unique() for tensor in model.state_dict().values()])
    assert sorted(seen.tolist()) == list(range(len(views)))


@pytest.mark.parametrize("limit", [1, 40_000, 300_000, 5e9])
def test_shards_respect_their_size_and_the_index_says_where_all_is(limit: float, tmp_path: Path) -> None:
    model = random_model(nano())
    save_pretrained(model, tmp_path / "saved", max_shard_bytes=limit)
    files = sorted(path.name for path in (tmp_path / "saved").glob("*.safetensors"))
    assert files == [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
    index = json.loads((tmp_path / "saved" / INDEX).read_text())
    total = 0
    for file in files:
        tensors = load_file(tmp_path / "saved" / file)
        size = sum(tensor.nbytes for tensor in tensors.values())
        assert size <= limit or len(tensors) == 1
        assert {name for name, where in index["weight_map"].items() if where == file} == tensors.keys()
        total += size
    assert index["metadata"]["total_size"] == total
    assert len(files) == {1: len(index["weight_map"]), 5e9: 1}.get(limit, len(files)) and (
        limit > 1e6 or len(files) > 1
    )
    assert sorted(path.name for path in (tmp_path / "saved").iterdir()) == ["config.json", *files, INDEX]


# ---- round trips -----------------------------------------------------------------------------------------------------

CONFIGS = {
    "released shape": nano(),
    "two depths": nano(num_nextn_predict_layers=2),
    "no MTP": nano(num_nextn_predict_layers=0),
    "YaRN": nano(**YARN),
    "direct queries": nano(q_lora_rank=None),
    "no shared expert": nano(n_shared_experts=0),
    "auxiliary loss": nano(topk_method="aux_loss", scoring_func="softmax"),
    "dense only": nano(first_k_dense_replace=3, num_nextn_predict_layers=0),
    "ragged": wide(),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_fp32_round_trip_is_exact(name: str, tmp_path: Path) -> None:
    model = random_model(CONFIGS[name])
    save_pretrained(model, tmp_path / "saved", dtype=torch.float32, max_shard_bytes=100_000)
    loaded = from_pretrained(tmp_path / "saved")
    assert loaded.cfg == model.cfg
    assert_equal_models(model, loaded)
    assert all(parameter.requires_grad for parameter in loaded.parameters())


def test_bf16_is_rounded_once_and_biases_never(tmp_path: Path) -> None:
    model = random_model(nano())
    save_pretrained(model, tmp_path / "saved")
    kinds = {name: tensor.dtype for name, tensor in stored(tmp_path / "saved").items()}
    assert all((kind == torch.float32) == name.endswith("bias") for name, kind in kinds.items())
    assert set(kinds.values()) == {torch.float32, torch.bfloat16}
    loaded = from_pretrained(tmp_path / "saved", dtype=torch.bfloat16, experts=LoopExperts)
    assert isinstance(loaded.layers[1].mlp.experts, LoopExperts)
    assert_equal_models(model.to(torch.bfloat16), loaded)
    assert_equal_models(model.float(), from_pretrained(tmp_path / "saved"))


def test_saving_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    model = random_model(nano())
    for name in ("one", "two"):
        save_pretrained(model, tmp_path / name, max_shard_bytes=100_000)
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


@torch.no_grad()
def test_bf16_opens_in_transformers_in_bf16(tmp_path: Path) -> None:
    model, tokens = random_model(nano()), random_tokens(nano())
    save_pretrained(model, tmp_path / "saved")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert theirs.dtype == torch.bfloat16
    assert theirs.model.layers[1].mlp.gate.e_score_correction_bias.dtype == torch.float32
    expected = theirs.float()(tokens).logits
    ours = from_pretrained(tmp_path / "saved")(tokens).logits
    assert (ours - expected).abs().max() / expected.abs().max() <= 1e-5


def test_mtp_may_come_without_its_copies(tmp_path: Path) -> None:
    model = random_model(wide())
    save_pretrained(model, tmp_path / "saved", dtype=torch.float32)
    rewrite(tmp_path / "saved", lambda tensors: [tensors.pop(copy) for copy in shared_names(model.cfg)])
    assert_equal_models(model, from_pretrained(tmp_path / "saved"))


def test_a_folder_can_be_read_without_its_mtp(tmp_path: Path) -> None:
    model = random_model(nano())
    save_pretrained(model, tmp_path / "saved", dtype=torch.float32)
    loaded = from_pretrained(tmp_path / "saved", mtp=False)
    assert loaded.cfg == model.cfg.replace(num_nextn_predict_layers=0) and len(loaded.mtp) == 0
    tokens = random_tokens(model.cfg)
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)


def test_loading_never_holds_a_second_model(tmp_path: Path) -> None:
    """Beside the model's own memory nothing is made that is larger than one stored tensor, filled up to whole blocks."""
    cfg = wide().replace(n_routed_experts=32, num_hidden_layers=2, num_nextn_predict_layers=0)
    save_pretrained(DeepSeekV3(cfg), tmp_path / "saved", dtype=FP8)
    stacked = 32 * 64 * 136  # one layer's gate_up_proj
    made: list[int] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = function(*args, **(kwargs or {}))
            given = [a for a in args if isinstance(a, Tensor)]
            # The one exception: `to_empty` makes the model itself from meta tensors.
            made_here = isinstance(out, Tensor) and not out.is_meta and not any(a.is_meta for a in given)
            if made_here and all(a.untyped_storage().data_ptr() != out.untyped_storage().data_ptr() for a in given):
                made.append(out.numel())
            return out

    with Watch():
        from_pretrained(tmp_path / "saved", dtype=torch.bfloat16)
    assert 300 * 136 <= max(made) <= 384 * 256 < stacked / 2


# ---- FP8 -------------------------------------------------------------------------------------------------------------


@settings(max_examples=25)
@given(rows=st.integers(1, 300), columns=st.integers(1, 300), power=st.integers(-30, 30), seed=st.integers(0, 10**6))
def test_quantisation_is_nearest_under_the_largest_of_each_block(
    rows: int, columns: int, power: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) * 2.0**power
    weight[:: max(rows // 5, 1), :] *= 1000
    fp8 = quantise_blocks(weight)
    assert fp8.q.dtype == FP8 and fp8.q.shape == weight.shape
    assert fp8.scale.dtype == torch.float32 and fp8.scale.shape == (math.ceil(rows / 128), math.ceil(columns / 128))
    back = fp8.dequantise()
    for i in range(fp8.scale.shape[0]):
        for j in range(fp8.scale.shape[1]):
            place = slice(i * 128, (i + 1) * 128), slice(j * 128, (j + 1) * 128)
            block, scale = weight[place], fp8.scale[i, j]
            assert scale.item() == pytest.approx(block.abs().max().item() / 448, rel=1e-6)
            assert torch.equal(back[place], fp8.q[place].float() * scale)
            assert fp8.q[place].float().abs().max() == 448
            # Three bits of mantissa: half a step is 2^-4 of a normal number, 2^-10 of a subnormal one.
            bound = torch.maximum(block.abs() * 2.0**-4, scale * 2.0**-10)
            assert ((back[place] - block).abs() <= bound * (1 + 1e-5)).all()


def test_blocks_of_zeros_stay_zero() -> None:
    weight = torch.zeros(130, 260)
    weight[0, 200] = 3.0
    fp8 = quantise_blocks(weight)
    assert torch.equal(fp8.dequantise(), weight) and fp8.scale.isfinite().all() and (fp8.scale > 0).all()


def test_the_fp8_layout_is_the_released_one(tmp_path: Path) -> None:
    model = random_model(wide())
    save_pretrained(model, tmp_path / "saved", dtype=FP8, max_shard_bytes=100_000)
    files = stored(tmp_path / "saved")
    for name, tensor in files.items():
        linear = any(part in name for part in ("self_attn", "mlp")) and "norm" not in name and ".gate." not in name
        if name.endswith("_scale_inv"):
            rows, columns = files[name.removesuffix("_scale_inv")].shape
            assert tensor.dtype == torch.float32 and tensor.shape == (-(-rows // 128), -(-columns // 128))
        elif linear:
            assert tensor.dtype == FP8 and name + "_scale_inv" in files, name
        else:
            assert tensor.dtype == (torch.float32 if name.endswith("bias") else torch.bfloat16), name
    assert files["model.layers.3.eh_proj.weight"].dtype == torch.bfloat16
    assert files["model.layers.0.self_attn.kv_a_proj_with_mqa.weight_scale_inv"].shape == (2, 2)
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config["quantization_config"] == {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    }
    assert config["torch_dtype"] == "bfloat16"
    where = json.loads((tmp_path / "saved" / INDEX).read_text())["weight_map"]
    assert all(where[name] == where[name.removesuffix("_scale_inv")] for name in where)


def test_torchs_own_reader_of_quantised_folders_reads_the_same_numbers(tmp_path: Path) -> None:
    model = random_model(wide())
    save_pretrained(model, tmp_path / "saved", dtype=FP8, max_shard_bytes=100_000)
    ours = released_tensors(from_pretrained(tmp_path / "saved"))
    theirs = {name: torch.zeros_like(tensor) for name, tensor in ours.items()}
    reader = QuantizedHuggingFaceStorageReader(str(tmp_path / "saved"), target_dtype=torch.float32, block_size=128)
    load(theirs, storage_reader=reader, no_dist=True)
    for name, tensor in ours.items():
        assert torch.equal(theirs[name], tensor), name


def test_fp8_can_be_kept(tmp_path: Path) -> None:
    model = random_model(wide())
    save_pretrained(model, tmp_path / "saved", dtype=FP8)
    tensors = read_tensors(tmp_path / "saved")
    files = stored(tmp_path / "saved")
    assert set(tensors) == {name for name in files if not name.endswith("_scale_inv")} and len(tensors) < len(files)
    loaded = released_tensors(from_pretrained(tmp_path / "saved", dtype=torch.bfloat16))
    kept = 0
    for name, tensor in tensors.items():
        if isinstance(tensor, Fp8Weight):
            kept += 1
            assert torch.equal(tensor.q.view(torch.uint8), files[name].view(torch.uint8))
            assert torch.equal(tensor.scale, files[name + "_scale_inv"])
            assert torch.equal(tensor.dequantise(torch.bfloat16), loaded[name])
            assert tensors.stored_dtype(name) == "F8_E4M3" and tensors.shape(name) == tuple(tensor.q.shape)
        else:
            assert torch.equal(tensor, files[name])
    assert kept == sum(name.endswith("_scale_inv") for name in files) > 100
    assert "model.norm.weight" in tensors and "model.nothing" not in tensors


def test_fp8_weights_written_by_the_definition_are_read_by_it(tmp_path: Path) -> None:
    """Numbers and scales that this package did not make, in a shard apart from each other."""
    model = random_model(wide())
    save_pretrained(model, tmp_path / "saved", dtype=torch.float32)
    name = "model.layers.0.mlp.gate_proj.weight"  # 264 x 136: 3 x 2 blocks
    q = (torch.randn(264, 136) * 100).to(FP8)
    scale = torch.rand(3, 2) + 0.5
    numbers, scales = q.float().tolist(), scale.tolist()
    expected = torch.tensor(
        [[numbers[row][col] * scales[row // 128][col // 128] for col in range(136)] for row in range(264)]
    )

    rewrite(tmp_path / "saved", lambda tensors: tensors.update({name: q, name + "_scale_inv": scale}))
    single = tmp_path / "saved" / "model.safetensors"
    tensors = load_file(single)
    save_file({name + "_scale_inv": tensors.pop(name + "_scale_inv")}, tmp_path / "saved" / "b.safetensors")
    save_file(tensors, tmp_path / "saved" / "a.safetensors")
    single.unlink()
    where = {**dict.fromkeys(tensors, "a.safetensors"), name + "_scale_inv": "b.safetensors"}
    (tmp_path / "saved" / INDEX).write_text(json.dumps({"weight_map": where}))
    loaded = from_pretrained(tmp_path / "saved")
    assert torch.equal(loaded.layers[0].mlp.gate_up_proj.weight[:264], expected)


# ---- nothing half-written --------------------------------------------------------------------------------------------


def test_a_folder_that_is_not_empty_is_refused_and_left_alone(tmp_path: Path) -> None:
    save_pretrained(random_model(nano()), tmp_path / "saved")
    before = {path.name: path.read_bytes() for path in (tmp_path / "saved").iterdir()}
    with pytest.raises(CheckpointError, match="saved is not empty: choose another folder, or overwrite=True"):
        save_pretrained(random_model(nano(), seed=5), tmp_path / "saved")
    assert {path.name: path.read_bytes() for path in (tmp_path / "saved").iterdir()} == before
    replaced = random_model(nano(), seed=5)
    save_pretrained(replaced, tmp_path / "saved", dtype=torch.float32, overwrite=True)
    assert_equal_models(replaced, from_pretrained(tmp_path / "saved"))
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


def test_overwrite_replaces_checkpoints_only(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letters.txt").write_text("dear")
    with pytest.raises(CheckpointError, match="holds other things than a checkpoint"):
        save_pretrained(random_model(nano()), tmp_path / "home", overwrite=True)
    assert (tmp_path / "home" / "letters.txt").read_text() == "dear"


def test_empty_folders_and_new_parents_are_fine(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "empty", tmp_path / "a" / "b"):
        save_pretrained(random_model(nano()), folder)
        from_pretrained(folder)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("existing", [False, True])
def test_a_run_that_dies_while_writing_leaves_what_was_there(
    error: BaseException, existing: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = random_model(nano())
    if existing:
        save_pretrained(first, tmp_path / "saved", dtype=torch.float32)
    written = []

    def dies(*args: object, **kwargs: object) -> None:
        if len(written) == 2:
            raise error
        written.append(save_file(*args, **kwargs))

    monkeypatch.setattr(save_module, "save_file", dies)
    expected = CheckpointError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected) as caught:
        save_pretrained(random_model(nano(), seed=9), tmp_path / "saved", max_shard_bytes=50_000, overwrite=True)
    if isinstance(error, OSError):
        assert str(caught.value).endswith("saved cannot be written: [Errno 28] No space left on device")
    assert len(written) == 2
    assert [path.name for path in tmp_path.iterdir()] == (["saved"] if existing else [])
    if existing:
        assert_equal_models(first, from_pretrained(tmp_path / "saved"))


def test_a_rename_that_fails_puts_the_old_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = random_model(nano())
    save_pretrained(first, tmp_path / "saved", dtype=torch.float32)
    rename = Path.rename

    def refuses(self: Path, target: Path) -> Path:
        if ".writing-" in self.name:
            raise OSError(13, "Permission denied")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuses)
    with pytest.raises(CheckpointError, match="Permission denied"):
        save_pretrained(random_model(nano(), seed=9), tmp_path / "saved", overwrite=True)
    assert_equal_models(first, from_pretrained(tmp_path / "saved"))
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


BAD_SAVES = {
    "an integer type": (dict(dtype=torch.int8), "dtype = torch.int8 cannot be stored"),
    "the other FP8": (dict(dtype=torch.float8_e5m2), "dtype = torch.float8_e5m2 cannot be stored"),
    "a name for a type": (dict(dtype="bf16"), "dtype = bf16 cannot be stored"),
    "shards of nothing": (dict(max_shard_bytes=0), "max_shard_bytes = 0 must be"),
    "shards of text": (dict(max_shard_bytes="5GB"), "max_shard_bytes = '5GB' must be"),
    "shards of NaN": (dict(max_shard_bytes=math.nan), "max_shard_bytes = nan must be"),
}


@pytest.mark.parametrize("name", BAD_SAVES)
def test_what_cannot_be_saved_is_refused(name: str, tmp_path: Path) -> None:
    arguments, says = BAD_SAVES[name]
    with pytest.raises(CheckpointError) as error:
        save_pretrained(random_model(nano()), tmp_path / "saved", **arguments)
    assert says in str(error.value) and "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_places_and_models_that_cannot_be_saved_are_refused(tmp_path: Path) -> None:
    with torch.device("meta"):
        model = DeepSeekV3(nano())
    with pytest.raises(CheckpointError, match="meta device"):
        save_pretrained(model, tmp_path / "saved")
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="file is not a folder"):
        save_pretrained(random_model(nano()), tmp_path / "file")
    with pytest.raises(CheckpointError, match="cannot be written"):
        save_pretrained(random_model(nano()), tmp_path / "file" / "below")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


# ---- folders that cannot be used -------------------------------------------------------------------------------------


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """All tensors, changed, as one model.safetensors."""
    tensors = stored(folder)
    change(tensors)
    for path in [*folder.glob("*.safetensors"), *folder.glob(INDEX)]:
        path.unlink()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")


def reindex(folder: Path, change: Callable[[dict], object]) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index)
    (folder / INDEX).write_text(json.dumps(index))


def reconfigure(**changes: object) -> Callable[[Path], None]:
    def act(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **changes}))

    return act


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def flip_header(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[20] ^= 0xFF
    path.write_bytes(bytes(data))


def long_header(path: Path) -> None:
    path.write_bytes((2**40).to_bytes(8, "little") + path.read_bytes()[8:])


def lying_header(path: Path) -> None:
    """A shape that its bytes cannot fill."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    first = next(name for name in header if name != "__metadata__")
    header[first]["shape"] = [2**30, 2**30]
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])


def drop(*names: str) -> Callable[[Path], None]:
    return lambda folder: rewrite(folder, lambda tensors: [tensors.pop(name) for name in names])


def put(name: str, tensor: Tensor) -> Callable[[Path], None]:
    return lambda folder: rewrite(folder, lambda tensors: tensors.update({name: tensor}))


def no_mtp(folder: Path) -> None:
    rewrite(folder, lambda tensors: [tensors.pop(name) for name in list(tensors) if ".layers.3." in name])


def pickles_only(folder: Path) -> None:
    for path in [*shards(folder), folder / INDEX]:
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04cos\nsystem\n")


def twin(folder: Path) -> None:
    save_file(load_file(shards(folder)[0]), folder / "model.safetensors")


def swap(folder: Path) -> None:
    """The index sends every tensor to the first file."""
    first = shards(folder)[0].name
    reindex(folder, lambda index: index.update(weight_map=dict.fromkeys(index["weight_map"], first)))


def wander(folder: Path) -> None:
    shutil.copy(shards(folder)[0], folder.parent / "outside.safetensors")
    first = shards(folder)[0].name
    reindex(
        folder,
        lambda index: index.update(
            weight_map={n: "../outside.safetensors" if f == first else f for n, f in index["weight_map"].items()}
        ),
    )


Q = "model.layers.0.self_attn.o_proj.weight"
BAD_FOLDERS: dict[str, tuple[Callable[[Path], object], type[UserError], list[str]]] = {
    # folders
    "no such folder": (shutil.rmtree, CheckpointError, ["saved is not a folder", "nothing is downloaded"]),
    "a file": (lambda f: (shutil.rmtree(f), f.write_text("x")), CheckpointError, ["saved is not a folder"]),
    "an empty folder": (
        lambda f: (shutil.rmtree(f), f.mkdir()), CheckpointError, ["holds neither model.safetensors nor"],
    ),
    "no config": (lambda f: (f / "config.json").unlink(), CheckpointError, ["has no config.json"]),
    "pickles only": (pickles_only, CheckpointError, ["pytorch_model.bin but no safetensors", "never opened"]),
    "both layouts": (twin, CheckpointError, ["both model.safetensors and model.safetensors.index.json"]),
    # config.json
    "config cut off": (lambda f: cut(f / "config.json", 40), ConfigError, ["config.json cannot be read as JSON"]),
    "config is a list": (lambda f: (f / "config.json").write_text("[1]"), ConfigError, ["must hold a JSON object"]),
    "another model": (reconfigure(model_type="llama"), ConfigError, ["model_type = 'llama'"]),
    "a config that breaks a rule": (reconfigure(n_group=3), ConfigError, ["n_group = 3 must divide n_routed_experts (8)"]),
    "another RoPE": (reconfigure(rope_interleave=False), ConfigError, ["rope_interleave = False must be true"]),
    "another quantisation": (
        reconfigure(quantization_config={"quant_method": "awq"}), CheckpointError, ["quant_method 'awq'", "only 'fp8'"],
    ),
    "other blocks": (
        reconfigure(quantization_config={"quant_method": "fp8", "weight_block_size": [64, 64]}),
        CheckpointError, ["weight_block_size [64, 64]"],
    ),
    # files
    "a shard is missing": (lambda f: shards(f)[1].unlink(), CheckpointError, ["model-00002-of-", "is missing"]),
    "a shard is cut off": (lambda f: cut(shards(f)[1], 3000), CheckpointError, ["model-00002-of-", "cut off or damaged"]),
    "a shard lacks its last byte": (
        lambda f: cut(shards(f)[0], shards(f)[0].stat().st_size - 1), CheckpointError, ["cut off or damaged"],
    ),
    "a shard is empty": (lambda f: cut(shards(f)[0], 0), CheckpointError, ["cut off or damaged"]),
    "a shard has four bytes": (lambda f: cut(shards(f)[0], 4), CheckpointError, ["cut off or damaged"]),
    "bytes after the end": (
        lambda f: shards(f)[0].write_bytes(shards(f)[0].read_bytes() + b"more"), CheckpointError, ["cut off or damaged"],
    ),
    "a header is damaged": (lambda f: flip_header(shards(f)[0]), CheckpointError, ["cut off or damaged"]),
    "a header of a terabyte": (lambda f: long_header(shards(f)[0]), CheckpointError, ["cut off or damaged"]),
    "a header that lies": (lambda f: lying_header(shards(f)[0]), CheckpointError, ["cut off or damaged"]),
    "a text named safetensors": (lambda f: shards(f)[0].write_text("hello " * 99), CheckpointError, ["cut off or damaged"]),
    # the index
    "index cut off": (lambda f: cut(f / INDEX, 100), CheckpointError, ["index.json cannot be read as JSON"]),
    "index is no text": (lambda f: (f / INDEX).write_bytes(b"\xff\xfe\x00"), CheckpointError, ["cannot be read as JSON"]),
    "index without a map": (
        lambda f: reindex(f, lambda i: i.pop("weight_map")), CheckpointError, ["has no weight_map"],
    ),
    "index with an empty map": (
        lambda f: reindex(f, lambda i: i.update(weight_map={})), CheckpointError, ["has no weight_map"],
    ),
    "index with numbers for files": (
        lambda f: reindex(f, lambda i: i["weight_map"].update({Q: 1})), CheckpointError, ["has no weight_map"],
    ),
    "index that leads out of the folder": (wander, CheckpointError, ["'../outside.safetensors'", "same folder"]),
    "index that names a pickle": (
        lambda f: reindex(f, lambda i: i["weight_map"].update({Q: "pytorch_model.bin"})), CheckpointError,
        ["'pytorch_model.bin'", ".safetensors"],
    ),
    "index that points at the wrong file": (swap, CheckpointError, ["index.json says that", "no file has it"]),
    "index that swaps two files": (
        lambda f: reindex(f, lambda i: i["weight_map"].update({Q: shards(f)[-1].name})), CheckpointError,
        [f"says that {Q} is in model-", "but it is in model-00001-of-"],
    ),
    "index that forgets a tensor": (
        lambda f: reindex(f, lambda i: i["weight_map"].pop(Q)), CheckpointError, [f"does not name {Q}"],
    ),
    # tensors
    "one is missing": (drop(Q), CheckpointError, [f"1 missing ({Q})"]),
    "many are missing": (
        lambda f: rewrite(f, lambda t: [t.pop(n) for n in list(t) if ".mlp.experts." in n]),
        CheckpointError, ["72 missing (model.layers.1.mlp.experts.0.gate_proj.weight, ", "and 68 more)"],
    ),
    "one is unknown": (put("model.layers.0.extra", torch.zeros(2)), CheckpointError, ["1 unknown (model.layers.0.extra)"]),
    "one layer too many": (reconfigure(num_hidden_layers=2), CheckpointError, ["unknown (model.layers.3."]),
    "a wrong shape": (put(Q, torch.zeros(64, 65)), CheckpointError, [f"1 of wrong shape ({Q} [64, 65] instead of [64, 64])"]),
    "a config of another width": (reconfigure(hidden_size=32), CheckpointError, ["of wrong shape", "instead of", "more)"]),
    "integers": (put(Q, torch.zeros(64, 64, dtype=torch.int64)), CheckpointError, [f"1 of wrong type ({Q} I64)"]),
    "all at once": (
        lambda f: (drop("lm_head.weight")(f), put("x", torch.zeros(1))(f), put(Q, torch.zeros(3))(f)),
        CheckpointError, ["1 missing (lm_head.weight)", "1 unknown (x)", f"1 of wrong shape ({Q} [3]"],
    ),
    "MTP is not there": (no_mtp, CheckpointError, ["42 missing (model.layers.3.", "mtp=False loads without"]),
    "MTP's embedding is another": (
        put("model.layers.3.embed_tokens.weight", torch.zeros(512, 64)), CheckpointError,
        ["model.layers.3.embed_tokens.weight differs from model.embed_tokens.weight"],
    ),
    "MTP's head is another": (
        put("model.layers.3.shared_head.head.weight", torch.zeros(512, 64)), CheckpointError,
        ["model.layers.3.shared_head.head.weight differs from lm_head.weight"],
    ),
    "MTP's head of another shape": (
        put("model.layers.3.shared_head.head.weight", torch.zeros(512, 65)), CheckpointError,
        ["model.layers.3.shared_head.head.weight [512, 65] instead of [512, 64]"],
    ),
    # FP8
    "FP8 without scales": (
        put(Q, torch.zeros(64, 64, dtype=FP8)), CheckpointError, [f"{Q} is stored as F8_E4M3 and has no {Q}_scale_inv"],
    ),
    "scales without FP8": (put(Q + "_scale_inv", torch.ones(1, 1)), CheckpointError, [f"{Q} is stored as F32 and has {Q}"]),
    "scales without a weight": (
        put("model.layers.9.x.weight_scale_inv", torch.ones(1, 1)), CheckpointError, ["1 unknown (model.layers.9.x.weight_scale"],
    ),
    "scales of wrong shape": (
        lambda f: (put(Q, torch.zeros(64, 64, dtype=FP8)), rewrite(
            f, lambda t: t.update({Q: torch.zeros(64, 64, dtype=FP8), Q + "_scale_inv": torch.ones(2, 1)})
        )), CheckpointError, [f"{Q}_scale_inv is F32 [2, 1] and must be F32 [1, 1]"],
    ),
    "scales of wrong type": (
        lambda f: rewrite(
            f, lambda t: t.update({Q: torch.zeros(64, 64, dtype=FP8), Q + "_scale_inv": torch.ones(1, 1).bfloat16()})
        ), CheckpointError, ["is BF16 [1, 1] and must be F32 [1, 1]"],
    ),
    "the other FP8": (
        put(Q, torch.zeros(64, 64, dtype=torch.float8_e5m2)), CheckpointError, [f"1 of wrong type ({Q} F8_E5M2)"],
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good") / "saved"
    save_pretrained(random_model(nano()), folder, dtype=torch.float32, max_shard_bytes=300_000)
    return folder


@pytest.mark.parametrize("name", BAD_FOLDERS)
def test_a_bad_folder_is_refused_in_one_line(name: str, good: Path, tmp_path: Path) -> None:
    spoil, kind, says = BAD_FOLDERS[name]
    shutil.copytree(good, tmp_path / "saved")
    from_pretrained(tmp_path / "saved")
    spoil(tmp_path / "saved")
    before = sorted((path, path.stat().st_size) for path in tmp_path.rglob("*"))
    with pytest.raises(UserError) as error:
        from_pretrained(tmp_path / "saved")
    assert type(error.value) is kind
    message = str(error.value)
    assert "\n" not in message and len(message) < 600
    for part in says:
        assert part in message
    assert sorted((path, path.stat().st_size) for path in tmp_path.rglob("*")) == before


def test_pickles_are_never_opened(good: Path, tmp_path: Path) -> None:
    """Beside safetensors they are passed over; alone they are refused. Opening this one would make a file."""
    folder = tmp_path / "saved"
    shutil.copytree(good, folder)
    trap = tmp_path / "opened"
    command = f"cos\nsystem\n(S'touch {trap}'\ntR.".encode()
    (folder / "pytorch_model.bin").write_bytes(command)
    from_pretrained(folder)
    for path in [*shards(folder), folder / INDEX]:
        path.unlink()
    with pytest.raises(CheckpointError, match="never opened"):
        from_pretrained(folder)
    assert not trap.exists()
    import pickle

    pickle.loads(command)  # the trap does work
    assert trap.exists()


@pytest.mark.parametrize("dtype", [torch.int32, FP8, torch.complex64, "float32"])
def test_a_model_is_loaded_in_floating_point(dtype: object, good: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot hold a model: use float32 or bfloat16"):
        from_pretrained(good, dtype=dtype)


@pytest.mark.skipif(os.name != "posix", reason="permissions are POSIX's")
def test_the_saved_folder_has_the_permissions_of_any_new_folder(tmp_path: Path) -> None:
    save_pretrained(random_model(nano()), tmp_path / "saved")
    (tmp_path / "plain").mkdir()
    assert (tmp_path / "saved").stat().st_mode == (tmp_path / "plain").stat().st_mode
