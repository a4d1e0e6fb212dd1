"""What the system itself refuses to a notebook that is being graded, compiled code and started programs included.

Three layers, each where there is one: limits (POSIX), a network namespace with nothing but the loopback (Linux), and
Landlock (Linux 5.13 and later), which leaves one folder to write to. None needs to be root.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import resource
import socket
import struct
from collections.abc import Sequence

LARGEST_FILE = 256 * 2**20
NEWUSER, NEWNET = 0x10000000, 0x40000000
UP, GET_FLAGS, SET_FLAGS = 0x1, 0x8913, 0x8914
NO_NEW_PRIVILEGES, DIE_WITH_PARENT = 38, 1
CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446  # the same on every architecture
WRITE_FILE, REMOVE_AND_MAKE, REFER, TRUNCATE = 1 << 1, sum(1 << bit for bit in range(4, 13)), 1 << 13, 1 << 14
REMOVE_FILE, MAKE_FILE, SHARED_MEMORY = 1 << 5, 1 << 8, "/dev/shm"
BIND_AND_CONNECT, SCOPED_SOCKETS_AND_SIGNALS = 0b11, 0b11


def die_with_parent() -> None:
    """On Linux: be killed when the grader is."""
    _call("prctl", DIE_WITH_PARENT, 9, 0, 0, 0)


def limit(memory: int, seconds: float) -> None:
    """Memory (bytes in all), file size and processor time, for this process and each one that it starts.

    The limit is on data (RLIMIT_DATA), not on addresses: torch maps gigabytes that it never touches. An allocation beyond
    it fails with MemoryError, and the notebook goes on. macOS does not hold data to it: there the supervisor sees to it.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (LARGEST_FILE, LARGEST_FILE))
    cpu = int(4 * seconds) + 60  # for what might outlive the supervisor's clock
    resource.setrlimit(resource.RLIMIT_CPU, (cpu, cpu))
    try:
        with open("/proc/self/status", encoding="ascii", errors="replace") as status:
            sizes = dict(line.split(":", 1) for line in status if ":" in line)
        data, resident = (int(sizes[name].split()[0]) * 1024 for name in ("VmData", "VmRSS"))
    except (OSError, KeyError):
        return
    most = data + max(memory - resident, 0)
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))


def leave_network() -> bool:
    """Move into a network namespace of its own, with the loopback up. To be called while there is one thread only."""
    user, group = os.getuid(), os.getgid()
    if _call("unshare", NEWNET) == 0:  # for root
        maps = ()
    elif _call("unshare", NEWUSER | NEWNET) == 0:  # for everyone, where the system lets them
        maps = (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1"))
    else:
        return False
    with contextlib.suppress(OSError):  # Ubuntu may refuse from here on: then there is not even a loopback
        for name, text in maps:
            with open(f"/proc/self/{name}", "w", encoding="ascii") as file:
                file.write(text)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
            request = struct.pack("16sH14x", b"lo", 0)
            (flags,) = struct.unpack_from("H", fcntl.ioctl(any_socket, GET_FLAGS, request), 16)
            fcntl.ioctl(any_socket, SET_FLAGS, struct.pack("16sH14x", b"lo", flags | UP))
    return True


def landlock(folder: str, files: Sequence[str], network: bool) -> bool:
    """Leave only `folder` (and the `files` as they are) to write to; TCP to nobody unless `network`; no signals outside.

    Shared memory stays open too: torch's shared tensors and multiprocessing's locks live there, and `datasets` needs both.
    """
    version = _call("syscall", CREATE_RULESET, None, 0, 1)
    if version < 1:
        return False
    write = WRITE_FILE | (TRUNCATE if version >= 3 else 0)
    handled = write | REMOVE_AND_MAKE | (REFER if version >= 2 else 0)
    fields = [handled]
    if version >= 4:
        fields.append(0 if network else BIND_AND_CONNECT)
    if version >= 6:
        fields.append(SCOPED_SOCKETS_AND_SIGNALS)
    attributes = struct.pack(f"={len(fields)}Q", *fields)
    rules = _call("syscall", CREATE_RULESET, attributes, len(attributes), 0)
    if rules < 0:
        return False
    allowances = [(folder, handled), *((file, write) for file in files)]
    if os.path.isdir(SHARED_MEMORY):
        allowances.append((SHARED_MEMORY, write | MAKE_FILE | REMOVE_FILE))
    for path, allowed in allowances:
        descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
        added = _call("syscall", ADD_RULE, rules, 1, struct.pack("=Qi", allowed, descriptor), 0)
        os.close(descriptor)
        if added != 0:
            os.close(rules)
            return False
    _call("prctl", NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    done = _call("syscall", RESTRICT_SELF, rules, 0) == 0
    os.close(rules)
    return done


def _call(name: str, *args: int | bytes | None) -> int:
    """A function of the C library: what it returned, -1 where it is not there."""
    function = getattr(ctypes.CDLL(None, use_errno=True), name, None) if hasattr(os, "O_PATH") else None  # Linux only
    if function is None:
        return -1
    function.restype = ctypes.c_long
    return function(*(ctypes.c_long(arg) if isinstance(arg, int) else arg for arg in args))
