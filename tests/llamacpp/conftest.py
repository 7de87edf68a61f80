"""The tiny mixtures of experts that tests of GGUFs share."""

from pathlib import Path

import moe_ggufs
import pytest
from gguf import GGMLQuantizationType as Q

COUNT = 16


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """A function: architecture -> (its GGUF of 16 experts, an importance matrix), made once."""
    found: dict[str, tuple[Path, Path]] = {}

    def get(architecture):
        if architecture not in found:
            folder = tmp_path_factory.mktemp(architecture)
            kind = Q.MXFP4 if architecture == "gpt-oss" else Q.Q8_0
            model = moe_ggufs.write(folder / "model.gguf", architecture, COUNT, kind)
            found[architecture] = model, moe_ggufs.write_imatrix(folder / "imatrix.gguf", model)
        return found[architecture]

    return get
