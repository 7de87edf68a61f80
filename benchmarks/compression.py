"""The size of pruned weights after file compression: `python benchmarks/compression.py` (needs zstd on the PATH).

Takes a bfloat16 matrix of normal numbers as it lies in our shards: dense, and pruned by magnitude, 50 % of each row and
2:4. Prints four sizes as shares of its bytes: what `zstd -3` leaves; the same in pieces of 128 KiB that are stored in
whole blocks of 4 KiB, as btrfs compresses; what `zstd -3` leaves with -0.0 for half of the zeros; and a bitmask beside
the kept weights.
"""

import subprocess

import numpy as np
import torch
from measure import commit, machine

from lowmem_wanda.sparsity.masks import prune_lowest
from lowmem_wanda.sparsity.methods.scores import magnitude
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
    """The number of bytes that `zstd -3` leaves."""
    return len(subprocess.run(["zstd", "-3", "-c"], input=data.tobytes(), capture_output=True, check=True).stdout)


def in_pieces(data: np.ndarray) -> float:
    """The same where each piece is compressed alone and takes whole blocks, estimated from every 16th piece."""
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
