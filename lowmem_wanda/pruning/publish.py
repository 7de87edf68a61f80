"""The end of a pruning: shards become a checkpoint, or a finished job is compared with its report."""

from lowmem_wanda.checkpoint.checksum import sha256_of
from lowmem_wanda.checkpoint.companions import REPORT
from lowmem_wanda.checkpoint.directory import Checkpoint
from lowmem_wanda.checkpoint.output import Output
from lowmem_wanda.checkpoint.writer import write_json
from lowmem_wanda.errors import OutputError
from lowmem_wanda.llamacpp.collect import save_imatrix
from lowmem_wanda.llamacpp.store import Store
from lowmem_wanda.llamacpp.survive import outlook
from lowmem_wanda.pruning.job import PruneJob
from lowmem_wanda.pruning.records import PruneReport
from lowmem_wanda.streaming.walk import Notify


def publish(job: PruneJob, output: Output, report: PruneReport, store: Store, on_report: Notify) -> None:
    """Writes all files that make shards a checkpoint; config.json comes last."""
    source = job.model.checkpoint
    output.publish_files(source, job.companions.files)
    if job.imatrix and job.calibration:
        left_out = save_imatrix(job.imatrix, job.model, job.calibration, job.names, store)
        made = {"sha256": sha256_of(job.imatrix), **({"left_out": left_out} if left_out else {})}
        report["imatrix"] = {**(report["imatrix"] or {}), **made}
    report["quantization"] = outlook(Checkpoint(output.path), report)
    on_report(report)  # type: ignore[arg-type]
    write_json(output.path / REPORT, report)
    output.publish_config(source)
    _end(output)


def _end(output: Output) -> None:
    """Removes what only an unfinished job needs."""
    Store(output.path).remove()
    output.end()


def verified(job: PruneJob, output: Output) -> PruneReport:
    """The report of a finished job, after its files are compared with it. Raises OutputError where they differ."""
    report = output.verified(job.model.checkpoint, job.companions.files)
    made = report.get("imatrix") or {}
    same = made.get("recorded_on") == job.recorded_on and job.imatrix and job.imatrix.exists()
    if job.imatrix and not (same and sha256_of(job.imatrix) == made.get("sha256")):
        raise OutputError(
            f"{output.path}: is done, and {job.imatrix} is not the importance matrix that was made with it on this "
            f"text; make one by: imatrix {output.path} NEW.gguf with its own --text, --sequences, --length and --seed"
        )
    _end(output)
    return report  # type: ignore[return-value]
