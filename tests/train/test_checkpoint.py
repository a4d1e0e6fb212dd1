"""Checkpoints that are killed while they are written, cut short, or tampered with."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from torch import Tensor

from dsv3_mini.errors import CheckpointError
from dsv3_mini.train.checkpoint import STATE, checkpoint_name, checkpoints, load_checkpoint, save_checkpoint

WATCHED = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.listdir", "os.scandir", "shutil.rmtree")


def tensors_of(step: int) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(step)
    return {"master.weight": torch.randn(40, 9, generator=random), "step.weight": torch.tensor(float(step))}


def save(run: Path, step: int) -> Path:
    state = {name: {} if name == "stream" else step for name in STATE}
    return save_checkpoint(run, step, tensors_of(step), state)


def assert_is(folder: Path, step: int) -> None:
    loaded = load_checkpoint(folder)
    assert folder.name == checkpoint_name(step) and loaded.state["step"] == step
    assert loaded.tensors.keys() == tensors_of(step).keys()
    assert all(torch.equal(loaded.tensors[name], tensor) for name, tensor in tensors_of(step).items())


def killed_at(number: int, run: Path, step: int) -> bool:
    """Save in a process of its own, which is killed with -9 at its `number`-th touch of the run's files.

    False if it got to the end before.
    """
    child = os.fork()
    if child == 0:
        touched = 0

        def watch(event: str, arguments: tuple) -> None:
            nonlocal touched
            if event in WATCHED and str(run) in str(arguments[0]):
                touched += 1
                if touched == number:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(watch)
        try:
            save(run, step)
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


def test_what_goes_in_comes_out(tmp_path: Path) -> None:
    tensors = {
        "bf16": torch.randn(3, 5).bfloat16(),
        "scalar": torch.tensor(7.0),
        "transposed": torch.randn(4, 6).T,
        "rng": torch.get_rng_state(),
        "one": torch.zeros(3),
    }
    state = {name: {"block": 3, "cursors": [1, [2, 3]]} for name in STATE}
    loaded = load_checkpoint(save_checkpoint(tmp_path, 12, tensors, state))
    assert loaded.state == state and loaded.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded.tensors[name].dtype == tensor.dtype and torch.equal(loaded.tensors[name], tensor)


def test_the_last_two_are_kept_in_order_of_steps(tmp_path: Path) -> None:
    for step in (9, 10, 100, 99_999_999):
        save(tmp_path, step)
    assert [folder.name for folder in checkpoints(tmp_path)] == ["step-00000100", "step-99999999"]
    assert_is(checkpoints(tmp_path)[-1], 99_999_999)
    assert checkpoints(tmp_path / "nothing") == []


@pytest.mark.parametrize("again", [False, True], ids=["a new step", "the same step again"])
def test_a_kill_at_any_touch_of_a_file_leaves_a_usable_checkpoint(again: bool, tmp_path: Path) -> None:
    before = tmp_path / "before"
    for step in (1, 2):
        save(before, step)
    step, number, seen = (2 if again else 3), 0, set()
    while True:
        number += 1
        run = tmp_path / f"run{number}"
        shutil.copytree(before, run)
        killed = killed_at(number, run, step)
        found = checkpoints(run)
        for folder in found:  # whatever is offered is whole ...
            assert_is(folder, int(folder.name[-8:]))
        seen.add(found[-1].name)
        save(run, 4)  # ... and the run goes on, and leaves nothing lying about
        assert_is(checkpoints(run)[-1], 4)
        assert len(checkpoints(run)) == 2
        assert sorted(p.name for p in (run / "checkpoints").iterdir()) == [p.name for p in checkpoints(run)]
        if not killed:
            break
    assert number > 10, "the kills must have hit something"
    assert seen == ({"step-00000001", "step-00000002"} if again else {"step-00000002", "step-00000003"})


def test_a_half_written_file_is_never_taken_for_a_checkpoint(tmp_path: Path) -> None:
    save(tmp_path, 1)
    # What a kill in the middle of a write leaves: the temporary folder, with a part of the file.
    half = tmp_path / "checkpoints" / ".step-00000002.4242.partial"
    half.mkdir()
    whole = (tmp_path / "checkpoints" / "step-00000001" / "state.safetensors").read_bytes()
    (half / "state.safetensors").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "checkpoints" / "step-2").mkdir()
    assert [folder.name for folder in checkpoints(tmp_path)] == ["step-00000001"]
    save(tmp_path, 3)
    assert not half.exists()


def test_a_failing_write_raises_and_leaves_the_former(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(os, "replace", full)
        save(tmp_path, 2)
    assert_is(checkpoints(tmp_path)[-1], 1)
    save(tmp_path, 2)
    assert_is(checkpoints(tmp_path)[-1], 2)


# ---- damage ----------------------------------------------------------------------------------------------------------


def refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(folder)
    message = str(caught.value)
    assert "\n" not in message and f"remove {folder.name} to resume from the one before" in message
    return message


@pytest.mark.parametrize("kept", [0, 1, 7, 8, 9, 60, 0.5, -1])
def test_a_truncated_safetensors_is_named(kept: float, tmp_path: Path) -> None:
    folder = save(tmp_path, 5)
    file = folder / "state.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * kept) if isinstance(kept, float) else kept])
    assert str(file) in refusal(folder)


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"\xff" * 8 + data[8:],  # a header of 2^64 bytes
        lambda data: data[:8] + b"[" + data[9:],  # no JSON
        lambda data: data.replace(b'"F32"', b'"F99"'),
        lambda data: data.replace(b"[40,9]", b"[41,9]"),
        lambda data: data + b"more",
        lambda data: b"\x80\x04\x95" + data,  # a pickle
    ],
)
def test_a_tampered_safetensors_is_named(damage: object, tmp_path: Path) -> None:
    folder = save(tmp_path, 5)
    file = folder / "state.safetensors"
    changed = damage(file.read_bytes())
    assert changed != file.read_bytes()
    file.write_bytes(changed)
    assert str(file) in refusal(folder)


@pytest.mark.parametrize("text", ["", "{", '{"step": 5', "[1, 2]", "null", "5", "\x00", json.dumps({"step": 5})])
def test_a_damaged_state_is_named(text: str, tmp_path: Path) -> None:
    folder = save(tmp_path, 5)
    (folder / "state.json").write_text(text)
    message = refusal(folder)
    assert str(folder / "state.json") in message
    if text.endswith("}"):
        assert "tokens is missing" in message


@pytest.mark.parametrize("name", ["state.json", "state.safetensors"])
def test_a_missing_file_is_named(name: str, tmp_path: Path) -> None:
    folder = save(tmp_path, 5)
    (folder / name).unlink()
    assert str(folder / name) in refusal(folder)


def test_a_tensor_is_asked_for_by_name_and_shape(tmp_path: Path) -> None:
    folder = save(tmp_path, 5)
    loaded = load_checkpoint(folder)
    assert torch.equal(loaded.tensor("master.weight", torch.Size([40, 9])), tensors_of(5)["master.weight"])
    for name, shape in (("master.weigth", [40, 9]), ("master.weight", [9, 40]), ("step.weight", [1])):
        with pytest.raises(CheckpointError, match=name) as caught:
            loaded.tensor(name, torch.Size(shape))
        assert str(folder / "state.safetensors") in str(caught.value) and "\n" not in str(caught.value)


def test_a_full_disk_is_one_line_and_the_former_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)

    def full(*_: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("dsv3_mini.train.checkpoint.save_file", full)
    with pytest.raises(
        CheckpointError, match=r"step-00000002 cannot be written \(.*No space left.*\): make room"
    ) as error:
        save(tmp_path, 2)
    assert "\n" not in str(error.value)
    assert [folder.name for folder in (tmp_path / "checkpoints").iterdir()] == [checkpoint_name(1)]
    assert_is(checkpoints(tmp_path)[-1], 1)
