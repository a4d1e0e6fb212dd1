"""Context extension: the same weights under another config, and the command that goes on training from there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dsv3_mini import ModelConfig, from_pretrained, save_pretrained
from dsv3_mini.cli import main
from dsv3_mini.config import RopeScaling
from dsv3_mini.data.shipped import shipped
from dsv3_mini.errors import ConfigError
from dsv3_mini.model import DeepSeekV3
from dsv3_mini.model.rope import frequencies, rotations, softmax_scale
from dsv3_mini.train.balance import routers
from dsv3_mini.train.extend import extended_config, with_config

NANO = ModelConfig.preset("nano", initializer_range=0.08)


@pytest.fixture(scope="module")
def nano() -> DeepSeekV3:
    torch.manual_seed(0)
    model = DeepSeekV3(NANO).eval()
    for router in routers(model):
        router.e_score_correction_bias.normal_(0, 0.1)
    return model


def test_only_what_positions_mean_changes(nano: DeepSeekV3) -> None:
    """The stretched model is the old one run by hand with other turns and another softmax scale."""
    cfg = extended_config(NANO, context=512, trained=64)
    assert cfg.rope_scaling == RopeScaling(factor=8.0, original_max_position_embeddings=64)
    stretched = with_config(nano, cfg)
    tokens = torch.randint(0, 4096, (2, 300), generator=torch.Generator().manual_seed(1))
    x, turn = nano.embed_tokens(tokens), rotations(cfg, torch.arange(300))
    scales = [block.self_attn.scale for block in nano.layers]
    try:
        for block in nano.layers:
            block.self_attn.scale = softmax_scale(cfg)
            x, _ = block(x, turn)
    finally:
        for block, scale in zip(nano.layers, scales, strict=True):
            block.self_attn.scale = scale
    with torch.no_grad():
        torch.testing.assert_close(stretched.main_states(tokens)[0], nano.norm(x), rtol=0, atol=1e-5)
    assert frequencies(cfg) != frequencies(NANO)


def test_weights_are_copies_and_mtp_is_left_out(nano: DeepSeekV3) -> None:
    stretched = with_config(nano, extended_config(NANO, 512, 64))
    assert len(stretched.mtp) == 0 and len(nano.mtp) == 1 and not stretched.training
    old, new = nano.state_dict(), stretched.state_dict()
    assert set(new) == {name for name in old if not name.startswith("mtp.")}
    assert all(torch.equal(new[name], old[name]) and new[name].data_ptr() != old[name].data_ptr() for name in new)
    assert any(name.endswith("e_score_correction_bias") and new[name].abs().sum() > 0 for name in new)


def test_a_second_phase_counts_from_the_first_length() -> None:
    first = extended_config(NANO, 256, 64)
    second = extended_config(first, 1024)
    assert second.rope_scaling.factor == 16.0 and second.rope_scaling.original_max_position_embeddings == 64


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda model: extended_config(NANO, 512), "the trained context is missing"),
        (lambda model: extended_config(NANO, 64, 64), "context = 64 must be more than the trained 64"),
        (
            lambda model: with_config(model, NANO.replace(rope_theta=100.0)),
            "rope_theta = 100.0 and the model has 10000.0",
        ),
        (lambda model: with_config(model, NANO.replace(num_nextn_predict_layers=2)), "num_nextn_predict_layers = 2"),
    ],
)
def test_what_is_no_extension_is_refused(nano: DeepSeekV3, change: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        change(nano)


# ---- the command -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(nano: DeepSeekV3, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("extend") / "nano"
    save_pretrained(nano, folder, torch.float32)
    return folder


def extend(folder: Path, out: Path, *more: str) -> list[str]:
    return [
        "train", "--extend", str(folder), "--recipe", "nano", "--tokens", "2048", "--context", "128",
        "--mixture", "stories=0.5,long_stories:150=0.5", "--judge", "0", "--threads", "1", "--out", str(out), *more,
    ]  # fmt: skip


def test_the_command_starts_from_the_model_and_ends_with_a_longer_one(
    folder: Path, nano: DeepSeekV3, tmp_path: Path
) -> None:
    assert main(extend(folder, tmp_path / "run", "--trained-context", "32")) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert lines[0]["tokens"] == 4 * 128, "rows are as long as --context says"
    model = from_pretrained(tmp_path / "run" / "model")
    assert model.cfg == extended_config(NANO, 128, 32) == ModelConfig.from_hf(tmp_path / "run")
    # Four steps at nano's rate: near to where it came from, and not there.
    theirs, ours = nano.state_dict(), model.state_dict()
    moved = [(ours[name] - theirs[name]).norm() / theirs[name].norm() for name in ours if "q_b_proj" in name]
    assert all(0 < move < 0.5 for move in moved)


def test_a_run_says_itself_how_long_its_rows_were(folder: Path, tmp_path: Path, capsys: Any) -> None:
    assert main(extend(folder, tmp_path / "run")) == 2
    assert "--trained-context is missing" in capsys.readouterr().err
    (tmp_path / "told").mkdir()
    for file in folder.iterdir():
        (tmp_path / "told" / file.name).write_bytes(file.read_bytes())
    (tmp_path / "told" / "recipe.json").write_text('{"context": [["end", 64, 64, "linear"]]}')
    assert main(extend(tmp_path / "told", tmp_path / "run", "--minutes", "0.01")) == 0
    scaling = ModelConfig.from_hf(tmp_path / "run").rope_scaling
    assert (scaling.factor, scaling.original_max_position_embeddings) == (2.0, 64)
    (tmp_path / "told" / "recipe.json").write_text("{}")
    capsys.readouterr()
    assert main(extend(tmp_path / "told", tmp_path / "other")) == 2
    assert "does not say how long the rows were" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--context", "64"], "--context 64 goes with --extend"),
        (["--trained-context", "64"], "--trained-context 64 goes with --extend"),
        (["--extend", str(shipped("tiny"))], "--out is missing"),
    ],
)
def test_flags_that_do_not_go_together(arguments: list[str], words: str, capsys: Any, tmp_path: Path) -> None:
    assert main(["train", "--threads", "1", *arguments]) == 2
    assert words in capsys.readouterr().err
