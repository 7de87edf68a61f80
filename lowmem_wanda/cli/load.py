"""How torch's threads wait and how many there are: chosen by the load of the machine, before torch is imported.

By default threads that wait for each other keep their cores busy. Where other programs need a core, they then wait for
a thread that has none: with two busy programs beside on two cores, a pruning of 11 s took 33 to 44 s. With one thread
that sleeps it takes 23 s.
"""

import argparse
import json
import os
import sys
from contextlib import suppress
from pathlib import Path

from lowmem_wanda import exact_products

THREADS = "OMP_NUM_THREADS"
SETTINGS = ("OMP_", "GOMP_", "KMP_", "MKL_")  # whoever sets one of these keeps it
FEWER = ("prune", "eval", "imatrix")  # commands that may take fewer threads
SAMPLE = 0.1  # seconds over which other programs are watched
BUSY = 0.5  # of one core, in all


def settle(arguments: argparse.Namespace) -> None:
    """Sets the environment of torch's threads for a command that computes; does nothing once torch is imported.

    An interrupted job goes on with the number of threads that it began with, because rounding may depend on it. In
    float32 on Intel's CPUs it does not (see `exact_products`), so that a new job takes fewer where
    other programs keep cores busy.
    """
    if not hasattr(arguments, "device") or "torch" in sys.modules:
        return
    free = not any(name.startswith(SETTINGS) for name in os.environ)
    cores = _cores()
    began_with = _threads_of_job(arguments)
    if began_with and began_with <= len(cores) and THREADS not in os.environ:
        os.environ[THREADS] = str(began_with)
    if not free or (busy := busy_cores(cores)) < BUSY:
        return
    os.environ["OMP_WAIT_POLICY"] = "passive"
    exact = getattr(arguments, "dtype", "") in ("auto", "float32") and exact_products()
    if arguments.command in FEWER and exact and not began_with:
        os.environ[THREADS] = str(max(1, len(cores) // 2, len(cores) - round(busy)))


def busy_cores(cores: set[int]) -> float:
    """How much of these cores other programs take, in cores. Where some may, they are watched for 0.1 s."""
    with suppress(OSError, ValueError, IndexError):
        running = Path("/proc/loadavg").read_text().split()[3]  # "2/345": this process is one of the first number
        if int(running.partition("/")[0]) <= 1:
            return 0.0
    import psutil

    shares = psutil.cpu_percent(SAMPLE, percpu=True)
    return float(sum(shares[core] for core in cores if core < len(shares))) / 100


def _cores() -> set[int]:
    """The cores that this process may use."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def _threads_of_job(arguments: argparse.Namespace) -> int:
    """The number of threads that the job in the target began with; 0 where there is none, or it does not count."""
    if arguments.command != "prune":
        return 0
    try:
        threads = json.loads((Path(arguments.target) / "job.json").read_bytes()).get("threads")
    except (OSError, ValueError, AttributeError):
        return 0
    return threads if isinstance(threads, int) and threads > 0 else 0
