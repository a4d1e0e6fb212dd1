"""The package as it is installed, built and started: lists that agree, a wheel that holds all, commands that work."""

from __future__ import annotations

import ast
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from dsv3_mini.data.shipped import find, shipped, shipped_root
from dsv3_mini.errors import DataError

ROOT = Path(__file__).resolve().parents[1]
CONDA_NAMES = {"pytorch": "torch", "matplotlib-base": "matplotlib", "playwright-python": "playwright"}
# What torch needs for a GPU: it names the exact versions itself, and a CPU build has none of them.
GPU_PARTS = ("nvidia-", "cuda-", "triton")
DISTRIBUTIONS = importlib.metadata.packages_distributions()
# Allowed to be absent: the opponent of `dsv3 bench`, the Jupyter that `dsv3 doctor` looks for, what multiplies FP8 on a GPU.
OPTIONAL = {
    "bench": {"transformers"},
    "machine.py": {"jupyter-client", "jupyter-core"},
    "fp8": {"triton", "deep-gemm"},
}


@pytest.fixture(scope="module")
def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def direct(project: dict) -> dict[str, Requirement]:
    """Every package that pyproject.toml names, for the package and for its tests."""
    lines = project["dependencies"] + project["optional-dependencies"]["test"]
    return {canonicalize_name(Requirement(line).name): Requirement(line) for line in lines}


@pytest.fixture(scope="module")
def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    assert all(len(pair) == 2 for pair in pairs)
    assert len({canonicalize_name(name) for name, _ in pairs}) == len(pairs), "a package is pinned twice"
    return {canonicalize_name(name): version for name, version in pairs}


# ---- the three lists -----------------------------------------------------------------------------------------------


def test_constraints_satisfy_what_pyproject_asks_for(direct: dict[str, Requirement], pins: dict[str, str]) -> None:
    assert [name for name, need in direct.items() if name not in pins or pins[name] not in need.specifier] == []
    assert [pin for pin in pins.values() if Version(pin).local] == [], (
        "a build such as +cpu exists on some machines only"
    )


def test_constraints_are_what_is_installed_and_no_more(pins: dict[str, str]) -> None:
    installed = {name: Version(importlib.metadata.version(name)).public for name in _closure("dsv3-mini", ("test",))}
    installed.pop("dsv3-mini")
    assert {name: (found, pins.get(name)) for name, found in installed.items() if found != pins.get(name)} == {}
    if sys.platform == "linux" and sys.version_info[:2] == (3, 11):  # elsewhere some are not needed
        assert sorted(pins) == sorted(installed)


def test_conda_environment_is_the_same_set(direct: dict[str, Requirement], pins: dict[str, str]) -> None:
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    assert environment["name"] == "dsv3-mini" and environment["channels"][0] == "conda-forge"
    listed = [line for line in environment["dependencies"] if isinstance(line, str)]
    versions = dict(line.split("=") for line in listed if line != "pip")
    python = versions.pop("python")
    assert {CONDA_NAMES.get(name, name): version for name, version in versions.items()} == {n: pins[n] for n in direct}
    assert python in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    assert [line for line in environment["dependencies"] if isinstance(line, dict)] == [{"pip": ["-e ."]}]


def test_every_package_that_the_code_imports_is_asked_for(project: dict) -> None:
    """Without this an import may stand on what another package happens to bring."""
    core = {canonicalize_name(Requirement(line).name) for line in project["dependencies"]}
    for path in (ROOT / "dsv3_mini").rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        modules = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        modules |= {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.level == 0}
        roots = {module.partition(".")[0] for module in modules} - set(sys.stdlib_module_names) - {"dsv3_mini"}
        brought_by = {root: {canonicalize_name(name) for name in DISTRIBUTIONS.get(root, [root])} for root in roots}
        allowed = core | OPTIONAL.get(path.relative_to(ROOT / "dsv3_mini").parts[0], set())
        assert {root: names for root, names in brought_by.items() if not names & allowed} == {}, path


