"""`dsv3 doctor` on machines that are not this one, and what it reads off this one against other sources."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import psutil
import pytest
import torch

from dsv3_mini import machine as probes
from dsv3_mini.doctor import Finding, examine, healthy, report
from dsv3_mini.machine import Gpu, Machine, look

ROOT = Path(__file__).resolve().parents[1]
GB = 10**9
LAPTOP = Machine(
    python=(3, 12, 4),
    executable="/home/ada/course/.venv/bin/python",
    lower_bounds={"torch": "2.13", "einops": "0.8", "tiktoken": "0.9", "ipywidgets": "8.1", "ipykernel": "6.29"},
    versions={
        "torch": "2.13.0+cpu",
        "einops": "0.8.2",
        "tiktoken": "0.10",
        "ipykernel": "7.4.0",
        "ipywidgets": "8.1.9",
        "anywidget": "0.11.0",
        "jupyterlab-widgets": "3.0.17",
    },
    cores=8,
    threads=8,
    memory_total=16 * GB,
    memory_available=9 * GB,
    disk_free=100 * GB,
    cpu_flags=frozenset({"avx2"}),
    kernel_python="/home/ada/course/.venv/bin/python3",
    widget_extensions=True,
    shipped={"tokenizer.tiktoken": True, "tiny": True},
)
HOPPER = Gpu("NVIDIA H100", (9, 0), 80 * GB)


def pretend(**changes: object) -> dict[str, Finding]:
    return {finding.name: finding for finding in examine(dataclasses.replace(LAPTOP, **changes))}


def versions(**changes: str | None) -> dict[str, str | None]:
    return {**LAPTOP.versions, **{name.replace("_", "-"): version for name, version in changes.items()}}


def test_a_good_laptop_is_healthy_and_gets_no_advice() -> None:
    findings = examine(LAPTOP)
    assert [finding for finding in findings if finding.ok is not True or finding.advice] == []
    assert healthy(findings)
    assert report(findings).endswith("nothing is missing: ready for the lessons")


# What is wrong with the machine, the finding that must say so, a word of the value, a word of the advice.
MISSING = {
    "old Python": (dict(python=(3, 10, 9)), "Python", "3.10.9", "3.11"),
    "no torch": (dict(versions=versions(torch=None)), "torch", "not installed", "pip install"),
    "old torch": (dict(versions=versions(torch="2.9.1+cu128")), "torch", "2.9.1", "2.13"),
    "broken torch": (dict(broken={"torch": "libcudart.so.13 not found"}), "torch", "libcudart", "pip install"),
    "1 GB": (dict(memory_total=GB, memory_available=GB // 2), "memory", "1.0 GB", "2 GB"),
    "no ipykernel": (dict(versions=versions(ipykernel=None)), "Jupyter kernel", "none", "ipykernel"),
    "no kernelspec": (dict(kernel_python=None), "Jupyter kernel", "none", "ipykernel install"),
    "no ipywidgets": (dict(versions=versions(ipywidgets=None)), "widgets", "ipywidgets not", "pip install"),
    "no lab widgets": (dict(versions=versions(jupyterlab_widgets=None)), "widgets", "jupyterlab-widgets", "pip"),
    "no tiktoken": (dict(versions=versions(tiktoken=None)), "tiktoken", "not installed", "pip install"),
    "old tiktoken": (dict(versions=versions(tiktoken="0.8.9")), "tiktoken", "0.8.9", "0.9"),
    "broken tiktoken": (dict(broken={"tiktoken": "bad ELF"}), "tiktoken", "bad ELF", "pip install"),
    "not installed": (dict(lower_bounds={}), "packages", "itself is not installed", "pip install"),
    "no checkpoint": (dict(shipped={"tokenizer.tiktoken": True, "tiny": False}), "shipped data", "tiny", "make data"),
}


@pytest.mark.parametrize(("changes", "name", "value", "advice"), MISSING.values(), ids=MISSING.keys())
def test_what_the_course_needs_is_missed_by_name(changes: dict, name: str, value: str, advice: str) -> None:
    findings = pretend(**changes)
    assert [finding.name for finding in findings.values() if finding.ok is False] == [name]
    assert value in findings[name].value and advice in findings[name].advice
    assert not healthy(findings.values())
    text = report(list(findings.values()))
    assert text.splitlines()[-1] == f"to mend first: {name}"
    assert findings[name].advice in text


POORER = {
    "busy memory": (dict(memory_available=GB), "memory", "1.0 GB of it free", "close"),
    "full disk": (dict(disk_free=10**8), "disk for runs", "0.1 GB", "room"),
    "too many threads": (dict(threads=16), "threads", "16 of torch on 8 cores", "OMP_NUM_THREADS=8"),
    "one thread": (dict(threads=1), "threads", "1 of torch on 8 cores", "unset"),
    "other kernel": (dict(kernel_python="/usr/bin/python3"), "Jupyter kernel", "/usr/bin/python3", "--sys-prefix"),
    "no JavaScript": (dict(widget_extensions=False), "widgets", "JavaScript", "blank"),
    "unused NVIDIA": (dict(nvidia_driver=True), "GPU", "cannot use it", "CUDA build"),
}


@pytest.mark.parametrize(("changes", "name", "value", "advice"), POORER.values(), ids=POORER.keys())
def test_what_would_run_better_is_advised_and_stays_healthy(changes: dict, name: str, value: str, advice: str) -> None:
    findings = pretend(**changes)
    assert [finding.name for finding in findings.values() if finding.ok is not True] == [name]
    assert findings[name].ok is None and healthy(findings.values())
    assert value in findings[name].value and advice in findings[name].advice


@pytest.mark.parametrize(
    ("gpus", "fp8"),
    [
        ((), "emulated"),
        ((Gpu("T4", (7, 5), 16 * GB),), "does not multiply FP8"),
        ((Gpu("A100", (8, 0), 80 * GB),), "sm_80 does not multiply FP8"),
        ((Gpu("L40S", (8, 9), 48 * GB),), "sm_89 multiplies FP8, but not with the report's scales"),
        ((HOPPER,), "native"),
        ((Gpu("A100", (8, 0), 80 * GB), HOPPER), "native"),
        ((Gpu("B200", (10, 0), 180 * GB),), "sm_100 multiplies FP8, but not with the report's scales"),
        ((Gpu("MI300X", None, 192 * GB),), "emulated"),
    ],
)
def test_fp8_is_native_on_hopper_alone(gpus: tuple[Gpu, ...], fp8: str) -> None:
    findings = pretend(gpus=gpus)
    assert fp8 in findings["FP8"].value
    assert all(gpu.name in findings["GPU"].value and f"{gpu.memory // GB} GB" in findings["GPU"].value for gpu in gpus)
    assert healthy(findings.values())


@pytest.mark.parametrize(
    ("flags", "found"),
    [({"avx512_bf16", "amx_bf16"}, "AMX"), ({"avx512_bf16"}, "vector"), ({"bf16", "neon"}, "vector"), (set(), "slow")],
)
def test_bf16_on_the_cpu(flags: set[str], found: str) -> None:
    assert found in pretend(cpu_flags=frozenset(flags))["BF16 on CPU"].value


def test_versions_compare_as_numbers() -> None:
    newer = pretend(versions=versions(torch="2.13", tiktoken="0.10.0rc1"))
    assert newer["torch"].ok and "tiktoken" not in newer
    assert pretend(versions=versions(torch="2.12.9"))["torch"].ok is False
    assert "einops" not in pretend(lower_bounds={**LAPTOP.lower_bounds, "einops": "0.8.2.0"})


def test_a_report_lines_up() -> None:
    findings = [
        Finding("a", "fine", True),
        Finding("longer", "poor", None, "do this"),
        Finding("b", "gone", False, "x"),
    ]
    assert report(findings).splitlines() == [
        "ok      a       fine",
        "note    longer  poor",
        "                -> do this",
        "MISSING b       gone",
        "                -> x",
        "",
        "to mend first: b",
    ]


# ---- this machine --------------------------------------------------------------------------------------------------


def test_this_machine_is_read_as_other_sources_say() -> None:
    machine = look(ROOT)
    requirements = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert machine.lower_bounds == dict(line.split(">=") for line in requirements)
    assert machine.versions["torch"] == torch.__version__
    assert machine.broken == {}
    assert machine.threads == torch.get_num_threads()
    assert 1 <= machine.cores <= (os.cpu_count() or 1)
    assert 0 < machine.memory_available <= machine.memory_total <= psutil.virtual_memory().total
    assert len(machine.gpus) == torch.cuda.device_count()
    kernel = subprocess.run(
        [machine.kernel_python, "-c", "import sys; print(sys.prefix)"], capture_output=True, text=True
    )
    assert kernel.stdout.strip() == sys.prefix
    named = {finding.name: finding for finding in examine(machine)}
    assert all(named[name].ok for name in ("Python", "torch", "Jupyter kernel", "widgets", "packages"))


def test_a_torch_that_cannot_be_imported_is_described(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)  # import torch now raises ImportError
    machine = look(ROOT)
    assert "torch" in machine.broken and machine.threads is None and machine.gpus == ()
    assert [finding.name for finding in examine(machine) if finding.ok is False][0] == "torch"


@pytest.fixture
def linux(tmp_path: Path) -> Path:
    """The files of a Linux machine with 8,000,000 kB of memory, 5,000,000 kB available."""
    (tmp_path / "proc").mkdir()
    text = "MemTotal:        8000000 kB\nMemFree:         1000000 kB\nMemAvailable:    5000000 kB\n"
    (tmp_path / "proc/meminfo").write_text(text)
    (tmp_path / "sys/fs/cgroup").mkdir(parents=True)
    return tmp_path


def test_memory_of_a_plain_linux(linux: Path) -> None:
    assert probes.memory(linux) == (8_192_000_000, 5_120_000_000)


def test_memory_within_a_containers_limit(linux: Path) -> None:
    (linux / "sys/fs/cgroup/memory.max").write_text("1500000000\n")
    (linux / "sys/fs/cgroup/memory.current").write_text("300000000\n")
    assert probes.memory(linux) == (1_500_000_000, 1_200_000_000)
    (linux / "sys/fs/cgroup/memory.max").write_text("max\n")
    assert probes.memory(linux) == (8_192_000_000, 5_120_000_000)


def test_memory_without_proc(tmp_path: Path) -> None:
    total, available = probes.memory(tmp_path)
    assert available is None
    assert total is None or abs(total - psutil.virtual_memory().total) < 0.01 * total


def test_cores_within_a_containers_quota(linux: Path) -> None:
    quota = linux / "sys/fs/cgroup/cpu.max"
    free = probes.cores(linux)
    affinity = getattr(psutil.Process(), "cpu_affinity", lambda: range(os.cpu_count()))  # not on macOS
    assert free == len(affinity())
    quota.write_text("max 100000\n")
    assert probes.cores(linux) == free
    quota.write_text("100000 100000\n")
    assert probes.cores(linux) == 1
    quota.write_text("50000 100000\n")
    assert probes.cores(linux) == 1
