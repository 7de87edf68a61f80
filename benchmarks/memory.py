"""Peak memory of `prune` against depth: `python benchmarks/memory.py`.

Makes random Llama checkpoints of one width and 8, 16, 32 and 64 blocks, prunes each in a process of its own, and reads
that process's RssAnon and RssFile from /proc every 2 ms. Measures the workspace of masking one large matrix, too.
Writes results/memory.json and prints a Markdown table. With `--experts 16 64 256` the checkpoints are mixtures of so
many experts in each of two blocks, all within the first of the budgets. With `--shrink` a quarter of the experts is
removed instead, be it of so many experts or of 16 in each of so many blocks. With `--ways "--method alps" ...` the
first checkpoint is pruned in each of these ways, without a budget and within 80 % of the peak that was then measured.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from checkpoints import random_experts
from measure import ROOT, VOCABULARY, commit, follow, llama, machine, random_tokens, size_of

WORKSPACE = """
import sys, torch
from lowmem_wanda.streaming.resources import Peak, anonymous
from lowmem_wanda.sparsity.masks import prune_lowest
from lowmem_wanda.sparsity.patterns import parse
from lowmem_wanda.sparsity.selection import Scaled
weight = torch.empty(28672, 8192, dtype=torch.bfloat16).normal_()
for name, group in (("2:4", "row"), ("50%", "row"), ("50%", "matrix")):
    before = anonymous()
    with Peak(torch.device("cpu"), 0.001) as peak:
        prune_lowest(weight, Scaled(weight, torch.ones(8192)), parse(name, group))
    print(name, group, round((peak.host - before) / 1e6))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, nargs="+", default=[8, 16, 32, 64])
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument(
        "--max-ram", nargs="*", default=["410MB"], help="budgets within which the deepest is pruned, too"
    )
    parser.add_argument("--no-workspace", action="store_true", help="do not mask the large matrix")
    parser.add_argument("--experts", type=int, nargs="*", default=[], help="experts of a block, instead of blocks")
    parser.add_argument("--ways", nargs="*", default=[], metavar="FLAGS", help="flags of prune, instead of blocks")
    parser.add_argument("--shrink", action="store_true", help="remove a quarter of the experts instead of pruning")
    parser.add_argument("--statistics", default="block", help="the order in which matrices are measured")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/memory.json")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        cases = [(blocks, "") for blocks in arguments.blocks]
        cases += [(arguments.blocks[-1], budget) for budget in arguments.max_ram]
        if arguments.experts:
            cases = [(experts, arguments.max_ram[0]) for experts in arguments.experts]
        if arguments.ways:
            rows = [row for way in arguments.ways for row in with_less(Path(folder), way, arguments)]
        else:
            rows = [measure(Path(folder), *case, arguments) for case in cases]
    result = {"machine": machine(), "commit": commit(), "command": " ".join(sys.argv), "rows": rows}
    kind = "way" if arguments.ways else "experts" if arguments.experts else "blocks"
    print(f"| {kind} | budget | checkpoint MB | anonymous MB | mapped MB | predicted MB | seconds |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        print("| " + " | ".join(str(value) for value in row.values()) + " |")
    if arguments.ways:
        arguments.out.write_text(json.dumps(result, indent=2) + "\n")
        return
    deepest = rows[len(arguments.experts or arguments.blocks) - 1]
    growth = deepest["anonymous_mb"] / rows[0]["anonymous_mb"]
    print(f"\n{deepest['number']} hold {growth:.3f} times the anonymous memory of {rows[0]['number']}")
    if not arguments.no_workspace and not arguments.experts and not arguments.shrink:
        result["workspace_mb"] = workspace()
        print("workspace of masking 28672 x 8192 bfloat16, MB:", result["workspace_mb"])
    arguments.out.parent.mkdir(exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=2) + "\n")


def with_less(folder: Path, way: str, arguments: argparse.Namespace) -> list[dict[str, float | str]]:
    """The peaks of one way of pruning, and those within 80 % of what it took; none where nothing fits into that."""
    free = measure(folder, arguments.blocks[0], "", arguments, way.split())
    rows = [{**free, "number": way}]
    try:
        less = measure(
            folder, arguments.blocks[0], f"{0.8 * float(free['anonymous_mb']):.0f}MB", arguments, way.split()
        )
        rows.append({**less, "number": way})
    except subprocess.CalledProcessError:  # the budget was refused
        print(f"{way}: nothing fits into 80 %", file=sys.stderr)
    return rows


def measure(
    folder: Path, number: int, budget: str, arguments: argparse.Namespace, way: Sequence[str] = ()
) -> dict[str, float | str]:
    """The peaks of one pruning, as the kernel counts them from outside. The checkpoint is removed again."""
    if arguments.experts or arguments.shrink:
        shape = {"width": arguments.width, "hidden": 3 * arguments.width // 2, "vocab": VOCABULARY}
        counts = {"experts": number, "blocks": 2} if arguments.experts else {"experts": 16, "blocks": number}
        source = random_experts(folder / f"{number}", **counts, **shape)
    else:
        source = llama(folder / f"{number}", arguments.width, number)
    tokens = random_tokens(folder / "tokens.npy", arguments.sequences, arguments.length)
    does = ["shrink", "--drop-experts", "25%"] if arguments.shrink else ["prune", "--statistics", arguments.statistics]
    command = [sys.executable, str(ROOT / "cli.py"), *does, str(source), str(folder / "out"), "--json",
               "--text", str(tokens), "--sequences", str(arguments.sequences), *way]  # fmt: skip
    command += ["--max-ram", budget] if budget else []
    output, size = folder / "report.json", size_of(source)  # a pipe would fill up
    try:
        with output.open("wb") as file:
            usage = follow(command, 0.002, stdout=file, stderr=subprocess.DEVNULL)
    finally:
        subprocess.run(["rm", "-rf", str(source), str(folder / "out")], check=True)
    predicted = json.loads(output.read_bytes())["peak_memory"]["host_predicted"]
    print(*way, budget, usage, predicted, file=sys.stderr, flush=True)
    return {
        "number": number,
        "max_ram": budget,
        "checkpoint_mb": round(size / 1e6),
        "anonymous_mb": round(usage.anonymous / 1e6, 1),
        "mapped_mb": round(usage.mapped / 1e6, 1),
        "predicted_mb": round(predicted / 1e6, 1),
        "seconds": round(usage.seconds, 1),
    }


def workspace() -> dict[str, int]:
    """{pattern and group: MB beyond the matrix itself while it is masked}."""
    lines = subprocess.run([sys.executable, "-c", WORKSPACE], capture_output=True, text=True, check=True, cwd=ROOT)
    return {" ".join(line.split()[:2]): int(line.split()[2]) for line in lines.stdout.splitlines()}


if __name__ == "__main__":
    main()
