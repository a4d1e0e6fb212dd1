"""What a machine is, in plain values, and how to read them off the one that this runs on.

`dsv3 doctor` judges these values (doctor.py). Every probe here survives what it looks for being absent: it answers
None or "not there", so that a machine without torch, Jupyter or /proc is described, not crashed on.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import re
import shutil
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dsv3_mini.data.shipped import shipped
from dsv3_mini.errors import DataError

DISTRIBUTION = "dsv3-mini"
TOKENIZER, CHECKPOINT = "tokenizer.tiktoken", "tiny"
WIDGETS = ("ipywidgets", "anywidget", "jupyterlab-widgets")
WIDGET_EXTENSIONS = ("@jupyter-widgets/jupyterlab-manager", "anywidget")
COMPILED = ("torch", "numpy", "tiktoken", "safetensors", "matplotlib")  # installed is not yet importable for these


@dataclass(frozen=True)
class Gpu:
    """A CUDA device: name, memory in bytes, and compute capability (Hopper: (9, 0)); None for other makers' devices."""

    name: str
    capability: tuple[int, int] | None
    memory: int


@dataclass(frozen=True)
class Machine:
    """Plain values read off a machine. Sizes are in bytes; None where the system does not say.

    `lower_bounds` maps each distribution that dsv3-mini requires to the version it asks for (empty if dsv3-mini is
    not installed), `versions` those and the widgets' to what is installed, or None, `broken` those whose import
    fails to the reason. `kernel_python` is the Python that Jupyter's kernel "python3" starts, and
    `widget_extensions` says whether the widgets' JavaScript lies where JupyterLab looks.
    """

    python: tuple[int, ...]
    executable: str = ""
    lower_bounds: Mapping[str, str] = field(default_factory=dict)
    versions: Mapping[str, str | None] = field(default_factory=dict)
    broken: Mapping[str, str] = field(default_factory=dict)
    cores: int = 1
    threads: int | None = None
    memory_total: int | None = None
    memory_available: int | None = None
    disk_free: int | None = None
    gpus: Sequence[Gpu] = ()
    nvidia_driver: bool = False
    cpu_flags: frozenset[str] = frozenset()
    kernel_python: str | None = None
    widget_extensions: bool = False
    shipped: Mapping[str, bool] = field(default_factory=dict)


def look(runs: Path | None = None) -> Machine:
    """Read this machine's values. `runs` is the folder whose disk a training would fill; default: the current one."""
    bounds = _lower_bounds()
    names = dict.fromkeys([*bounds, *WIDGETS, "torch", "ipykernel"])
    versions = {name: _version(name) for name in names}
    broken = {name: why for name in COMPILED if versions.get(name) and (why := _import_error(name))}
    has_torch = versions["torch"] is not None and "torch" not in broken
    total, available = memory()
    return Machine(
        python=tuple(sys.version_info[:3]),
        executable=sys.executable,
        lower_bounds=bounds,
        versions=versions,
        broken=broken,
        cores=cores(),
        threads=_threads() if has_torch else None,
        memory_total=total,
        memory_available=available,
        disk_free=_disk_free(Path.cwd() if runs is None else runs),
        gpus=_gpus() if has_torch else (),
        nvidia_driver=Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") is not None,
        cpu_flags=_cpu_flags() if has_torch else frozenset(),
        kernel_python=_kernel_python(),
        widget_extensions=_widget_extensions(),
        shipped={TOKENIZER: _ships(TOKENIZER), CHECKPOINT: _ships(CHECKPOINT)},
    )


def memory(root: Path = Path("/")) -> tuple[int | None, int | None]:
    """Total and available memory in bytes: Linux's own figures within the container's limit, else what POSIX says."""
    total = available = None
    text = _read(root / "proc/meminfo")
    if text is not None:
        kilobytes = {key: int(value) for key, value in re.findall(r"^(\w+):\s+(\d+) kB", text, re.MULTILINE)}
        total = kilobytes["MemTotal"] * 1024
        available = kilobytes["MemAvailable"] * 1024 if "MemAvailable" in kilobytes else None
    elif hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit, used = _read(root / "sys/fs/cgroup/memory.max"), _read(root / "sys/fs/cgroup/memory.current")
    if limit is not None and limit.strip().isdigit() and total is not None:
        total = min(total, int(limit))
        room = total - int(used or 0)
        available = room if available is None else min(available, room)
    return total, available


def cores(root: Path = Path("/")) -> int:
    """Cores that this process may use: the machine's, less what affinity or the container's quota takes away."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = (_read(root / "sys/fs/cgroup/cpu.max") or "").split()
    if len(quota) == 2 and quota[0].isdigit():
        count = min(count, max(1, int(quota[0]) // int(quota[1])))
    return count


def _lower_bounds() -> dict[str, str]:
    """What pyproject.toml requires, as the installed metadata repeats it: name -> lowest version; extras left out."""
    try:
        lines = importlib.metadata.requires(DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        return {}
    found = (re.fullmatch(r"([\w.-]+)\s*>=\s*([\d.]+)", line) for line in lines)
    return {match[1].lower(): match[2] for match in found if match}


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _import_error(name: str) -> str | None:
    try:
        importlib.import_module(name)
    except Exception as error:  # a broken library raises anything: OSError, ImportError, AttributeError, ...
        return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return None


def _threads() -> int:
    import torch

    return torch.get_num_threads()


def _gpus() -> tuple[Gpu, ...]:
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of a driver it cannot use: the report says that better
        if not torch.cuda.is_available():
            return ()
        devices = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    is_cuda = torch.version.cuda is not None  # ROCm answers here too, with capabilities that mean something else
    return tuple(Gpu(d.name, (d.major, d.minor) if is_cuda else None, d.total_memory) for d in devices)


def _cpu_flags() -> frozenset[str]:
    import torch

    return frozenset(name for name, value in torch.cpu.get_capabilities().items() if value is True)


def _kernel_python() -> str | None:
    try:
        from jupyter_client.kernelspec import KernelSpecManager

        command = KernelSpecManager().get_kernel_spec("python3").argv[0]
    except Exception:  # no jupyter_client, no such kernel, an unreadable kernel.json: all mean no kernel
        return None
    # Jupyter itself reads a bare "python" as the Python that it runs under.
    return command if Path(command).is_absolute() else sys.executable


def _widget_extensions() -> bool:
    try:
        from jupyter_core.paths import jupyter_path

        folders = [Path(folder) for folder in jupyter_path("labextensions")]
    except Exception:
        return False
    return all(any((folder / name).is_dir() for folder in folders) for name in WIDGET_EXTENSIONS)


def _ships(name: str) -> bool:
    try:
        path = shipped(name)
    except DataError:
        return False
    return path.is_file() or ((path / "config.json").is_file() and any(path.glob("*.safetensors")))


def _disk_free(folder: Path) -> int | None:
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return None


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return None
