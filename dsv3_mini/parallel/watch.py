"""Watch: when one process fails, every other one says which, and ends.

A process that is killed says nothing. Those that wait for it in an exchange learn at best that some connection was closed
(gloo), at worst nothing for half an hour (NCCL). So the processes stand in a ring, each with a connection to the next one on
which nothing is ever sent. The system closes it when that process dies, however it dies; where a whole machine is lost,
the system's own probes find no answer. Who sees it writes it into the store in which all have met, and there all look.

    process 2 is killed  ->  process 1: its connection ends  ->  store: "process 2 was lost"  ->  all others say so and end

A process that fails by an error of its own writes that into the store itself. What stands there first is the cause.

Nothing here takes a share in the work: a thread that sleeps, so that a process which is busy for minutes is not mistaken for
a dead one. Simplification: one that is alive and does nothing is only found when an exchange times out.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable

import torch
import torch.distributed as dist

from dsv3_mini.errors import UserError

BEAT = 0.5  # seconds between two looks
SETTLE = 5.0  # seconds for a verdict to come, after an error that may be another's
GRACE = 5.0  # seconds for a process to end by itself, when another has failed
FAILED = "failed"


class Watch:
    """This process's part of the ring.

    Args:
        store: where the processes have met; no other life of the run may use it.
        patience: seconds after which a machine that does not answer is lost.
        end: called in the watching thread, with the cause, if the process has not ended by itself `GRACE` seconds after the
            failure of another: it waits in an exchange that will never be.
    """

    def __init__(self, store: dist.Store, rank: int, count: int, patience: float, end: Callable[[str], None]) -> None:
        self.rank, self.patience, self.end = rank, patience, end
        self.next = (rank + 1) % count
        self.cause: str | None = None
        self._known, self._left = threading.Event(), threading.Event()
        self._store, own_store = store, store.clone()  # a client is for one thread at a time
        # Connections wait here to be accepted and never are: the system holds them, and ends them with the process.
        self._listener = socket.create_server(("", 0), backlog=16)
        store.set(f"place/{rank}", f"{own_host()} {self._listener.getsockname()[1]}")
        self._thread = threading.Thread(target=self._look, args=(own_store,), name="watch", daemon=True)
        self._thread.start()

    def leave(self) -> None:
        """A good end, of which nobody shall think ill."""
        self._left.set()
        self._thread.join()
        self._store.set(f"left/{self.rank}", "")
        self._listener.close()

    def cause_of(self, error: BaseException) -> str | None:
        """Whose failure an error of this process follows from; None if it is its own, of which the others are then told."""
        if not isinstance(error, (UserError, MemoryError, torch.OutOfMemoryError)):
            self._known.wait(SETTLE)
        first_line = (str(error).splitlines() or [""])[0]
        own = f"process {self.rank} failed ({type(error).__name__}: {first_line[:300]})"
        cause = self._tell(self._store, own)
        return None if cause == own else cause

    # ---- the thread ------------------------------------------------------------------------------------------------

    def _look(self, store: dist.Store) -> None:
        ahead: socket.socket | None = None
        while not self._left.wait(BEAT):
            try:
                if store.check([FAILED]):
                    self.cause = store.get(FAILED).decode()
                elif ahead is None and store.check([f"place/{self.next}"]):
                    ahead = self._connect(store.get(f"place/{self.next}").decode())
                elif ahead is not None and ended(ahead) and not store.check([f"left/{self.next}"]):
                    self.cause = self._tell(
                        store, self._lost("killed, for want of memory it may be, or its machine is gone")
                    )
            except dist.DistError:
                self.cause = "the store in which the processes met was lost (its machine, or the torchrun that held it)"
            if self.cause:
                self._known.set()
                if not self._left.wait(GRACE):
                    self.end(self.cause)
                return

    def _connect(self, place: str) -> socket.socket | None:
        host, _, port = place.partition(" ")
        try:
            ahead = socket.create_connection((host, int(port)), timeout=self.patience)
        except OSError as error:
            self.cause = self._lost(f"it does not answer at {host}, port {port}: {error.strerror or error}")
            return None
        ahead.setblocking(False)
        ahead.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        probe = max(1, round(self.patience / 4))
        for option, value in (("TCP_KEEPIDLE", probe), ("TCP_KEEPINTVL", probe), ("TCP_KEEPCNT", 3)):
            if hasattr(socket, option):  # not every system has all of them
                ahead.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
        return ahead

    def _lost(self, how: str) -> str:
        return f"process {self.next} was lost ({how})"

    def _tell(self, store: dist.Store, cause: str) -> str:
        """Write a cause, unless one stands there; what stands there then. Where the store is gone: the cause."""
        try:
            return store.compare_set(FAILED, "", cause).decode()
        except dist.DistError:
            return self.cause or cause


def ended(connection: socket.socket) -> bool:
    """Whether the other side is gone. It never sends anything."""
    try:
        return connection.recv(1) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True


def own_host() -> str:
    """A name by which the others reach this machine: the one that they know, where the store is, else what the store sees."""
    there = os.environ["MASTER_ADDR"]
    if os.environ.get("GROUP_RANK", "0") == "0":
        return there
    family, kind, protocol, _, address = socket.getaddrinfo(there, os.environ["MASTER_PORT"], type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(address)  # sends nothing, but chooses the way
        return probe.getsockname()[0]
