"""The command `dsv3` as it is used: what it prints, what it leaves behind, how it stops and goes on."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from nano_runs import interrupted
from safetensors.torch import load_file

from dsv3_mini import ModelConfig, from_pretrained, generate, save_pretrained
from dsv3_mini.cli import INTERRUPTED, main
from dsv3_mini.commands import train as train_command
from dsv3_mini.data.stream import held_out_rows
from dsv3_mini.data.tokenizer import Tokenizer
from dsv3_mini.doctor import Finding
from dsv3_mini.evaluate.bits_per_byte import bits_per_byte
from dsv3_mini.inference.generate import TEMPERATURE
from dsv3_mini.model import DeepSeekV3

TRAIN = ["train", "--preset", "nano", "--mixture", "stories=0.6,sums=0.4", "--judge", "0"]
SHARD = "model-00001-of-00001.safetensors"


@pytest.fixture(scope="module")
def nano(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "nano"
    torch.manual_seed(0)
    save_pretrained(DeepSeekV3(ModelConfig.preset("nano", initializer_range=0.08)), folder)
    return folder


@pytest.fixture
def dsv3(capsys: pytest.CaptureFixture[str]) -> Any:
    """Run a command that must succeed without a word on stderr; returns what it printed."""

    def run(*arguments: str) -> str:
        capsys.readouterr()
        code = main(arguments)
        said = capsys.readouterr()
        assert (code, said.err) == (0, "")
        return said.out

    return run


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 2,048 tokens that was not disturbed."""
    folder = tmp_path_factory.mktemp("runs") / "ended"
    assert main([*TRAIN, "--tokens", "2048", "--out", str(folder)]) == 0
    return folder


def files(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def log(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]


def steps(folder: Path) -> list[int]:
    return [line["step"] for line in log(folder) if line["kind"] == "step"]


# ---- the command -----------------------------------------------------------------------------------------------------


def test_help_lists_every_command_and_does_not_wait_for_torch() -> None:
    program = (
        "import sys\nfrom dsv3_mini.cli import main\ntry:\n    main(['--help'])\nexcept SystemExit as left:\n"
        "    print('left with', left.code)\nprint('heavy:', {'torch', 'numpy', 'datasets'} & set(sys.modules))"
    )
    printed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert printed.endswith("left with 0\nheavy: set()\n")
    assert all(f"    {command} " in printed for command in ("train", "sample", "eval", "ledger", "bench", "doctor"))


def test_a_reader_that_leaves_early_is_no_error() -> None:
    read, write = os.pipe()
    os.close(read)  # as in `dsv3 ledger | true`
    ledger = [sys.executable, "-m", "dsv3_mini.cli", "ledger", "--preset", "nano", "--json"]  # less than a buffer
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    left = subprocess.run(ledger, stdout=write, stderr=subprocess.PIPE, text=True, env=buffered)
    os.close(write)
    assert (left.returncode, left.stderr) == (0, "")


def test_ctrl_c_ends_any_command_without_a_traceback(
    nano: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("dsv3_mini.commands.sample.stream", interrupted)
    assert main(["sample", "--model", str(nano)]) == INTERRUPTED
    assert capsys.readouterr().err == "dsv3 sample: interrupted\n"


def test_ledger_of_the_released_model(dsv3: Any) -> None:
    assert "671,026,419,200" in dsv3("ledger", "--preset", "671b")
    dear, cheap = (json.loads(dsv3("ledger", "--json", "--dollars-per-hour", price)) for price in ("6", "2"))
    assert 671_026_419_200 in cheap["parameters"].values()
    assert sum(dear["report_run"].values()) != sum(cheap["report_run"].values()), "the price is passed on"


def test_ledger_takes_fields_and_files(dsv3: Any, nano: Path) -> None:
    by_name = dsv3("ledger", "--preset", "nano", "--set", "initializer_range=0.08", "--json")
    assert dsv3("ledger", "--config", str(nano), "--json") == by_name
    assert dsv3("ledger", "--preset", "nano", "--set", "q_lora_rank=none", "--json") != by_name


def test_doctor_fails_when_something_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for ok, code in ((True, 0), (None, 0), (False, 2)):
        monkeypatch.setattr("dsv3_mini.commands.doctor.examine", lambda ok=ok: [Finding("torch", "2.0", ok)])
        assert main(["doctor"]) == code
        assert "torch" in capsys.readouterr().out


# ---- sampling and measuring ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", ["", "Tom has the ball. "])
def test_a_seed_gives_one_text_which_is_generates(prompt: str, dsv3: Any, nano: Path) -> None:
    def sample(seed: int, *more: str) -> str:
        return dsv3("sample", "--model", str(nano), "--seed", str(seed), "--max-new-tokens", "12", prompt, *more)

    assert sample(1) == sample(1) != sample(2)
    model, tokenizer = from_pretrained(nano).eval(), Tokenizer.shipped()
    ids = torch.tensor([[tokenizer.eos_id, *tokenizer.encode(prompt)]])
    for seed, temperature in ((1, 0.8), (2, 0.8), (1, 0.0)):
        generator = torch.Generator().manual_seed(seed)
        new = generate(model, ids, 12, temperature, tokenizer.eos_id, generator)[0, ids.shape[1] :].tolist()
        new = new[: new.index(tokenizer.eos_id)] if tokenizer.eos_id in new else new
        assert sample(seed, "--temperature", str(temperature)) == prompt + tokenizer.decode(new) + "\n"


def test_a_sample_ends_with_the_context(dsv3: Any, nano: Path, tmp_path: Path) -> None:
    short = shutil.copytree(nano, tmp_path / "short")
    config = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 24}))
    tokenizer = Tokenizer.shipped()
    ids = torch.tensor([[tokenizer.eos_id, *tokenizer.encode("Tom has")]])
    room, generator = 24 - ids.shape[1], torch.Generator().manual_seed(4)
    new = generate(from_pretrained(short).eval(), ids, room, 0.8, None, generator)[0, ids.shape[1] :].tolist()
    assert tokenizer.eos_id not in new, "this seed runs into the end of the context"
    printed = dsv3("sample", "--model", str(short), "--seed", "4", "--max-new-tokens", "100000", "Tom has")
    assert printed == "Tom has" + tokenizer.decode(new) + "\n"


