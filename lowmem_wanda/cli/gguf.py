"""What `plan` and `check` show of a GGUF."""

import argparse
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lowmem_wanda.cli.terminal import pairs, printable, ranges, shown, size, verdict

if TYPE_CHECKING:
    from lowmem_wanda import GGUFFindings


def show_outline(arguments: argparse.Namespace) -> int:
    """What `plan` shows of a GGUF."""
    from lowmem_wanda import outline

    facts = outline(arguments.source)
    table = pairs(f"plan: {facts['path']}")
    shared = f", {facts['shared']} shared beside them" if facts["shared"] else ""
    groups = f", in {facts['groups']} groups" if facts["groups"] > 1 else ""
    predicting = f", {facts['predicting']} for further tokens (MTP)" if facts["predicting"] else ""
    files = f" in {facts['files']} files" if facts["files"] > 1 else ""
    table.add_row("model", printable(f"{facts['name'] or 'without a name'} ({facts['architecture']})"))
    table.add_row("size", f"{size(facts['bytes'])}{files}, {facts['expert_bytes'] / facts['bytes']:.1%} of it experts")
    table.add_row("layers", f"{facts['layers']} of {facts['blocks']} with experts{predicting}")
    table.add_row("experts", f"{facts['experts']} in each, {facts['used']} at work for a token{shared}{groups}")
    table.add_row("types", ", ".join(f"{kind} {size(count)}" for kind, count in facts["types"].items()))
    for cut in facts["cuts"]:
        table.add_row(f"without {cut['share']}", cut_text(cut, facts["bytes"]))
    return shown(arguments, facts, table, "To choose experts: shrink --from imatrix.gguf, or --score aimer without one")


def cut_text(cut: Mapping[str, Any], before: int) -> str:
    """One cut in words."""
    if "bytes" not in cut:
        return str(cut["refused"])
    marks = [
        text
        for key, text in (("fused_cuda_routing", "fused CUDA routing"), ("multiple_of_8", "multiple of 8"))
        if cut[key]
    ]
    facts = f"; {', '.join(marks)}" if marks else ""
    return f"{cut['kept']} experts, {size(cut['bytes'])} ({cut['bytes'] / before:.1%}){facts}"


def check_gguf(arguments: argparse.Namespace) -> int:
    """What `check` shows of a GGUF."""
    from lowmem_wanda import CheckpointError, check_gguf

    if arguments.against is None:
        raise CheckpointError(
            f"{arguments.path}: is a GGUF, which is proved against the one it was made of: add --against"
        )
    findings = check_gguf(arguments.path, arguments.against)
    return verdict(arguments, findings, *proved(findings))


def proved(findings: "GGUFFindings") -> list[str]:
    """A line for each layer, and what was proved."""
    width = len(str(max(findings.kept, default=0)))
    made = [f"layer {block:>{width}}  keeps {ranges(kept)}" for block, kept in findings.kept.items()]
    if findings.report_verified:
        made.append("ids and checksums were compared with the report beside it")
    made.append(f"{findings.experts_kept} of {findings.experts} experts in each of {len(findings.kept)} layers")
    if not findings.problems and findings.experts_kept == findings.experts:
        made.append("it is the source with all of its experts: none was removed, and nothing differs")
    elif not findings.problems:
        made.append(
            f"{findings.identical} tensors are the source's to the byte; {findings.cut} are the source's slices of the "
            "kept experts; nothing else differs"
        )
    return made
