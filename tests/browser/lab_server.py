"""JupyterLab for a test session: on a free port, with its own token, and settings that no home folder changes."""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

LESSONS = Path(__file__).resolve().parents[2] / "lessons"
SETTINGS: dict[str, dict[str, Any]] = {
    # Every output is in the page, whether on the screen or not.
    "@jupyterlab/notebook-extension/tracker": {"windowingMode": "none"},
    "@jupyterlab/apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
    "@jupyterlab/docmanager-extension/plugin": {"autosave": False},
}
# What a person's shell would not have: pytest's choices, and a Jupyter of another place.
NOT_A_READERS = ("JUPYTER", "JPY_", "PYTEST", "MPLBACKEND")


class JupyterLab:
    """Runs JupyterLab on `root`; `work` is an empty folder for its settings, runtime files and log."""

    def __init__(self, root: Path, work: Path, patience: float = 120) -> None:
        self.root, self.log = root, work / "jupyterlab.log"
        self.token = secrets.token_hex(16)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.address = f"http://127.0.0.1:{free.getsockname()[1]}"
        env = {name: value for name, value in os.environ.items() if not name.startswith(NOT_A_READERS)}
        folders = dict(
            JUPYTER_CONFIG_DIR="config",
            JUPYTER_DATA_DIR="data",
            JUPYTER_RUNTIME_DIR="runtime",
            JUPYTERLAB_SETTINGS_DIR="settings",
            JUPYTERLAB_WORKSPACES_DIR="workspaces",
            IPYTHONDIR="ipython",
        )
        for name, folder in folders.items():
            (work / folder).mkdir()
            env[name] = str(work / folder)
        for plugin, values in SETTINGS.items():
            file = work / "settings" / f"{plugin}.jupyterlab-settings"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(values))
        # The kernel is this very Python.
        env["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), env.get("PATH", "")])
        env |= {"JUPYTER_PREFER_ENV_PATH": "1", "JUPYTER_TOKEN": self.token}
        command = [
            *(sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ServerApp.ip=127.0.0.1"),
            *(f"--ServerApp.port={self.address.rpartition(':')[2]}", "--ServerApp.port_retries=0"),
            *(f"--ServerApp.root_dir={root}", "--LabApp.expose_app_in_browser=True"),
            "--LabApp.extension_manager=readonly",  # the other manager asks PyPI
        ]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command, env=env, cwd=root, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        try:
            self._wait(patience)
        except BaseException:
            self.close()
            raise

    def url(self, notebook: str) -> str:
        """A notebook as `make lab` shows it, in a workspace of its own."""
        path = urllib.parse.quote(notebook)
        return f"{self.address}/lab/workspaces/{secrets.token_hex(4)}/tree/{path}?token={self.token}"

    def stop_kernels(self) -> None:
        for kernel in self._ask("GET", "/api/kernels"):
            self._ask("DELETE", f"/api/kernels/{kernel['id']}")

    def close(self) -> None:
        self.process.send_signal(signal.SIGTERM)  # stops the kernels too
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def _wait(self, patience: float) -> None:
        end = time.monotonic() + patience
        while time.monotonic() < end and self.process.poll() is None:
            try:
                self._ask("GET", "/api/status")
                return
            except OSError:
                time.sleep(0.2)
        raise RuntimeError(f"JupyterLab did not start within {patience:.0f} s:\n{self.log.read_text()[-3000:]}")

    def _ask(self, method: str, path: str) -> Any:
        header = {"Authorization": f"token {self.token}"}
        request = urllib.request.Request(self.address + path, method=method, headers=header)
        # No proxy between this machine and itself.
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=15) as answer:
            body = answer.read()
        return json.loads(body) if body else None
