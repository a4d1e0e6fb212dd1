"""`dsv3 sample`: each flag reaches the sampler, and --mtp says what it brought."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from random_models import nano, random_model

from dsv3_mini import from_pretrained, generate, save_pretrained
from dsv3_mini.cli import main
from dsv3_mini.data.tokenizer import Tokenizer
from dsv3_mini.inference.generate import TEMPERATURE, TOP_P

PROMPT = "Tom has the ball. "


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "nano"
    save_pretrained(random_model(nano(vocab_size=4096)), path)
    return path


def sample(capsys: pytest.CaptureFixture[str], folder: Path, *flags: str) -> tuple[str, str]:
    code = main(["sample", "--model", str(folder), "--max-new-tokens", "12", "--seed", "3", PROMPT, *flags])
    said = capsys.readouterr()
    assert code == 0, said.err
    return said.out, said.err


@pytest.mark.parametrize(
    "flags, settings",
    [
        (["--top-p", "0.5"], dict(top_p=0.5)),
        (["--temperature", "1", "--top-p", "1"], dict(temperature=1.0, top_p=1.0)),
        (["--min-p", "0.3"], dict(min_p=0.3)),
        (["--repetition-penalty", "0.2"], dict(repetition_penalty=0.2)),
        (["--mtp"], dict(use_mtp=True)),
        (["--mtp", "--drafts", "3"], dict(use_mtp=True, drafts=3)),
    ],
)
def test_a_flag_is_a_setting(
    flags: list[str], settings: dict, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = Tokenizer.shipped()
    ids = torch.tensor([[tokenizer.eos_id, *tokenizer.encode(PROMPT)]])
    generator = torch.Generator().manual_seed(3)
    model = from_pretrained(folder).eval()
    settings = {"temperature": TEMPERATURE, "top_p": TOP_P, **settings}
    new = generate(model, ids, 12, stop_id=tokenizer.eos_id, generator=generator, **settings)[
        0, ids.shape[1] :
    ].tolist()
    new = new[: new.index(tokenizer.eos_id)] if tokenizer.eos_id in new else new
    printed, said = sample(capsys, folder, *flags)
    assert printed == PROMPT + tokenizer.decode(new) + "\n"
    assert printed != sample(capsys, folder)[0], "without the flag it is another text"
    assert ("drafts held" in said and "tokens a pass" in said) if "--mtp" in flags else said == ""


def test_greedy_text_is_the_same_with_mtp(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    greedy = ["--temperature", "0"]
    assert sample(capsys, folder, *greedy, "--mtp")[0] == sample(capsys, folder, *greedy)[0]


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--top-p", "0"], "top_p = 0.0 must be above 0"),
        (["--min-p", "2"], "min_p = 2.0 must be between 0 and 1"),
        (["--repetition-penalty", "0"], "repetition_penalty = 0.0 must be above 0"),
        (["--drafts", "2"], "drafts = 2 needs use_mtp=True (dsv3 sample: --mtp)"),
    ],
)
def test_a_wrong_flag_is_one_line(
    flags: list[str], words: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sample", "--model", str(folder), *flags]) == 2
    said = capsys.readouterr()
    assert words in said.err and said.err.count("\n") == 1 and said.out == ""


def test_mtp_without_its_weights_says_so(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_pretrained(from_pretrained(folder, mtp=False), tmp_path / "plain")
    assert main(["sample", "--model", str(tmp_path / "plain"), "--mtp"]) == 2
    assert "num_nextn_predict_layers = 0" in capsys.readouterr().err