def test_eval_measures_what_bits_per_byte_measures(dsv3: Any, nano: Path) -> None:
    flags = ["--samples", "0", "--rows", "2", "--context", "64", "--domains", "stories", "sums"]
    scores = json.loads(dsv3("eval", "--model", str(nano), *flags, "--json"))
    model, tokenizer = from_pretrained(nano).eval(), Tokenizer.shipped()
    for domain in ("stories", "sums"):
        rows = held_out_rows(domain, tokenizer, 64, 2)
        bits = bits_per_byte(model, rows.tokens, rows.n_bytes, tokenizer.pad_id)
        targets = int((rows.tokens[:, 1:] != tokenizer.pad_id).sum())
        assert scores["bits_per_byte"][domain] == round(bits, 4)
        assert scores["validation_loss"][domain] == pytest.approx(bits * math.log(2) * rows.n_bytes / targets, abs=1e-4)
    assert set(scores) == {"bits_per_byte", "validation_loss"}
    shown = dsv3("eval", "--model", str(nano), *flags)
    for score in ("bits_per_byte", "validation_loss"):
        assert f" {scores[score]['stories']:.3f}" in shown


def test_eval_judges(dsv3: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dsv3_mini.evaluate.judged.STORY_TOKENS", 40)
    torch.manual_seed(0)
    model = str(tmp_path / "nano")
    save_pretrained(DeepSeekV3(ModelConfig.preset("nano", max_position_embeddings=512)), model)
    flags = ["--samples", "2", "--rows", "1", "--context", "32", "--domains", "sums"]
    judged = json.loads(dsv3("eval", "--model", model, *flags, "--json"))["judged"]
    assert (judged["samples"], judged["questions"], judged["well_formed"]) == (2, 2, 0.0)
    assert judged["temperature"] == TEMPERATURE
    shown = dsv3("eval", "--model", model, *flags, "--temperature", "0.5")
    assert "two-digit sums right" in shown and "2 samples at temperature 0.5" in shown


def test_a_model_without_mtp_weights_writes(dsv3: Any, nano: Path, tmp_path: Path) -> None:
    """What transformers saves: a config that names MTP modules, and no weights of theirs."""
    whole = from_pretrained(nano, mtp=False)
    save_pretrained(whole, tmp_path / "nano")
    (tmp_path / "nano" / "config.json").write_text((nano / "config.json").read_text())
    flags = ["--seed", "1", "--max-new-tokens", "8"]
    assert dsv3("sample", "--model", str(tmp_path / "nano"), *flags) == dsv3("sample", "--model", str(nano), *flags)


# ---- training --------------------------------------------------------------------------------------------------------


def test_a_run_leaves_a_model_and_a_log_without_gaps(ended: Path, dsv3: Any) -> None:
    lines = log(ended)
    assert steps(ended) == list(range(1, len(steps(ended)) + 1)) and len(steps(ended)) > 3
    assert lines[-1]["kind"] == "evaluation" and lines[-1]["tokens"] >= 2048 > lines[-3]["tokens"]
    assert lines[-1]["bits_per_byte"].keys() == {"stories", "sums"} and "judged" not in lines[-1]
    assert (ended / "training.png").read_bytes().startswith(b"\x89PNG")
    assert from_pretrained(ended / "model").cfg == ModelConfig.preset("nano")
    flags = ["--seed", "1", "--max-new-tokens", "8"]
    of_run, of_model = (dsv3("sample", "--model", str(folder), *flags) for folder in (ended, ended / "model"))
    assert of_run == of_model


def test_an_ended_run_stays_as_it_is(ended: Path, dsv3: Any) -> None:
    before = files(ended)
    assert f"{ended} has ended (" in dsv3(*TRAIN, "--tokens", "2048", "--out", str(ended))
    assert files(ended) == before


def test_an_ended_run_that_was_killed_before_its_model_was_whole_is_completed(
    ended: Path, tmp_path: Path, dsv3: Any
) -> None:
    folder = tmp_path / "run"
    whole = files(ended)
    for name in whole:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes((ended / name).read_bytes())
    (folder / "model" / "tokenizer.tiktoken").unlink()
    assert "trained: " in dsv3(*TRAIN, "--tokens", "2048", "--out", str(folder))
    assert files(folder / "model") == files(ended / "model")


def test_minutes_stop_a_run_that_goes_on_to_the_same_weights(
    ended: Path, tmp_path: Path, dsv3: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clock that moves a second each time it is read: --minutes 0.04 is over after two steps."""
    folder, parts, seconds = tmp_path / "run", 0, 0.0

    def monotonic() -> float:
        nonlocal seconds
        seconds += 1
        return seconds

    monkeypatch.setattr(train_command.time, "monotonic", monotonic)
    flags = [*TRAIN, "--tokens", "2048", "--out", str(folder)]
    while "stopped after step" in dsv3(*flags, "--minutes", "0.04"):
        parts += 1
        assert steps(folder) == list(range(1, 2 * parts + 1)) and not (folder / "model").exists()
    assert parts >= 2
    assert steps(folder) == steps(ended)
    one, other = load_file(ended / "model" / SHARD), load_file(folder / "model" / SHARD)
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_run_stopped_before_its_first_step_goes_on(
    tmp_path: Path, dsv3: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(train_command.time, "monotonic", iter([0.0, 1e9]).__next__)
        assert "stopped after step 0 (0 tokens)" in dsv3(
            *TRAIN, "--tokens", "256", "--out", str(folder), "--minutes", "1"
        )
    assert "trained: " in dsv3(*TRAIN, "--tokens", "256", "--out", str(folder))
    assert steps(folder) == [1]


def test_ctrl_c_saves_a_run_and_the_same_command_goes_on(tmp_path: Path, dsv3: Any) -> None:
    folder = tmp_path / "run"
    flags = [*TRAIN, "--tokens", "2000000", "--out", str(folder), "--threads", "1"]
    command = [sys.executable, "-m", "dsv3_mini.cli", *flags]
    printed = interrupted(command, folder)
    done = len(steps(folder))
    assert f"stopped after step {done} " in printed and "the same command goes on from here" in printed
    assert "stopped after step" in dsv3(*flags, "--minutes", "0.01")
    assert steps(folder) == list(range(1, len(steps(folder)) + 1)) and len(steps(folder)) >= done


def test_a_command_leaves_the_process_as_it_was(tmp_path: Path, dsv3: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def state() -> tuple[Any, ...]:
        return signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM), torch.get_num_threads()

    before, during = state(), []
    trainer = train_command.Trainer
    train_step = trainer.train_step
    monkeypatch.setattr(trainer, "train_step", lambda self: during.append(state()) or train_step(self))
    other = str(2 if torch.get_num_threads() == 1 else 1)
    dsv3(*TRAIN, "--tokens", "256", "--threads", other, "--out", str(tmp_path / "run"))
    assert state() == before and all(now != then for now, then in zip(during[0], before, strict=True))

    def failing(self: Any) -> None:
        raise RuntimeError("a bug of ours")

    monkeypatch.setattr(trainer, "train_step", failing)
    with pytest.raises(RuntimeError, match="a bug of ours"):
        main([*TRAIN, "--tokens", "256", "--threads", other, "--out", str(tmp_path / "failing")])
    assert state() == before
