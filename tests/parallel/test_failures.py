"""Processes that are killed with -9 or run into an error, under torch's own launcher, which starts all again.

Launcher and processes are forked from one server that has imported what they need, so that a life takes a second or two.
"""

from __future__ import annotations

import json
import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import torch
from nano_runs import NANO, nano_recipe, small_tokenizer
from ranks import SERVER
from safetensors.torch import load_file, save_file

from dsv3_mini.cli import main
from dsv3_mini.data.stream import TokenStream
from dsv3_mini.hub import from_pretrained
from dsv3_mini.parallel.launch import joined
from dsv3_mini.parallel.plan import ParallelPlan
from dsv3_mini.train.checkpoint import checkpoints, load_checkpoint
from dsv3_mini.train.trainer import Trainer

STEPS, BATCH, LENGTH = 12, 6, 16
RECIPE = nano_recipe(
    steps=STEPS, batch=BATCH, seq_len=LENGTH, micro_batch=3, log_every=1, checkpoint_every=2 * BATCH * LENGTH
)
FAILING = ParallelPlan(dp_replicate=3)
PROBE = torch.arange(40).view(2, 20)
SAVING = ParallelPlan(dp_shard=2, ep=2, zero=2)
# What happens in a life, by its number: which process, at which of its own calls, and whether it takes all with it.
MOMENTS: list[tuple[int, str, int, bool]] = [
    (1, "fsync", 2, False),  # one has written its piece of the second checkpoint of this life, and dies
    (0, "fsync", 3, True),  # all pieces are there, and state.json; no name yet
    (0, "replace", 1, False),  # about to give it its name
    (0, "replaced", 1, True),  # it has its name, and is not yet known to be on the disk
    (0, "replace", 2, False),  # about to remove the oldest
]


# ---- in the processes ------------------------------------------------------------------------------------------------