@pytest.mark.parametrize("name", ["pyproject.toml", "constraints.txt", "environment.yml", "Makefile", ".ci/run"])
def test_no_file_names_a_host(name: str) -> None:
    assert re.findall(r"https?://\S+|--(?:extra-)?index-url|--find-links", (ROOT / name).read_text()) == []


def _closure(name: str, extras: tuple[str, ...]) -> set[str]:
    """Every distribution that `name[extras]` brings here, by the installed metadata; what torch needs for a GPU left out."""
    seen: set[tuple[str, str]] = set()

    def visit(name: str, extras: tuple[str, ...]) -> None:
        for extra in ("", *extras):
            if (name, extra) in seen:
                continue
            seen.add((name, extra))
            for need in map(Requirement, importlib.metadata.requires(name) or []):
                wanted = need.marker is None or need.marker.evaluate({"extra": extra})
                if wanted and not need.name.startswith(GPU_PARTS):
                    visit(canonicalize_name(need.name), tuple(need.extras))

    visit(name, extras)
    return {name for name, _ in seen}


# ---- the wheel -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (path,) = folder.glob("*.whl")
    return path


def test_wheel_carries_package_data_and_lessons_and_nothing_else(wheel: Path) -> None:
    files = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    expected = {str(path.relative_to(ROOT)) for path in _files("dsv3_mini")}
    expected |= {f"dsv3_mini/_shipped/{path.relative_to(ROOT / 'data')}" for path in _files("data")}
    expected |= {f"dsv3_mini/_shipped/{path.relative_to(ROOT)}" for path in _files("lessons")}
    assert files == expected


def test_wheel_says_what_it_is(wheel: Path, project: dict) -> None:
    archive = zipfile.ZipFile(wheel)
    info = f"dsv3_mini-{project['version']}.dist-info"
    assert "dsv3 = dsv3_mini.cli:main" in archive.read(f"{info}/entry_points.txt").decode()
    assert "The dsv3_mini authors" in archive.read(f"{info}/licenses/LICENSE").decode()
    assert "Requires-Python: >=3.11" in archive.read(f"{info}/METADATA").decode()


def test_an_installed_wheel_finds_its_own_data(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import dsv3_mini.data.shipped as s; "
        "print(s.__file__); print(s.shipped()); print(s.shipped('tokenizer.tiktoken').read_bytes() == open(sys.argv[2], 'rb').read())"
    )
    command = [sys.executable, "-I", "-c", code, str(tmp_path), str(shipped("tokenizer.tiktoken"))]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    package = tmp_path / "dsv3_mini"
    assert done.stdout.splitlines() == [str(package / "data/shipped.py"), str(package / "_shipped"), "True"], (
        done.stderr
    )


def _files(folder: str) -> Iterator[Path]:
    ignored = {"__pycache__", ".ipynb_checkpoints"}
    return (p for p in (ROOT / folder).rglob("*") if p.is_file() and not ignored & set(p.parts))


def test_shipped_looks_into_the_wheel_first(tmp_path: Path) -> None:
    package = tmp_path / "dsv3_mini"
    (package / "_shipped").mkdir(parents=True)
    (tmp_path / "data").mkdir()
    assert shipped_root(package) == package / "_shipped"
    (package / "_shipped").rmdir()
    assert shipped_root(package) == tmp_path / "data"
    assert shipped() == ROOT / "data"


@pytest.mark.parametrize("name", ["../LICENSE", "tiny/../../LICENSE", "/etc/hosts", "no_such_file.json"])
def test_shipped_stays_inside_and_says_what_is_missing(name: str, tmp_path: Path) -> None:
    (tmp_path / "data/tiny").mkdir(parents=True)
    (tmp_path / "LICENSE").touch()
    with pytest.raises(DataError, match=re.escape(repr(name))) as error:
        find(name, tmp_path / "data")
    assert "\n" not in str(error.value)


# ---- the commands --------------------------------------------------------------------------------------------------

