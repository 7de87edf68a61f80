"""GGUF files by bytes: as the gguf package reads them, back to the same bytes, and hostile ones refused."""

import struct

import gguf
import moe_ggufs
import numpy as np
import pytest

from lowmem_wanda.errors import CheckpointError, LowmemError
from lowmem_wanda.llamacpp.gguf_file import header_of, is_gguf, part_name, read_gguf
from lowmem_wanda.llamacpp.gguf_values import Field


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return moe_ggufs.write(
        tmp_path_factory.mktemp("gguf") / "model.gguf", "deepseek2", kind=gguf.GGMLQuantizationType.Q8_0
    )


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("split")
    moe_ggufs.write(folder / "model.gguf", "qwen3moe", split=10)
    return sorted(folder.iterdir())


def content(tensor):
    return b"".join(tensor.pieces(1000))


def test_tensors_and_values_are_those_that_the_gguf_package_reads(model):
    read, reference = read_gguf(model), gguf.GGUFReader(model)
    assert list(read.tensors) == [tensor.name for tensor in reference.tensors]
    for tensor in reference.tensors:
        mine = read.tensors[tensor.name]
        assert (mine.dtype, list(mine.shape[::-1])) == (tensor.tensor_type.name, list(tensor.shape))
        assert content(mine) == tensor.data.tobytes()
    values = {key: field.value for key, field in read.fields.items()}
    assert values == {key: field.contents() for key, field in reference.fields.items() if not key.startswith("GGUF.")}


def test_the_header_is_written_back_to_the_same_bytes(model):
    read = read_gguf(model)
    header = header_of(read.fields, read.tensors.values(), read.version, read.alignment)
    assert model.read_bytes().startswith(header)
    assert next(iter(read.tensors.values())).offset == len(header)


def test_spans_are_read_one_after_another(model):
    tensor = read_gguf(model).tensors["blk.1.ffn_down_exps.weight"]
    whole = content(tensor)
    assert b"".join(tensor.pieces(7, [(0, 5), (50, 70)])) == whole[:5] + whole[50:70]


def test_a_split_file_is_read_by_its_first_part(parts, tmp_path):
    whole = read_gguf(moe_ggufs.write(tmp_path / "whole.gguf", "qwen3moe"))
    read = read_gguf(parts[0])
    assert len(parts) == len(read.files) > 2 and read.nbytes == sum(part.stat().st_size for part in parts)
    assert list(read.tensors) == list(whole.tensors) and read.fields == whole.fields
    assert all(content(read.tensors[name]) == content(tensor) for name, tensor in whole.tensors.items())


def test_parts_that_do_not_belong_together_are_refused(parts, tmp_path):
    with pytest.raises(CheckpointError, match=f"not the first part; give {parts[0].name}"):
        read_gguf(parts[1])
    copies = [tmp_path / part.name for part in parts]
    for part, copy in zip(parts, copies, strict=True):
        copy.write_bytes(part.read_bytes())
    copies[2].write_bytes(parts[1].read_bytes())
    with pytest.raises(CheckpointError, match="is not part 3 of"):
        read_gguf(copies[0])
    copies[2].unlink()
    with pytest.raises(CheckpointError, match=f"{copies[2].name}: cannot be read"):
        read_gguf(copies[0])
    renamed = copies[0].rename(tmp_path / "model.gguf")
    with pytest.raises(CheckpointError, match=r"does not end in -00001-of-\d{5}\.gguf; rename it back"):
        read_gguf(renamed)


def test_names_of_parts_are_llama_cpps(tmp_path):
    assert part_name(tmp_path / "a.gguf", 1, 12) == "a-00002-of-00012.gguf"
    assert part_name(tmp_path / "a-00001-of-00012.gguf", 11, 12) == "a-00012-of-00012.gguf"


def test_what_is_a_gguf_is_told_by_name_or_content(model, tmp_path):
    other = tmp_path / "model.bin"
    other.write_bytes(model.read_bytes())
    assert is_gguf(model) and is_gguf(other) and is_gguf("missing.gguf")
    assert not is_gguf(tmp_path) and not is_gguf("missing") and not is_gguf(__file__)


def string(text):
    return struct.pack("<Q", len(text)) + text.encode()


