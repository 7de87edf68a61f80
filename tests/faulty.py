"""A file layer that fails as a schedule says, in a module that a forked process can import.

A schedule is a kind of fault and the number of the operation (a write, fsync or rename) at which it comes.
"""

import errno
import json
import os
import random
import resource
import signal
import subprocess
import sys
from pathlib import Path

from lowmem_wanda import LowmemError, prune

KINDS = ("kill", "half", "short", "EIO", "ENOSPC", "EINTR", "changed", "second", "memory")
OPERATIONS = ("write", "fsync", "replace")
REAL = {name: getattr(os, name) for name in OPERATIONS}


def schedule(seed):
    """(kind, number of the operation) of a seed; the kinds take turns."""
    return KINDS[seed % len(KINDS)], random.Random(seed).randrange(1, 120)


class Faulty:
    """Replaces the functions of `os` for this process until the fault has come."""

    def __init__(self, kind, at, source, target, settings, seed):
        self.kind, self.left, self.source, self.target, self.settings = kind, at, source, target, settings
        self.random, self.busy = random.Random(seed), False
        for name in OPERATIONS:
            setattr(os, name, self.wrapped(name))

    def wrapped(self, name):
        def call(*args):
            if self.busy:
                return REAL[name](*args)
            self.left -= 1
            if self.kind == "short" and name == "write" and len(args[1]) > 1:
                return REAL[name](args[0], args[1][: self.random.randrange(1, len(args[1]))])
            if self.left == 0:
                self.busy = True
                self.fault(name, args)
                self.busy = False
            return REAL[name](*args)

        return call

    def fault(self, name, args):
        if self.kind in ("kill", "half"):
            if name == "write" and self.kind == "half":
                REAL[name](args[0], args[1][: len(args[1]) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        if self.kind in ("EIO", "ENOSPC", "EINTR"):
            if name == "write":
                REAL[name](args[0], args[1][: len(args[1]) // 2])
            raise OSError(getattr(errno, self.kind), os.strerror(getattr(errno, self.kind)))
        if self.kind == "changed":
            file = sorted(Path(self.source).glob("*.safetensors"))[-1]
            times, data = file.stat(), bytearray(file.read_bytes())
            data[-1] ^= 1
            file.write_bytes(data)
            os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
        if self.kind == "second":
            call = "import json, sys; from lowmem_wanda import prune; prune(*sys.argv[1:3], **json.loads(sys.argv[3]))"
            words = [sys.executable, "-c", call, self.source, self.target, json.dumps(self.settings)]
            second = subprocess.run(words, capture_output=True, text=True)
            assert second.returncode and "another process is at work" in second.stderr, second.stderr
        if self.kind == "memory":
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            resource.setrlimit(resource.RLIMIT_AS, (pages * 4096 + (1 << 20), resource.RLIM_INFINITY))


def run(source, target, settings, kind, at, seed, answer):
    """Prunes under a fault; writes what came of it as JSON into the file `answer`. A kill leaves none."""
    Faulty(kind, at, source, target, settings, seed)
    try:
        prune(source, target, **settings)
        found = ["done", ""]
    except (LowmemError, MemoryError) as error:
        found = [type(error).__name__, str(error)]
    except BaseException as error:  # noqa: BLE001  which is what is looked for
        found = ["BUG", repr(error)[:2000]]
    for name in OPERATIONS:
        setattr(os, name, REAL[name])
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    Path(answer).write_text(json.dumps(found))
