"""Our 2:4 matrices on an NVIDIA GPU, dense kernels against torch's semi-structured ones:

    python benchmarks/semi_structured.py

Takes the shapes of a Llama-2-7B block, or the matrices of --checkpoint (pruned 2:4), and several numbers of tokens.
Prints the time of a product with the weight as it is, that with the weight as
`torch.sparse.to_sparse_semi_structured` packs it for each of its libraries, and the packed weight's bytes as a share of
the dense ones. Each product is timed as a program calls it, and replayed from a CUDA graph, which leaves out the time
that Python and the library take on the host. Needs compute capability 8.0 or more. The paper has 1.6 times per linear
and 1.24 times end to end (arXiv 2306.11695).
"""

import argparse
import json
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from measure import ROOT, commit, machine
from torch.sparse import SparseSemiStructuredTensor, to_sparse_semi_structured

from lowmem_wanda.checkpoint.directory import Checkpoint
from lowmem_wanda.sparsity.masks import prune_lowest, survey
from lowmem_wanda.sparsity.methods.scores import magnitude
from lowmem_wanda.sparsity.patterns import NM
from lowmem_wanda.streaming.buffers import DTYPES, read_cast

SHAPES = {"q, k, v, o": (4096, 4096), "gate, up": (11008, 4096), "down": (4096, 11008)}
TOKENS = (1, 16, 128, 1024, 4096)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, help="a folder that was pruned 2:4; its first block is taken")
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/semi_structured.json")
    arguments = parser.parse_args()
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0):
        raise SystemExit("needs an NVIDIA GPU of compute capability 8.0 or more (Ampere)")
    warnings.filterwarnings("ignore", message=".*SparseSemiStructuredTensor is in prototype")
    # torch's CUTLASS products are for compute capability 8.x alone
    libraries = ("cuSPARSELt", "CUTLASS")[: 2 if torch.cuda.get_device_capability()[0] == 8 else 1]
    rows = []
    for name, weight in weights(arguments.checkpoint):
        if not survey(weight, NM(2, 4))[1]:
            raise SystemExit(f"{name}: does not hold 2:4; prune with --pattern 2:4")
        for library in libraries:
            SparseSemiStructuredTensor._FORCE_CUTLASS = library == "CUTLASS"
            packed = to_sparse_semi_structured(weight)
            for tokens in arguments.tokens:
                rows.append({"linear": name, "library": library, "tokens": tokens, **compared(weight, packed, tokens)})
                print(rows[-1], flush=True)
    device = torch.cuda.get_device_name()
    result = {"machine": machine(), "gpu": device, "torch": torch.__version__, "commit": commit(), "rows": rows}
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")


def weights(checkpoint: Path | None) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields names and half-precision weights (outputs, inputs) on the GPU."""
    if checkpoint is None:
        for name, shape in SHAPES.items():
            weight = torch.randn(shape, dtype=torch.float16, device="cuda") * 0.02
            prune_lowest(weight, magnitude(weight, None), NM(2, 4))
            yield f"{name} {shape[0]} x {shape[1]}", weight
        return
    for name, tensor in Checkpoint(checkpoint).tensors.items():
        if ".0." in name and len(tensor.shape) == 2:
            weight = read_cast(tensor, torch.empty(tensor.shape, dtype=DTYPES[tensor.dtype]))
            yield name, weight.half().cuda()


def compared(weight: torch.Tensor, packed: torch.Tensor, tokens: int) -> dict[str, float]:
    """Medians in ms of both products, replayed and called, the distance of their results, the packed share of bytes."""
    inputs = torch.randn(tokens, weight.shape[1], dtype=weight.dtype, device="cuda")
    dense, sparse = (partial(torch.nn.functional.linear, inputs, one) for one in (weight, packed))
    apart = float((dense() - sparse()).float().norm() / dense().float().norm())
    times = {"dense ms": timed(graph_of(dense)), "sparse ms": timed(graph_of(sparse))}
    parts = [part for part in (packed.packed, packed.meta) if part is not None]
    return {
        **times,
        "dense over sparse": times["dense ms"] / times["sparse ms"],
        "called, dense ms": timed(dense),
        "called, sparse ms": timed(sparse),
        "apart": apart,
        "bytes": sum(part.nbytes for part in parts) / weight.nbytes,
    }


def graph_of(product: Callable[[], torch.Tensor]) -> Callable[[], None]:
    """A function that replays a product from a CUDA graph."""
    beside = torch.cuda.Stream()
    with torch.cuda.stream(beside):
        product()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        product()
    return graph.replay


def timed(product: Callable[[], object], rounds: int = 30) -> float:
    """The median time of a product on the GPU in ms."""
    marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(rounds)]
    for _ in range(5):
        product()
    for start, end in marks:
        start.record()
        product()
        end.record()
    torch.cuda.synchronize()
    return sorted(start.elapsed_time(end) for start, end in marks)[rounds // 2]


if __name__ == "__main__":
    main()