def launch(folder: Path, plan: ParallelPlan, restarts: int, work: Any) -> None:
    """torchrun --max-restarts, with functions for programs. Each process's output: logs/*/attempt_N/RANK/stderr.log."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    torch.set_num_threads(1)
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=plan.processes, rdzv_backend="c10d", rdzv_endpoint="localhost:0",
        run_id="test", max_restarts=restarts, monitor_interval=0.1, start_method="fork",
        logs_specs=DefaultLogsSpecs(log_dir=str(folder / "logs"), redirects=Std.ALL),
    )  # fmt: skip
    elastic_launch(config, work)(folder, plan)


def live(folder: Path, plan: ParallelPlan) -> None:
    """One life of one process: a run to its end."""
    from dsv3_mini.parallel.team import Team

    rank = os.environ["RANK"]
    (folder / f"pid-{rank}").write_text(str(os.getpid()))
    signal.signal(signal.SIGTERM, lambda *_: None)  # as dsv3 train, which stops after its step when the launcher asks

    def open_stream(context: int) -> TokenStream:
        return TokenStream(small_tokenizer(), context, RECIPE.mixture, seed=RECIPE.seed, block_rows=16)

    with joined("cpu", patience=30) as replicas:
        team = Team.join(plan, NANO)
        assert team.rank == replicas.rank == int(rank)
        run = Trainer(folder / "run", NANO, RECIPE, small_tokenizer(), open_stream, replicas=team)
        with (folder / f"began-{rank}").open("a") as file:
            file.write(f"{run.step}\n")
        run.run()
        with torch.no_grad():
            trained = run.model(PROBE).logits  # in which all take part
        averaged = run.averaged_weights()
        if team.first:
            run._average = averaged
            save_file(
                {"trained": trained, "averaged": run.averaged_model()(PROBE).logits}, folder / "logits.safetensors"
            )


def die_in_a_step(folder: Path, plan: ParallelPlan) -> None:
    """Life 0: process 1 is killed in step 4. Life 1: process 2 has no memory left in step 7, and process 0 is deaf."""
    life, rank, step = int(os.environ["TORCHELASTIC_RESTART_COUNT"]), os.environ["RANK"], Trainer.train_step

    def train_step(trainer: Trainer) -> Any:
        if (life, rank, trainer.step) == (0, "1", 3):
            trainer.replicas.settle()  # so that it is known what the next life begins with
            (folder / "end-0").write_text("")
            os.kill(os.getpid(), signal.SIGKILL)
        if (life, rank, trainer.step) == (1, "2", 6):
            trainer.replicas.settle()
            (folder / "end-1").write_text("")
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nand much more")
        if (life, rank, trainer.step) == (1, "0", 6):  # in an exchange that nothing ends, as NCCL's may be
            time.sleep(120)
        return step(trainer)

    Trainer.train_step = train_step
    live(folder, plan)


def die_in_a_save(folder: Path, plan: ParallelPlan) -> None:
    life, rank = int(os.environ["TORCHELASTIC_RESTART_COUNT"]), int(os.environ["RANK"])
    counts = {"fsync": 0, "replace": 0, "replaced": 0}

    def reached(call: str) -> None:
        counts[call] += 1
        if life < len(MOMENTS) and (rank, call, counts[call]) == MOMENTS[life][:3]:
            others = [int((folder / f"pid-{other}").read_text()) for other in range(plan.processes) if other != rank]
            for pid in [*(others if MOMENTS[life][3] else []), os.getpid()]:
                os.kill(pid, signal.SIGKILL)

    fsync, replace = os.fsync, os.replace

    def counted_fsync(handle: int) -> None:
        reached("fsync")
        fsync(handle)

    def counted_replace(old: Any, new: Any) -> None:
        if Path(new).parent.name != "checkpoints":
            return replace(old, new)
        reached("replace")
        replace(old, new)
        reached("replaced")

    os.fsync, os.replace = counted_fsync, counted_replace
    live(folder, plan)


# ---- in the test -----------------------------------------------------------------------------------------------------


def launched(folder: Path, plan: ParallelPlan, restarts: int, work: Any) -> None:
    folder.mkdir()
    process = SERVER.Process(target=launch, args=(folder, plan, restarts, work))
    process.start()
    process.join(timeout=300)
    assert process.exitcode == 0, said(folder)


def said(folder: Path) -> dict[tuple[int, int], str]:
    """What each process wrote to stderr, by the number of its life and its own."""
    files = folder.glob("logs/*/attempt_*/*/stderr.log")
    return {(int(file.parts[-3].partition("_")[2]), int(file.parts[-2])): file.read_text() for file in files}


def began(folder: Path, rank: int) -> list[int]:
    """After which step each life of a process went on."""
    return [int(line) for line in (folder / f"began-{rank}").read_text().split()]


def logged(folder: Path) -> list[int]:
    lines = [json.loads(line) for line in (folder / "run" / "log.jsonl").read_text().splitlines()]
    return [line["step"] for line in lines if line["kind"] == "step"]


def test_all_name_the_one_that_fails_and_go_on_from_the_checkpoint(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    launched(folder, FAILING, 2, die_in_a_step)
    heard = said(folder)
    killed = r"dsv3 train: process 1 was lost \(killed[^\n]*\); process %d ends, too: the same command goes on[^\n]*\n"
    error = r"dsv3 train: process 2 failed \(OutOfMemoryError: CUDA out of memory\. Tried to allocate 2\.00 GiB\.\); process %d ends, too[^\n]*\n"
    assert heard[0, 1] == ""
    assert re.fullmatch(killed % 0, heard[0, 0]) and re.fullmatch(killed % 2, heard[0, 2]), heard
    assert re.fullmatch(error % 0, heard[1, 0]) and re.fullmatch(error % 1, heard[1, 1]), heard
    assert heard[1, 2].startswith("Traceback") and "OutOfMemoryError" in heard[1, 2]
    assert all(not heard[2, rank] for rank in range(3)), heard
    assert all(began(folder, rank) == [0, 2, 6] for rank in range(3))
    assert logged(folder) == list(range(1, STEPS + 1))
    for life in (0, 1):  # the last that each process said, after the first of them ended
        said_last = [file.stat().st_mtime for file in folder.glob(f"logs/*/attempt_{life}/*/stderr.log")]
        assert max(said_last) - (folder / f"end-{life}").stat().st_mtime < 60


def test_a_kill_while_saving_leaves_the_checkpoint_before_it(tmp_path: Path) -> None:
    broken, unbroken = tmp_path / "broken", tmp_path / "unbroken"
    launched(broken, SAVING, len(MOMENTS), die_in_a_save)
    launched(unbroken, SAVING, 0, live)
    heard = said(broken)
    for life, (rank, _, _, all_die) in enumerate(MOMENTS):
        assert heard[life, rank] == ""
        named = re.match(rf"dsv3 train: process {rank} was lost ", heard[life, 1 - rank])
        assert all_die or named, heard
    assert began(broken, 0) == began(broken, 1) == [0, 2, 2, 2, 4, 6]
    (end, expected) = (load_checkpoint(checkpoints(folder / "run")[-1]) for folder in (broken, unbroken))
    assert end.state["step"] == expected.state["step"] == STEPS
    differing = [name for name, tensor in expected.tensors.items() if not torch.equal(end.tensors[name], tensor)]
    assert not differing and end.tensors.keys() == expected.tensors.keys(), differing
    assert logged(broken) == list(range(1, STEPS + 1))
    assert not list((broken / "run" / "checkpoints").glob(".*")), "nothing half-written is left"
    # The model comes out of what two processes wrote, without them.
    said_by_two = load_file(broken / "logits.safetensors")
    for which, flags in (("trained", []), ("averaged", ["--ema"])):
        assert main(["convert", str(broken / "run"), str(tmp_path / which), "--dtype", "fp32", *flags]) == 0
        with torch.no_grad():
            logits = from_pretrained(tmp_path / which)(PROBE).logits
        torch.testing.assert_close(logits, said_by_two[which], rtol=0, atol=1e-5)