FAKE_PYTHON = r"""#!/bin/sh
# A Python that makes an environment of itself and writes down what it was asked.
echo "$*" >> "$LOG"
case "$*" in
    "--version") echo "Python $FAKE_VERSION" ;;
    *"sys.version_info"*) [ "$FAKE_VERSION" != 3.9.2 ] ;;
    *"ensurepip"*) [ -z "$NO_VENV" ] ;;
    "-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
esac
"""


class Checkout:
    """A folder with the Makefile and what its environment depends on, and a `python3` that only takes notes."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.tools, self.log = folder / "checkout", folder / "tools", folder / "log"
        self.folder.mkdir()
        self.tools.mkdir()
        for name in ("Makefile", "pyproject.toml", "constraints.txt"):
            shutil.copy(ROOT / name, self.folder)
        self.tool("python3", FAKE_PYTHON)

    def tool(self, name: str, text: str) -> None:
        (self.tools / name).write_text(text)
        (self.tools / name).chmod(0o755)

    def make(self, *arguments: str, **env: str) -> subprocess.CompletedProcess:
        self.log.write_text("")
        path = f"{self.tools}{os.pathsep}{os.environ['PATH']}"
        env = {"PATH": path, "LOG": str(self.log), "FAKE_VERSION": "3.11.7", "NO_VENV": "", **env}
        return subprocess.run(["make", *arguments], cwd=self.folder, env=env, capture_output=True, text=True)

    def asked(self) -> str:
        return self.log.read_text()


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


def test_make_alone_lists_every_target(checkout: Checkout) -> None:
    listed = [line.split()[1] for line in checkout.make().stdout.splitlines()]
    tests = ["test", "test-browser", "test-gpu"]
    assert sorted(listed) == ["check-notebooks", "clean", "data", "help", "lab", "notebooks", *tests]
    assert checkout.asked() == ""


def test_the_first_make_installs_and_the_second_does_not(checkout: Checkout) -> None:
    assert checkout.make("test").returncode == 0
    assert "-m venv .venv" in checkout.asked() and "-c constraints.txt -e .[test]" in checkout.asked()
    checkout.make("test")
    assert "pip" not in checkout.asked() and "venv" not in checkout.asked()
    assert [line.split()[1] for line in checkout.asked().splitlines()] == ["ruff", "ruff", "pytest"]


@pytest.mark.parametrize("target", ["test", "test-gpu"])
def test_triton_is_installed_for_tests_and_not_for_lessons(checkout: Checkout, target: str) -> None:
    (checkout.folder / "lessons").mkdir()
    assert checkout.make("lab").returncode == 0
    assert "-e .[test]" in checkout.asked() and "kernels" not in checkout.asked()
    assert checkout.make(target).returncode == 0
    assert "-c constraints.txt -e .[test,kernels]" in checkout.asked()
    checkout.make(target)
    assert "pip" not in checkout.asked()


def test_kernels_ask_for_what_their_own_reason_names(project: dict) -> None:
    """And for no exact version: torch for CUDA has its own."""
    (line,) = project["optional-dependencies"]["kernels"]
    need = Requirement(line)
    assert need.name == "triton" and {clause.operator for clause in need.specifier} == {">="}
    assert f"pip install '{need.name}{need.specifier}'" in (ROOT / "environment.yml").read_text()


@pytest.mark.parametrize("name", ["pyproject.toml", "constraints.txt"])
def test_a_changed_list_installs_again(checkout: Checkout, name: str) -> None:
    checkout.make(".venv/.ready")
    stamp = (checkout.folder / ".venv/.ready").stat().st_mtime
    os.utime(checkout.folder / name, (stamp + 10, stamp + 10))
    checkout.make(".venv/.ready")
    assert "pip install" in checkout.asked()


def test_a_moved_folder_installs_again(checkout: Checkout) -> None:
    checkout.make(".venv/.ready")
    checkout.folder = checkout.folder.rename(checkout.folder.with_name("elsewhere"))
    checkout.make(".venv/.ready")
    assert "pip install" in checkout.asked()
    checkout.make(".venv/.ready")
    assert checkout.asked() == ""


def test_a_failed_install_is_not_taken_for_a_finished_one(checkout: Checkout) -> None:
    checkout.tool("python3", FAKE_PYTHON.replace('case "$*" in', 'case "$*" in\n    *"pip install"*) exit 1 ;;'))
    assert checkout.make("test").returncode != 0
    assert not (checkout.folder / ".venv/.ready").exists()


@pytest.mark.parametrize(
    ("arguments", "env", "said"),
    [
        (["lab"], {"FAKE_VERSION": "3.9.2"}, "'python3' is Python 3.9.2, the course needs 3.11 or newer"),
        (["lab"], {"NO_VENV": "yes"}, "'python3' has no venv: install it"),
        (["lab", "PYTHON=no-such-python"], {}, "there is no 'no-such-python' here"),
    ],
)
def test_an_unfit_python_gets_one_clear_line(checkout: Checkout, arguments: list, env: dict, said: str) -> None:
    done = checkout.make(*arguments, **env)
    assert done.returncode != 0
    assert said in done.stderr.splitlines()[0]
    assert not (checkout.folder / ".venv").exists()


@pytest.mark.parametrize(
    ("have", "apt", "installs"),
    [
        (("chromium", "chromedriver"), 0, None),
        (("google-chrome", "chromedriver"), 0, None),
        ((), 0, ["chromium", "chromium-driver", "fonts-liberation"]),
        ((), 100, ["chromium", "chromium-driver", "fonts-liberation"]),  # apt-get fails: the tests run all the same
        (("chromium",), 0, ["chromium-driver"]),
    ],
)
def test_ci_installs_what_is_missing_and_ends_as_make_test_does(
    checkout: Checkout, have: tuple[str, ...], apt: int, installs: list[str] | None
) -> None:
    (checkout.folder / ".ci").mkdir()
    shutil.copy(ROOT / ".ci/run", checkout.folder / ".ci/run")
    for name in ("bash", "dirname", "cat"):
        (checkout.tools / name).symlink_to(shutil.which(name))
    for name in have:
        checkout.tool(name, "#!/bin/sh\n")
    checkout.tool("id", "#!/bin/sh\necho 0\n")
    checkout.tool("apt-get", f'#!/bin/sh\necho "apt-get $*" >> "$LOG"\nexit {apt}\n')
    checkout.tool("make", '#!/bin/sh\ncat\necho "make $* in $PWD" >> "$LOG"\necho "3 passed in 1s"\nexit 7\n')
    env = {"PATH": str(checkout.tools), "LOG": str(checkout.log), "NO_VENV": ""}
    command = [str(checkout.tools / "bash"), str(checkout.folder / ".ci/run")]
    done = subprocess.run(command, env=env, input="typed text", capture_output=True, text=True, cwd=ROOT)
    asked = checkout.asked()
    assert done.returncode == 7 and done.stdout.endswith("3 passed in 1s\n") and "typed text" not in done.stdout
    assert asked.endswith(f"make test in {checkout.folder}\n")
    wanted = [line.split()[2:] for line in asked.splitlines() if line.startswith("apt-get install")]
    assert [sorted(word for word in words if not word.startswith("-")) for words in wanted] == (
        [installs] if installs and apt == 0 else []
    )
    assert ("apt-get update" in asked) == (installs is not None)
    assert ("could not install" in done.stdout) == (apt != 0)


def test_ci_run_is_executable() -> None:
    assert os.access(ROOT / ".ci/run", os.X_OK)


# ---- what conftest.py promises ---------------------------------------------------------------------------------------


def test_a_test_that_asks_the_network_fails(no_network: list[str]) -> None:
    import socket

    for ask in (
        lambda: socket.create_connection(("192.0.2.1", 80), timeout=1),
        lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).connect(("192.0.2.1", 53)),
        lambda: socket.getaddrinfo("example.org", 443),
    ):
        with pytest.raises(pytest.fail.Exception, match="offline"):
            ask()
    assert no_network == ["192.0.2.1", "192.0.2.1", "example.org"]
    no_network.clear()


def test_this_machine_may_be_asked(no_network: list[str]) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        socket.create_connection(("localhost", server.getsockname()[1]), timeout=5).close()
    assert no_network == []
