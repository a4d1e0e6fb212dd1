"""dsv3 convert: the model out of a run's checkpoint, against the model that was trained."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from nano_runs import NANO, nano_recipe, nano_trainer, small_tokenizer
from torch import Tensor

from dsv3_mini.cli import main
from dsv3_mini.hub import from_pretrained, save_pretrained
from dsv3_mini.model import DeepSeekV3
from dsv3_mini.train.trainer import Trainer

PROBE = torch.arange(40).view(2, 20)


@torch.no_grad()
def said_by(model: DeepSeekV3) -> list[Tensor]:
    """All logits, MTP's too."""
    out = model.eval()(PROBE)
    return [out.logits, *out.mtp_logits]


def assert_says(folder: Path, expected: list[Tensor]) -> None:
    found = said_by(from_pretrained(folder))
    assert len(found) == len(expected) == 1 + NANO.num_nextn_predict_layers
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Trainer, list[Tensor]]:
    """Three steps, with checkpoints after two and three; and what the model said after two."""
    torch.manual_seed(0)
    trainer = nano_trainer(tmp_path_factory.mktemp("runs") / "run")
    trainer.train_step()
    trainer.train_step()
    trainer.save()
    before = said_by(trainer.model)
    trainer.train_step()
    trainer.save()
    return trainer, before


def test_the_model_is_that_which_was_trained(run: tuple[Trainer, list[Tensor]], tmp_path: Path) -> None:
    trainer, before = run
    words = ["--dtype", "fp32"]
    assert main(["convert", str(trainer.folder), str(tmp_path / "last"), *words]) == 0
    assert_says(tmp_path / "last", said_by(trainer.model))
    assert main(["convert", str(trainer.folder), str(tmp_path / "before"), "--step", "2", *words]) == 0
    assert_says(tmp_path / "before", before)
    assert main(["convert", str(trainer.last_saved), str(tmp_path / "ema"), "--ema", *words]) == 0
    assert_says(tmp_path / "ema", said_by(trainer.averaged_model()))
    assert not torch.equal(said_by(trainer.averaged_model())[0], said_by(trainer.model)[0])


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("fp8", torch.float8_e4m3fn)])
def test_other_precisions_are_rounded_once(
    name: str, dtype: torch.dtype, run: tuple[Trainer, list[Tensor]], tmp_path: Path
) -> None:
    """From a run and from a model folder: the files that save_pretrained writes of the trained model."""
    folder = run[0].folder
    save_pretrained(run[0].model, tmp_path / "expected", dtype)
    small_tokenizer().save(tmp_path / "ranks")
    assert (
        main(
            ["convert", str(folder), str(tmp_path / "fp32"), "--dtype", "fp32", "--tokenizer", str(tmp_path / "ranks")]
        )
        == 0
    )
    for source, found in ((folder, tmp_path / "from run"), (tmp_path / "fp32", tmp_path / "from model")):
        assert main(["convert", str(source), str(found), "--dtype", name]) == 0
        config = json.loads((found / "config.json").read_bytes())
        ids = {config.pop(name) for name in ("bos_token_id", "eos_token_id")} if "eos_token_id" in config else set()
        config.pop("pad_token_id", None)
        assert config == json.loads((tmp_path / "expected" / "config.json").read_bytes())
        assert bool(ids) == (source.name == "fp32")  # where the tokenizer is known
        for file in (tmp_path / "expected").glob("*.safetensors*"):
            assert (found / file.name).read_bytes() == file.read_bytes(), (source, file.name)
    ranks = [(tmp_path / where / "tokenizer.tiktoken").read_bytes() for where in ("fp32", "from model")]
    assert ranks[0] == ranks[1] == (tmp_path / "ranks").read_bytes()


def test_what_cannot_be_converted_is_one_line(
    run: tuple[Trainer, list[Tensor]], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folder, out = str(run[0].folder), str(tmp_path / "out")
    plain = nano_trainer(tmp_path / "plain", nano_recipe(ema_decay=0.0))
    plain.save()
    assert main(["convert", folder, str(tmp_path / "model")]) == 0
    capsys.readouterr()
    for words, said in (
        ([str(tmp_path)], "holds no checkpoint: give the folder of a run"),
        ([folder, "--step", "7"], "holds no checkpoint of step 7: it has those of steps 2, 3"),
        ([str(tmp_path / "plain"), "--ema"], "has no moving average of the weights"),
        ([str(tmp_path / "model"), "--ema"], "is a model, not a run: leave --ema and --step out"),
    ):
        assert main(["convert", words[0], out, *words[1:]]) == 2
        complaint = capsys.readouterr().err
        assert complaint.startswith("dsv3 convert: ") and said in complaint and complaint.count("\n") == 1
    assert main(["convert", folder, str(tmp_path / "model")]) == 2 and not (tmp_path / "out").exists()
