"""The importance matrix in its two formats, to the byte; files that are not one."""

import struct

import numpy as np
import pytest

from lowmem_wanda.errors import CheckpointError
from lowmem_wanda.llamacpp.imatrix import About, Entry, read, write

ENTRIES = {
    "blk.0.ffn_up.weight": Entry(np.array([[2.0, 4.0, 8.0]]), np.array([8])),
    "blk.0.ffn_up_exps.weight": Entry(np.array([[1.0, 2.0], [3.0, 9.0]]), np.array([2, 6])),
}


SHAPES = {name: entry.sums.shape for name, entry in ENTRIES.items()}


ABOUT = About(("a.txt", "b.txt"), 2, 4)


def string(text):
    return struct.pack("<Q", len(text)) + text.encode()


def golden_gguf():
    """The file of ENTRIES by the GGUF specification, version 3: little-endian, tensors aligned to 32 bytes, the
    first dimension the one that runs fastest."""
    head = b"GGUF" + struct.pack("<IQQ", 3, 4, 4)
    head += string("general.type") + struct.pack("<I", 8) + string("imatrix")
    head += string("imatrix.datasets") + struct.pack("<IIQ", 9, 8, 2) + string("a.txt") + string("b.txt")
    head += string("imatrix.chunk_count") + struct.pack("<II", 4, 2)
    head += string("imatrix.chunk_size") + struct.pack("<II", 4, 4)
    tensors = [
        ("blk.0.ffn_up.weight.in_sum2", (3,), (2, 4, 8)),
        ("blk.0.ffn_up.weight.counts", (1,), (8,)),
        ("blk.0.ffn_up_exps.weight.in_sum2", (2, 2), (1, 2, 3, 9)),
        ("blk.0.ffn_up_exps.weight.counts", (1, 2), (2, 6)),
    ]
    data = b""
    for name, shape, values in tensors:
        head += string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, 0, len(data))
        data += struct.pack(f"<{len(values)}f", *values).ljust(32, b"\0")
    return head.ljust(-(-len(head) // 32) * 32, b"\0") + data


def golden_dat():
    """The same in the older format: chunks are counted up, values are means times that."""
    made = struct.pack("<i", 2)
    for name, calls, values in (
        ("blk.0.ffn_up.weight", 2, (0.5, 1, 2)),
        ("blk.0.ffn_up_exps.weight", 2, (1, 2, 1, 3)),
    ):
        made += struct.pack("<i", len(name)) + name.encode() + struct.pack("<ii", calls, len(values))
        made += struct.pack(f"<{len(values)}f", *values)
    return made + struct.pack("<ii", 2, 5) + b"b.txt"


@pytest.mark.parametrize(("suffix", "golden"), [(".gguf", golden_gguf()), (".dat", golden_dat())])
def test_files_are_the_formats_to_the_byte(tmp_path, suffix, golden):
    path = tmp_path / f"imatrix{suffix}"
    write(path, SHAPES, ENTRIES.items(), ABOUT)
    assert path.read_bytes() == golden and list(tmp_path.iterdir()) == [path]
    found, about = read(path)
    assert list(found) == list(ENTRIES) and about.chunks == 2
    means = found["blk.0.ffn_up.weight"].means
    assert np.array_equal(means, ENTRIES["blk.0.ffn_up.weight"].means)
    if suffix == ".gguf":
        assert about == ABOUT
        assert np.array_equal(found["blk.0.ffn_up_exps.weight"].means, [[0.5, 1], [0.5, 1.5]])


def test_an_expert_that_saw_nothing_has_ones_in_the_older_format(tmp_path):
    entry = Entry(np.array([[4.0, 8.0], [0.0, 0.0]]), np.array([4, 0]))
    write(tmp_path / "a.dat", {"x": (2, 2)}, [("x", entry)], About(("t",), 1, 4))
    assert np.array_equal(read(tmp_path / "a.dat")[0]["x"].sums, [[1, 2, 1, 1]])


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"GGUF",
        golden_gguf()[:200],
        golden_gguf()[:-40],
        golden_dat()[:30],
        struct.pack("<i", 0),
        struct.pack("<ii", 5, 1 << 30),
        struct.pack("<i", 1) + struct.pack("<i", -1),
        b'{"a": 1}' * 9,
    ],
)
def test_files_that_are_none_are_refused(tmp_path, content):
    (tmp_path / "x.gguf").write_bytes(content)
    with pytest.raises(CheckpointError, match="x.gguf: "):
        read(tmp_path / "x.gguf")


def hostile(*values):
    """A GGUF of one key."""
    return b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + string("a") + b"".join(struct.pack(*value) for value in values)


@pytest.mark.parametrize(
    "content",
    [hostile(("<IIQ", 9, 0, 1 << 40)), hostile(("<IIQ", 9, 8, 1 << 40)), hostile(*[("<IIQ", 9, 9, 1)] * 3000)],
    ids=["long", "long strings", "nested"],
)
def test_a_gguf_that_promises_too_much_is_refused(tmp_path, content):
    (tmp_path / "x.gguf").write_bytes(content)
    with pytest.raises(CheckpointError, match="not a whole GGUF file"):
        read(tmp_path / "x.gguf")


@pytest.mark.parametrize(
    ("key", "value"),
    [("chunk_count", "many"), ("chunk_size", float("nan")), ("datasets", 7), ("chunk_count", [1, 2]), ("counts", 0)],
)
def test_an_importance_matrix_that_says_nonsense_is_refused(tmp_path, key, value):
    import gguf

    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "x")
    if key != "counts":
        add = {str: writer.add_string, float: writer.add_float32, int: writer.add_uint32, list: writer.add_array}
        add[type(value)](f"imatrix.{key}", value)
    writer.add_tensor("a.in_sum2", np.ones(4, np.float32))
    writer.add_tensor("a.counts", np.full(1 if key != "counts" else 4, np.nan if key == "counts" else 1, np.float32))
    writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file(), writer.close()
    with pytest.raises(CheckpointError, match="x.gguf: "):
        read(tmp_path / "x.gguf")


def test_a_gguf_without_sums_is_refused(tmp_path):
    import gguf

    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_tensor("blk.0.attn_q.weight", np.zeros((2, 2), np.float32))
    writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file(), writer.close()
    with pytest.raises(CheckpointError, match="not an importance matrix"):
        read(tmp_path / "model.gguf")
