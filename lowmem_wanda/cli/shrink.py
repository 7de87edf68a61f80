"""The command `shrink`, and what `plan` and `check` show of a GGUF."""

import argparse
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from lowmem_wanda import EXPERT_SCORES
from lowmem_wanda.cli.options import add_command, positive, taken, whole
from lowmem_wanda.cli.options import size as byte_count
from lowmem_wanda.cli.terminal import Bar, duration, pairs, printable, shown, size, verdict

if TYPE_CHECKING:
    from lowmem_wanda import GGUFFindings

MEGA = 10**6  # bytes
SHRINKING = ("drop_experts", "keep_experts", "scores_from", "score", "seed", "plan", "write_plan", "imatrix_out",
             "split_size")  # fmt: skip


def add(commands: Any) -> None:
    text = "write a smaller GGUF of a mixture of experts, without some of its experts"
    command = add_command(commands, "shrink", text, run)
    add = command.add_argument
    add("source", metavar="model.gguf", help="GGUF of a mixture of experts; of a split one, the first file")
    add("target", metavar="small.gguf", help="new file")
    number = command.add_mutually_exclusive_group()
    number.add_argument("--drop-experts", metavar="SHARE", help="experts to remove from each layer: a share (25%%, "
        "0.25), rounded down to whole experts, or a number")  # fmt: skip
    number.add_argument("--keep-experts", type=positive, metavar="N", help="experts to keep in each layer instead")
    add("--from", dest="scores_from", metavar="FILE", help="importance matrix of this very model (.gguf), which says "
        "what each expert does")  # fmt: skip
    add("--score", choices=EXPERT_SCORES, help="how experts are scored: summed norms of outputs, estimated from --from "
        "(ean); its counts alone (frequency); weights alone, without data (aimer); random (default: ean)")  # fmt: skip
    add("--seed", type=whole, metavar="N", help="seed of --score random (default: 0)")
    add("--plan", metavar="FILE", help='JSON of the experts to keep, {"layer": [ids]}, instead of a score')
    add("--write-plan", metavar="FILE", help="write the choice as such a plan, too")
    add(
        "--imatrix-out",
        metavar="FILE",
        help="write the importance matrix of --from cut alike, to quantize again (.gguf)",
    )
    add("--split-size", type=byte_count, metavar="SIZE", help="write several files of at most this size, such as 20GB "
        "(default: one file)")  # fmt: skip


def run(arguments: argparse.Namespace) -> int:
    from lowmem_wanda import shrink
    from lowmem_wanda.cli.shrink_page import save_page

    with Bar("writing MB") as bar:
        report = shrink(
            arguments.source,
            arguments.target,
            **taken(arguments, *SHRINKING),
            on_start=lambda facts: bar.line(about(facts)),
            on_progress=_Progress(bar),
        )
    page = save_page(arguments.target, report)
    return shown(arguments, report, *lines(report), table(report), *closing(report, page))


class _Progress:
    """Moves a bar by megabytes that were written."""

    def __init__(self, bar: Bar) -> None:
        self.bar, self.at = bar, -1

    def __call__(self, record: Mapping[str, Any]) -> None:
        if self.at < 0:
            self.bar.begin(-(-record["total"] // MEGA))
        if (done := record["done"] // MEGA) != self.at:
            self.at = done
            self.bar.show({"index": done - 1})


def about(facts: Mapping[str, Any]) -> str:
    """The line before the work."""
    what = f"{facts['layers']} layers with {facts['experts']} experts, of which {facts['kept']} are kept"
    return f"{facts['source']}: {what}"


def lines(report: Mapping[str, Any]) -> list[str]:
    """A line for each layer: what chose, the tokens that went to dropped experts, and the ids that are kept."""
    width = len(str(max(layer["layer"] for layer in report["layers"])))
    made = []
    for layer in report["layers"]:
        lost = layer["tokens_lost"]
        text = f"  {lost:7.2%} of its tokens went to dropped ones" if lost is not None else ""
        made.append(f"layer {layer['layer']:>{width}}  {layer['by']:>9}{text}  keeps {ranges(layer['kept'])}")
    return made


def table(report: Mapping[str, Any]) -> Any:
    """The table of what was removed and what that means."""
    experts, before, after = report["experts"], report["bytes"]["before"], report["bytes"]["after"]
    table = pairs(f"shrunk: {report['target']}")
    layers = f"{experts['layers']} layers of {report['architecture']}"
    if experts["predicting"]:
        layers += f", {experts['predicting']} of them for predicting further tokens (MTP)"
    table.add_row("experts", f"{experts['kept']} of {experts['before']} kept in each of {layers}; {experts['used']} at "
        "work for a token, as before")  # fmt: skip
    table.add_row("chosen by", printable(report["how"]))
    files = f" in {len(report['files'])} files" if len(report["files"]) > 1 else ""
    table.add_row("size", f"{size(before)} before, {size(after)} now{files} ({after / before:.1%})")
    if tokens := report["tokens"]:
        lost = f"{tokens['lost_mean']:.2%} of routed tokens went to dropped experts"
        table.add_row("tokens", f"{lost}; at most {tokens['lost_most']:.2%}, in layer {tokens['lost_most_in']}")
    else:
        table.add_row("tokens", "not known what went to dropped experts; --from imatrix.gguf tells")
    table.add_row("routing", report["routing_text"])
    table.add_row("time", duration(report["seconds"]))
    for warning in report["warnings"]:
        table.add_row("warning", printable(warning))
    for cost in report["costs"]:
        table.add_row("costs", cost)
    return table


def closing(report: Mapping[str, Any], page: Any) -> list[str]:
    """The lines after the table: how to measure, how to prove, where the report is."""
    return [
        measuring(report),
        *(f"  {command}" for command in report["commands"]),
        "Prove it:",
        f"  {report['proof']}",
        f"report: {page}",
    ]


def measuring(report: Mapping[str, Any]) -> str:
    """The line before the commands that measure."""
    written = report["commands_write"]
    disk = f"; the first command writes about {size(written)}" if written else ""
    return f"Measure what it costs (KL divergence from the whole model; your own text after -f is better{disk}):"


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


def ranges(ids: Sequence[int]) -> str:
    """Ids in few characters: 0-2, 5, 7-9."""
    runs = [list(run) for _, run in groupby(enumerate(ids), key=lambda pair: pair[1] - pair[0])]
    return ", ".join(f"{run[0][1]}-{run[-1][1]}" if len(run) > 1 else str(run[0][1]) for run in runs)