def tensor(name="a", dims=(32,), kind=0, offset=0):
    return string(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def file(tensors=(), fields=(), version=3, tensor_count=None, field_count=None, data=b"\0" * 256):
    count = len(tensors) if tensor_count is None else tensor_count
    fields_held = len(fields) if field_count is None else field_count
    head = b"GGUF" + struct.pack("<IQQ", version, count, fields_held) + b"".join([*fields, *tensors])
    return head + bytes(-len(head) % 32) + data


ALIGNMENT = string("general.alignment") + struct.pack("<II", 4, 3)
HOSTILE = {
    "empty": (b"", "ends within its header"),
    "text": (b"hello, this is no GGUF at all", "does not begin with GGUF"),
    "version 1": (file(version=1), "is GGUF version 1, of 2023; convert"),
    "big-endian": (file(version=3 << 24), "big-endian"),
    "tensors without end": (file(tensor_count=1 << 60, data=b""), "ends within its header"),
    "fields without end": (file(field_count=1 << 60, data=b""), "ends within its header"),
    "a string without end": (file(fields=[struct.pack("<Q", 1 << 62)]), "ends within its header"),
    "an array without end": (file(fields=[string("a") + struct.pack("<IIQ", 9, 8, 1 << 60)]), "ends within its header"),
    "arrays within arrays": (
        file(fields=[string("a") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 9]),
        "an array holds arrays",
    ),
    "an unknown value": (file(fields=[string("a") + struct.pack("<I", 77)]), "a value has the type 77"),
    "a key twice": (file(fields=[string("a") + struct.pack("<IB", 0, 1)] * 2), "a stands in it twice"),
    "a name that is not UTF-8": (file(fields=[struct.pack("<Q", 2) + b"\xff\xfe" + struct.pack("<IB", 0, 1)]), "utf-8"),
    "an odd alignment": (file(fields=[ALIGNMENT]), "alignment is not a power of two"),
    "a tensor twice": (file(tensors=[tensor(), tensor(offset=128)]), "tensor a stands in it twice"),
    "overlapping tensors": (file(tensors=[tensor(), tensor("b")]), "begins at byte 0 instead of 128"),
    "a gap": (file(tensors=[tensor(offset=32)]), "begins at byte 32 instead of 0"),
    "a tensor past the end": (file(tensors=[tensor(dims=(1 << 50,))]), "ends at byte"),
    "too many dimensions": (file(tensors=[tensor(dims=(1,) * 5)]), "5 dimensions"),
    "no dimensions": (file(tensors=[tensor(dims=())]), "0 dimensions"),
    "an empty dimension": (file(tensors=[tensor(dims=(0,))]), "cannot be"),
    "half a block": (file(tensors=[tensor(dims=(48,), kind=8)]), "cannot be"),
    "a type that was removed": (file(tensors=[tensor(kind=4)]), "removed it: get the model in another quantization"),
    "an unknown type": (file(tensors=[tensor(kind=4000)]), "pip install --upgrade gguf"),
}


@pytest.mark.parametrize(("data", "message"), HOSTILE.values(), ids=list(HOSTILE))
def test_a_hostile_file_is_refused_in_one_sentence(tmp_path, data, message):
    (tmp_path / "bad.gguf").write_bytes(data)
    with pytest.raises(CheckpointError, match=message):
        read_gguf(tmp_path / "bad.gguf")


def test_a_file_that_was_cut_short_anywhere_is_refused(model, tmp_path):
    data, bad = model.read_bytes(), tmp_path / "bad.gguf"
    for end in [*range(0, 6000, 97), len(data) // 2, len(data) - 40]:
        bad.write_bytes(data[:end])
        with pytest.raises(CheckpointError):
            read_gguf(bad)


def test_bytes_changed_at_random_are_read_or_refused(model, tmp_path):
    data, bad, random = model.read_bytes(), tmp_path / "bad.gguf", np.random.default_rng(0)
    refused = 0
    for _ in range(300):
        changed = bytearray(data)
        changed[random.integers(4, 9000)] = random.integers(256)
        bad.write_bytes(changed)
        try:
            read_gguf(bad)
        except LowmemError:
            refused += 1
    assert refused > 20


def test_a_folder_and_a_missing_file_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="is a folder; give a .gguf file"):
        read_gguf(tmp_path)
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_gguf(tmp_path / "missing.gguf")


def test_a_header_is_not_read_without_bound(tmp_path, monkeypatch):
    monkeypatch.setattr("lowmem_wanda.llamacpp.gguf_values.MOST", 1000)
    (tmp_path / "long.gguf").write_bytes(file(fields=[string("a") + struct.pack("<I", 8) + string("x" * 2000)]))
    with pytest.raises(CheckpointError, match="longer than"):
        read_gguf(tmp_path / "long.gguf")


def test_fields_are_made_as_they_are_read():
    assert Field.text("é").value == "é" and Field.number(4, 7).value == 7
