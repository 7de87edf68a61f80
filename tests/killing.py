"""A pruning that dies, in a module that a forked process can import."""

import os
import signal

from lowmem_wanda import prune
from lowmem_wanda.checkpoint import writer


def prune_until(source, target, tokens, calls, half):
    """Runs a pruning that dies by SIGKILL at one of its writes, syncs and renames (with half of a write done)."""
    left = [calls]

    def dying(function):
        def call(*args):
            left[0] -= 1
            if left[0] == 0:
                if function is os_write:
                    os_write(args[0], args[1][: len(args[1]) // 2] if half else args[1])
                elif not half:
                    function(*args)
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args)

        return call

    os_write = os.write
    for name in ("write", "fsync", "replace"):
        setattr(writer.os, name, dying(getattr(os, name)))
    prune(source, target, text=[tokens], batch=4)
