"""Writes lowmem_wanda/docs/families.md from what `run.py` found: `python tests/families/table.py families.json`."""

import json
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "lowmem_wanda/docs/families.md"
KINDS = {"causal": "Causal language models", "image-text": "Images and text", "variants": "Other forms of a type"}
INTRO = """# Families

Which model types `prune` takes. This page is made by a test run (`make families`), with transformers {transformers} and
torch {torch}, for every type that transformers knows as a causal or an image-text language model.

Of each type a tiny random checkpoint is made, in the layout in which it is published, with one
layer of each kind that it mixes. It is pruned 2:4 on text. **verified** means all of: its zeros are those of a plain whole-model Wanda, bit for bit; nothing else
changed; names, shapes, dtypes and config.json are the source's; `check` finds nothing; the streamed logits of the dense
model are the whole model's, bit for bit; the output loads in transformers, and `eval` gives its perplexity. Random
tiny weights prove the plumbing, not the quality of a pruned model.

"refused" types are refused in words before work, and leave nothing behind. "unproved" are pruned, but transformers
itself does not run them on text. Of image-text models the language model is pruned, on text; all else is copied byte for byte.
"left dense" is what stays as it is within blocks, beside norms and biases; the report of a job names it, too.
"""


def main() -> None:
    """Reads what was found and writes the page."""
    kept = json.loads(Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "tests/families/families.json").read_text())
    PAGE.write_text(page(kept), "utf-8")


def page(kept: dict[str, Any]) -> str:
    """The page of what was found."""
    parts = [INTRO.format(**kept["made_with"])]
    for kind, title in KINDS.items():
        types = {name: found for name, found in kept["types"].items() if kind_of(name) == kind}
        counts = Counter(found["outcome"] for found in types.values())
        counted = ", ".join(f"{count} {outcome}" for outcome, count in counts.most_common())
        parts.append(f"\n## {title}\n\n{len(types)}: {counted}.\n")
        parts.append("| type | outcome | experts | left dense | why, or what else |\n|---|---|---|---|---|")
        parts += [row(name, types[name]) for name in sorted(types)]
    return "\n".join(parts) + "\n"


def kind_of(name: str) -> str:
    """What a name stands for."""
    return "image-text" if name.startswith("vl:") else "variants" if "+" in name else "causal"


def row(name: str, found: dict[str, Any]) -> str:
    """A type's row."""
    shown = name.removeprefix("vl:").replace("+", ", ").replace("_", r"\_")
    cells = [shown, found["outcome"], "yes" if found.get("experts") else "", left(found), note(found)]
    return "| " + " | ".join(cells) + " |"


def left(found: dict[str, Any]) -> str:
    """What is left dense, as the last parts of names."""
    names = {re.sub(r"^.*?\.\d+\.", "", name).removesuffix(".weight") for name in found.get("left_dense", {})}
    names = {re.sub(r"\.\d+\.", ".N.", name) for name in names}
    return ", ".join(f"`{name}`" for name in sorted(names))


def note(found: dict[str, Any]) -> str:
    """Why a type is not verified, or what of it is refused although it is pruned."""
    sentences = [
        found["reason"],
        *(value for key in ("logits", "perplexity") if isinstance(value := found.get(key), str)),
    ]
    text = "; ".join(dict.fromkeys(" ".join(sentence.split()) for sentence in sentences if sentence))
    text = (
        re.sub(r"/\S*/family-\S+?/", "", text)
        .replace("|", r"\|")
        .replace("_", r"\_")
        .replace("*", r"\*")
        .replace("<", "&lt;")
    )
    return text if len(text) < 220 else text[:200] + " ..."


if __name__ == "__main__":
    main()
