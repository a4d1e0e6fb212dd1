"""What Python refuses to a notebook that is being graded, in words: an audit hook, which cannot be taken off again.

Refused: to change, make, move or delete a file outside the notebook's own folder; to reach another machine; to start
a program; to signal a process that is not its own; to raise its own limits; to multiply without end. Compiled code
that does these things by itself is not seen here (`lockdown` is for that).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

try:
    import fcntl
except ImportError:  # Windows, which has no descriptors of folders either
    fcntl = None

MOST_FORKS = 16
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
# Event -> what it does, and where its path (and the folder's descriptor that the path is relative to) stand in its arguments.
CHANGES: dict[str, tuple[str, tuple[tuple[int, int | None], ...]]] = {
    "os.remove": ("delete", ((0, 1),)),
    "os.rmdir": ("delete", ((0, 1),)),
    "shutil.rmtree": ("delete", ((0, 1),)),
    "os.rename": ("move", ((0, 2), (1, 3))),
    "os.link": ("link", ((0, 2), (1, 3))),
    "os.symlink": ("link", ((1, 2),)),
    "os.mkdir": ("make", ((0, 2),)),
    "os.chmod": ("change", ((0, 2),)),
    "os.chown": ("change", ((0, 3),)),
    "os.utime": ("change", ((0, 3),)),
    "os.truncate": ("change", ((0, None),)),
    "os.setxattr": ("change", ((0, None),)),
    "os.removexattr": ("change", ((0, None),)),
    "sqlite3.connect": ("open", ((0, None),)),
}
PROGRAMS = frozenset(("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "pty.spawn"))
ADDRESSES = {
    "socket.connect": 1,
    "socket.bind": 1,
    "socket.sendto": 1,
    "socket.sendmsg": 1,
    "socket.getaddrinfo": 0,
    "socket.gethostbyname": 0,
}
HERE = frozenset((None, "", "localhost", "127.0.0.1", "::1", b"localhost", b"127.0.0.1", b"::1"))


class Refused(PermissionError):
    """The grader does not let a notebook do this."""


def guard(folder: str, results: str, note: Callable[[str], None]) -> None:
    """From now on, and for good, refuse what is named above. `note` is told of each refusal, in words.

    Args:
        folder: the only one where files may change.
        results: the one file outside it that the worker itself appends to.
    """
    folder, main, forks = os.path.realpath(folder), os.getpid(), 0
    # What the hook uses is taken now: a notebook may replace os.path.realpath, or builtins.
    realpath, getpid, getsid, getpgid, fsdecode = os.path.realpath, os.getpid, os.getsid, os.getpgid, os.fsdecode
    join, split, kinds = os.path.join, os.path.split, (str, bytes)

    def refuse(what: str) -> None:
        note(what)
        raise Refused(f"the grader refuses to {what}")

    def inside(path: Any, at: int | None) -> bool:
        if not isinstance(path, kinds):
            return True  # a descriptor: whoever opened it was asked then
        path = fsdecode(path)
        if path in (results, os.devnull, ":memory:"):
            return True
        if isinstance(at, int) and at >= 0:
            path = join(path_of(at), path)
        start, name = split(path.rstrip("/"))
        # The file's own link is not followed to delete it, and is followed to write: neither may lead outside.
        real = (join(realpath(start), name), realpath(path))
        return all(each == folder or each.startswith(folder + os.sep) for each in real)

    def hook(event: str, args: tuple[Any, ...]) -> None:
        nonlocal forks
        if event == "open":
            if isinstance(args[2], int) and args[2] & WRITING and not inside(args[0], None):
                refuse(f"write {fsdecode(args[0])}")
        elif event in CHANGES:
            verb, places = CHANGES[event]
            for path, at in places:
                where = args[at] if at is not None and at < len(args) else None
                if path < len(args) and not inside(args[path], where):
                    refuse(f"{verb} {fsdecode(args[path])}")
        elif event in ADDRESSES:
            address = args[ADDRESSES[event]] if len(args) > ADDRESSES[event] else None
            host = address[0] if isinstance(address, tuple) and address else address
            unix = event not in ("socket.getaddrinfo", "socket.gethostbyname") and not isinstance(address, tuple)
            if not unix and host not in HERE:
                refuse(f"reach the network ({fsdecode(host) if isinstance(host, kinds) else host})")
        elif event in PROGRAMS:
            refuse(f"start a program ({event})")
        elif event == "resource.setrlimit" or (event == "resource.prlimit" and args[2] is not None):
            refuse("change its own limits")
        elif event == "os.kill":
            if args[0] < 0 or (args[0] > 0 and not same_session(args[0])):
                refuse(f"signal process {args[0]}")
        elif event == "os.killpg":
            if args[0] not in (0, getpgid(0)):
                refuse(f"signal process group {args[0]}")
        elif event in ("os.fork", "os.forkpty"):
            forks += 1
            if getpid() != main or forks > MOST_FORKS:
                refuse(f"start more than {MOST_FORKS} processes")

    def same_session(pid: int) -> bool:
        try:
            return getsid(pid) == getsid(0)
        except OSError:
            return True  # there is none: let the call say so

    sys.addaudithook(hook)


def path_of(descriptor: int) -> str:
    """The folder that a descriptor stands for; "/" (outside) where nobody says."""
    try:
        if hasattr(fcntl, "F_GETPATH"):  # macOS
            return os.fsdecode(fcntl.fcntl(descriptor, fcntl.F_GETPATH, bytes(1024)).rstrip(b"\0"))
        return os.readlink(f"/proc/self/fd/{descriptor}")
    except OSError:
        return "/"
