"""What this machine has for the course, and what to do about what is missing: `dsv3 doctor`.

`machine.look` asks the machine and returns plain values, `examine` judges those values and asks nothing, `report`
writes the judgement down: so a test can pretend to be any machine.

    ok = True     there, and fine
    ok = None     the course runs all the same; the advice says how it would run better
    ok = False    the course needs it
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dsv3_mini.machine import WIDGETS, Machine, look

GB = 1e9
MEMORY_FOR_LESSONS = 2 * GB
DISK_FOR_RUNS = 1 * GB
PYTHON_AT_LEAST = (3, 11)
TORCH_AT_LEAST = "2.13"
REINSTALL = "run `pip install -c constraints.txt -e .` in the course's folder (`make lab` does it too)"


@dataclass(frozen=True)
class Finding:
    """One thing looked at: its name, what was found, whether that will do, and what to do if not."""

    name: str
    value: str
    ok: bool | None
    advice: str | None = None


# ---- judging -----------------------------------------------------------------------------------------------------


def examine(machine: Machine | None = None) -> list[Finding]:
    """Judge a machine, by default this one."""
    m = look() if machine is None else machine
    return [
        _python(m),
        _torch(m),
        _threads(m),
        _memory(m),
        _disk(m),
        _gpu(m),
        _fp8(m),
        _bf16(m),
        _kernel(m),
        _widgets(m),
        *_packages(m),
        _shipped(m),
    ]


def healthy(findings: Iterable[Finding]) -> bool:
    """Whether nothing that the course needs is missing."""
    return all(finding.ok is not False for finding in findings)


def report(findings: Sequence[Finding]) -> str:
    """The findings as a table, one a line, with the advice below, and a verdict on the last line."""
    width = max((len(finding.name) for finding in findings), default=0)
    marks = {True: "ok", None: "note", False: "MISSING"}
    lines = []
    for finding in findings:
        lines.append(f"{marks[finding.ok]:<8}{finding.name:<{width}}  {finding.value}")
        if finding.advice:
            lines.append(f"{'':<8}{'':<{width}}  -> {finding.advice}")
    missing = [finding.name for finding in findings if finding.ok is False]
    verdict = f"to mend first: {', '.join(missing)}" if missing else "nothing is missing: ready for the lessons"
    return "\n".join([*lines, "", verdict])


def _python(m: Machine) -> Finding:
    version = ".".join(map(str, m.python[:3]))
    if m.python[:2] >= PYTHON_AT_LEAST:
        return Finding("Python", version, True)
    return Finding("Python", version, False, "the course needs 3.11 or newer: `make lab PYTHON=python3.12`, say")


def _torch(m: Machine) -> Finding:
    bounds = {"torch": TORCH_AT_LEAST, **m.lower_bounds}
    return _package(dataclasses.replace(m, lower_bounds=bounds), "torch")


def _threads(m: Machine) -> Finding:
    if m.threads is None:
        return Finding("threads", f"unknown; {_count(m.cores, 'core')}", None)
    value = f"{m.threads} of torch on {_count(m.cores, 'core')}"
    if m.threads > m.cores:
        return Finding("threads", value, None, f"they will wait for each other: set OMP_NUM_THREADS={m.cores}")
    if m.threads == 1 < m.cores:
        return Finding("threads", value, None, "one core works, the rest sleeps: unset OMP_NUM_THREADS")
    return Finding("threads", value, True)


def _memory(m: Machine) -> Finding:
    if m.memory_total is None:
        return Finding("memory", "unknown", None)
    value = f"{m.memory_total / GB:.1f} GB"
    if m.memory_available is not None:
        value += f", {m.memory_available / GB:.1f} GB of it free"
    if m.memory_total < MEMORY_FOR_LESSONS:
        return Finding("memory", value, False, "the lessons need 2 GB: give the machine or its container more")
    if m.memory_available is not None and m.memory_available < MEMORY_FOR_LESSONS:
        return Finding("memory", value, None, "the lessons need 2 GB: close other programs and kernels first")
    return Finding("memory", value, True)


def _disk(m: Machine) -> Finding:
    if m.disk_free is None:
        return Finding("disk for runs", "unknown", None)
    value = f"{m.disk_free / GB:.1f} GB free"
    if m.disk_free < DISK_FOR_RUNS:
        return Finding("disk for runs", value, None, "a training run and its checkpoints want 1 GB: make room first")
    return Finding("disk for runs", value, True)


def _gpu(m: Machine) -> Finding:
    if m.gpus:
        listed = [f"{gpu.name} ({_sm(gpu.capability)}, {gpu.memory / GB:.0f} GB)" for gpu in m.gpus]
        return Finding("GPU", ", ".join(listed), True)
    if m.nvidia_driver:
        advice = "install the CUDA build of torch: see `Get Started` on PyTorch's site for this driver"
        return Finding("GPU", "NVIDIA, but this torch cannot use it", None, advice)
    return Finding("GPU", "none: every lesson runs on the CPU", True)


def _fp8(m: Machine) -> Finding:
    """Report section 3.3 scales tiles of 1x128 and blocks of 128x128; torch's GEMM takes these scales on sm_90 only."""
    if not m.gpus:
        return Finding("FP8", "emulated: rounded to FP8, multiplied in FP32", True)
    best = max((gpu.capability for gpu in m.gpus if gpu.capability is not None), default=None)
    if best is not None and best[0] == 9:
        return Finding("FP8", "native: Hopper's tensor cores, scaled by tiles and blocks", True)
    has_cores = best is not None and best >= (8, 9)
    why = "multiplies FP8, but not with the report's scales" if has_cores else "does not multiply FP8"
    return Finding("FP8", f"emulated: a GPU of {_sm(best)} {why}", True)


