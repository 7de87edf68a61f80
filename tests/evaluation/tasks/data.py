"""Documents of ../shared/corpora/zeroshot for the local tasks: nothing is downloaded, nothing copied."""

import csv
import json
from pathlib import Path

from datasets import Dataset, DatasetDict

TEXTS = Path(__file__).resolve().parents[4] / "shared" / "corpora"
FOLDER = TEXTS / "zeroshot"


def documents(file: str, **_) -> DatasetDict:
    """The documents of a file, by the format that its ending or name says; the harness passes more than the file."""
    path = FOLDER / file
    if path.suffix == ".jsonl":
        rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    elif path.suffix == ".tsv":
        with open(path, encoding="utf-8", newline="") as opened:
            rows = list(csv.DictReader(opened, delimiter="\t", quoting=csv.QUOTE_NONE))
    else:
        lines = path.read_text("utf-8").splitlines()
        groups = [lines[start : start + 6] for start in range(0, len(lines), 6)]
        rows = [{"query": group[0], "gold": int(group[1]), "choices": group[2:]} for group in groups]
    return DatasetDict(validation=Dataset.from_list(rows))


def stories(**_) -> DatasetDict:
    """Whole stories, for perplexity."""
    text = (TEXTS / "tinystories" / "held-out.txt").read_text("utf-8")
    rows = [{"text": story.strip()} for story in text.split("<|endoftext|>")]
    return DatasetDict(validation=Dataset.from_list(rows))
