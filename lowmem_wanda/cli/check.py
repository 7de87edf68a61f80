"""The command `check`."""

import argparse
from typing import TYPE_CHECKING, Any

from lowmem_wanda.cli.gguf import check_gguf
from lowmem_wanda.cli.options import add_command
from lowmem_wanda.cli.terminal import ranges, verdict

if TYPE_CHECKING:
    from lowmem_wanda import Findings


def add(commands: Any) -> None:
    command = add_command(commands, "check", "report the sparsity of a checkpoint and prove it", run)
    command.add_argument(
        "path", metavar="dir", help="folder of any safetensors checkpoint, or a GGUF that shrink wrote"
    )
    command.add_argument("--against", metavar="ckpt_dir", help="prove that dir is this checkpoint except for zeros, or "
        "without some experts, or that a GGUF is this one without some")  # fmt: skip


def run(arguments: argparse.Namespace) -> int:
    from lowmem_wanda import check, is_gguf

    if is_gguf(arguments.path):
        return check_gguf(arguments)
    findings = check(arguments.path, arguments.against)
    return verdict(arguments, findings, *lines(findings))


def lines(findings: "Findings") -> list[str]:
    """A line for each matrix, and what was proved."""
    width = max((len(matrix.name) for matrix in findings.matrices), default=0)
    made = [
        f"{matrix.name:<{width}}  {matrix.dtype:>4} {matrix.shape[0]:>6} x {matrix.shape[1]:<6}"
        f"  {matrix.sparsity:7.2%} {'tiny' if matrix.filled else 'zero'}  {matrix.pattern}".rstrip()
        for matrix in findings.matrices
    ]
    if findings.shards_verified:
        made.append(f"{findings.shards_verified} shards have the checksums of report.json")
    for layer, kept in findings.kept.items():
        made.append(f"layer {layer:>2}  keeps {ranges(kept)} of {findings.experts} experts")
    if findings.kept and (findings.identical or findings.cut or findings.masked):
        moved = f"; {findings.moved} were refitted, as report.json says" if findings.moved else ""
        if findings.masked:
            moved += f"; {findings.masked} are either but for {findings.zeroed} weights that are zero"
        made.append(
            f"{findings.identical} tensors are the source's to the byte; {findings.cut} are the source's slices of the "
            f"kept experts{moved}" + ("" if findings.problems else "; nothing else differs")
        )
    elif findings.identical or findings.masked:
        what = "the smallest number" if any(matrix.filled for matrix in findings.matrices) else "zero"
        identical = f"{findings.identical} tensors are the source's to the byte; "
        if findings.moved:
            made.append(
                f"{identical}{findings.masked} have {findings.zeroed} weights that are {what}; {findings.moved} have "
                "other values in what is kept, as report.json says"
            )
        else:
            made.append(
                f"{identical}{findings.masked} are the source's but for {findings.zeroed} weights that are {what}"
            )
    return made
