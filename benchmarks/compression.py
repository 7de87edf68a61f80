"""What file compression makes of pruned weights: `python benchmarks/compression.py` (needs zstd on the PATH).

A bfloat16 matrix of normal numbers, dense and pruned by magnitude, 50 % of each row and 2:4, as it lies in our shards:
the size `zstd -3` leaves; in pieces of 128 KiB stored in whole blocks of 4 KiB, as btrfs compresses; with -0.0 for half
of the zeros; and the size of a bitmask beside the kept weights.
"""

import subprocess

import numpy as np
import torch
from measure import commit, machine

from lowmem_wanda.sparsity.masks import prune_lowest
from lowmem_wanda.sparsity.methods import magnitude
from lowmem_wanda.sparsity.patterns import parse
from lowmem_wanda.streaming.buffers import raw

ROWS, COLUMNS = 4096, 8192
PIECE, BLOCK = 128 << 10, 4 << 10


def main() -> None:
    print(f"{machine()}, commit {commit()}, {version()}\n")
    print("| weights | zstd -3 | in pieces, whole blocks | with -0.0 | bitmask |\n|---|---|---|---|---|")
    for name in ("dense", "50%", "2:4"):
        weight = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()
        if name != "dense":
            prune_lowest(weight, magnitude(weight, None), parse(name))
        data = raw(weight)
        zero = weight == 0
        signed = torch.where(zero & (torch.rand(weight.shape) < 0.5), -torch.zeros((), dtype=weight.dtype), weight)
        packed = weight.numel() / 8 + 2 * int((~zero).sum())
        sizes = (compressed(data), in_pieces(data), compressed(raw(signed)), packed)
        print(f"| {name} | " + " | ".join(f"{size / len(data):.2f}" for size in sizes) + " |", flush=True)


def compressed(data: np.ndarray) -> int:
    """Bytes that zstd -3 leaves."""
    return len(subprocess.run(["zstd", "-3", "-c"], input=data.tobytes(), capture_output=True, check=True).stdout)


def in_pieces(data: np.ndarray) -> float:
    """The same for pieces that are compressed alone and take whole blocks; of every 16th piece."""
    pieces = [data[start : start + PIECE] for start in range(0, len(data), 16 * PIECE)]
    taken = sum(min(-(-compressed(piece) // BLOCK) * BLOCK, len(piece)) for piece in pieces)
    return taken * len(data) / sum(map(len, pieces))


def version() -> str:
    return (
        subprocess.run(["zstd", "--version"], capture_output=True, text=True, check=True)
        .stdout.split(",")[0]
        .strip("* ")
    )


if __name__ == "__main__":
    main()