def _bf16(m: Machine) -> Finding:
    if "amx_bf16" in m.cpu_flags:
        return Finding("BF16 on CPU", "native: AMX tiles", True)
    if m.cpu_flags & {"avx512_bf16", "avx10_1", "bf16"}:
        return Finding("BF16 on CPU", "native: vector instructions", True)
    return Finding("BF16 on CPU", "emulated and slow: FP32 is faster here", True)


def _kernel(m: Machine) -> Finding:
    if m.versions.get("ipykernel") is None or m.kernel_python is None:
        advice = f"{REINSTALL}; for a JupyterLab from elsewhere: `python -m ipykernel install --user --name dsv3-mini`"
        return Finding("Jupyter kernel", "none for this Python", False, advice)
    if _same_place(m.kernel_python, m.executable):
        return Finding("Jupyter kernel", f"ipykernel {m.versions['ipykernel']}", True)
    advice = "notebooks would not see this environment: `python -m ipykernel install --sys-prefix`"
    return Finding("Jupyter kernel", f"starts {m.kernel_python}", None, advice)


def _widgets(m: Machine) -> Finding:
    missing = [name for name in WIDGETS if m.versions.get(name) is None]
    if missing:
        return Finding("widgets", f"{', '.join(missing)} not installed", False, REINSTALL)
    value = ", ".join(f"{name} {m.versions[name]}" for name in WIDGETS)
    if not m.widget_extensions:
        advice = "sliders would stay blank: `pip install --force-reinstall --no-deps jupyterlab-widgets anywidget`"
        return Finding("widgets", f"{value}; JupyterLab does not find their JavaScript", None, advice)
    return Finding("widgets", value, True)


def _packages(m: Machine) -> list[Finding]:
    """One finding for all required packages that are fine, and one for each that is not."""
    if not m.lower_bounds:
        return [Finding("packages", "dsv3-mini itself is not installed", False, REINSTALL)]
    fine, poor = [], []
    for name in (name for name in m.lower_bounds if name not in ("torch", "ipykernel", *WIDGETS)):
        found = _package(m, name)
        (fine if found.ok else poor).append(found)
    together = ", ".join(f"{found.name} {found.value}" for found in fine)
    return ([Finding("packages", together, True)] if fine else []) + poor


def _package(m: Machine, name: str) -> Finding:
    """Whether a required package is installed, new enough, and can be imported."""
    version, bound = m.versions.get(name), m.lower_bounds[name]
    if version is None:
        return Finding(name, "not installed", False, REINSTALL)
    if _release(version) < _release(bound):
        return Finding(name, version, False, f"the course needs {bound} or newer: {REINSTALL}")
    if name in m.broken:
        return Finding(name, f"{version}, but its import fails: {m.broken[name]}", False, REINSTALL)
    return Finding(name, version, True)


def _shipped(m: Machine) -> Finding:
    missing = [name for name, there in m.shipped.items() if not there]
    if missing:
        advice = "take data/ from the repository again, or rebuild texts and tokenizer with `make data`"
        return Finding("shipped data", f"{', '.join(missing)} not found", False, advice)
    return Finding("shipped data", ", ".join(m.shipped), True)


def _release(version: str) -> tuple[int, ...]:
    """The leading numbers of a version, for comparing: "2.13.0+cpu" -> (2, 13), so that "2.13" is not newer."""
    numbers = [int(part) for part in re.match(r"\d+(?:\.\d+)*", version)[0].split(".")]
    while len(numbers) > 1 and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)


def _sm(capability: tuple[int, int] | None) -> str:
    return "another maker" if capability is None else f"sm_{capability[0]}{capability[1]}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


def _same_place(python: str, other: str) -> bool:
    """Whether two interpreters belong to one environment: python and python3 of a venv are two links in one folder."""
    return Path(python).parent == Path(other).parent
