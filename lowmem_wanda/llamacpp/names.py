"""What llama.cpp calls a weight: the names of GGUF tensors, from the table in the `gguf` package; and GGUF files.

The table is kept by llama.cpp's own converter, architecture by architecture. No family is named here: the
architecture is any whose table knows all of a model's linears, and where tables differ (two of the RWKV kind
take Llama's attention for theirs) the name that most of them give.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from lowmem_wanda.errors import CheckpointError, LowmemError, ModelError

NEEDED = ("GGUFReader", "GGUFWriter", "ReaderField", "MODEL_ARCH", "get_tensor_name_map", "quantize", "dequantize")
NUMBER = re.compile(r"(?<=\.)\d+(?=\.)|^\d+(?=\.)")


def package(what: str) -> Any:
    """The gguf package. Raises LowmemError, saying how to install it for `what`."""
    try:
        import gguf
    except ImportError:
        raise LowmemError(f"{what} needs a package that is not installed: pip install gguf") from None
    if not all(hasattr(gguf, part) for part in NEEDED) or not hasattr(gguf.ReaderField, "contents"):
        raise LowmemError(f"{what} needs a newer gguf package: pip install --upgrade gguf")
    return gguf


def gguf_names(tensors: Sequence[str], what: str) -> dict[str, str]:
    """{file tensor: GGUF tensor}, both with ".weight", for the weights of all linears in all blocks.

    Raises ModelError, naming a tensor that `what` is asked for, where no architecture's table knows them all or
    two of them would share a name.
    """
    kinds = tuple(dict.fromkeys(_kind(name) for name in tensors))
    found = _most_common(kinds, what)
    if found is None:
        missing = next((kind for kind in kinds if _most_common((kind,), what) is None), kinds[0])
        example = next(name for name in tensors if _kind(name) == missing)
        raise ModelError(
            f"tensor {example}: the gguf package has no name for it beside the model's others, so llama.cpp does not "
            f"know such a model: {what} is not available for it, everything else works"
        )
    names = {name: f"{found[_kind(name)].replace('.0.', f'.{_block(name)}.', 1)}.weight" for name in tensors}
    shared = [name for name, count in Counter(names.values()).items() if count > 1]
    if shared:
        raise ModelError(f"{what}: several tensors of this model are {shared[0]} in llama.cpp, which is not supported")
    return names


def _block(name: str) -> str:
    """The number of the block in a tensor's name. Raises ModelError."""
    if not (match := NUMBER.search(name)):
        raise ModelError(f"tensor {name}: its name has no number of a block")
    return match[0]


def _kind(name: str) -> str:
    """The name in the first block, without ".weight"."""
    _block(name)
    return NUMBER.sub("0", name, count=1).removesuffix(".weight")


def _most_common(kinds: Iterable[str], what: str) -> dict[str, str] | None:
    """{kind: GGUF name in block 0}, as most of the architectures have it that know all kinds."""
    kinds = tuple(kinds)
    votes: Counter[tuple[str, ...]] = Counter()
    for table in _tables(package(what)):
        if all(kind in table for kind in kinds):
            votes[tuple(table[kind] for kind in kinds)] += 1
    return dict(zip(kinds, votes.most_common(1)[0][0], strict=True)) if votes else None


@lru_cache
def _tables(gguf: Any) -> list[Any]:
    """The name maps of one block of every architecture."""
    return [gguf.get_tensor_name_map(kind, 1) for kind in gguf.MODEL_ARCH]


def open_gguf(path: Path) -> Any:
    """A memory-mapped reader of a GGUF file. Raises CheckpointError where the file is not a whole GGUF."""
    gguf = package("reading a GGUF file")

    class Reader(gguf.GGUFReader):  # type: ignore[misc, name-defined]
        def _get(self, offset: int, dtype: Any, count: int = 1, *rest: Any, **named: Any) -> Any:
            """What lies in the file; GGUFReader itself goes on for as many items as a header says."""
            found = super()._get(offset, dtype, count, *rest, **named)
            if len(found) < count:
                raise ValueError("it ends before its header says")
            return found

    try:
        return Reader(path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from None
    except (ValueError, KeyError, IndexError, TypeError, OverflowError, RecursionError) as error:
        raise CheckpointError(f"{path}: is no whole GGUF file ({str(error)[:100]}); get it again") from None
