"""How tensors are copied from their files: which files are mapped, and what a file that is cut short is."""

import mmap

import numpy as np
import pytest
from helpers import save_tiny

from lowmem_wanda.checkpoint import loading
from lowmem_wanda.checkpoint.reader import read_header
from lowmem_wanda.errors import CheckpointError


def test_a_piece_whose_file_ends_is_no_crash(tmp_path):
    (tmp_path / "file").write_bytes(b"x" * 3 * mmap.PAGESIZE)
    out = np.zeros(2 * mmap.PAGESIZE, np.uint8)
    with open(tmp_path / "file", "r+b") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        assert loading._copy(mapped, 7, out) and (out == ord("x")).all()
        file.truncate(mmap.PAGESIZE)
        if loading.library("process_vm_readv"):
            assert not loading._copy(mapped, 7, out)


def test_a_file_cut_short_between_two_looks_is_an_error(tmp_path, monkeypatch):
    source = save_tiny(tmp_path / "source", "llama")
    tensor = max(read_header(next(source.glob("*.safetensors"))).values(), key=lambda one: one.nbytes)
    monkeypatch.setattr(loading, "_copy", lambda mapped, skip, out: False)
    with pytest.raises(CheckpointError, match="cut short while this ran"):
        loading.read([(tensor, np.empty(tensor.nbytes, np.uint8))], "mmap")


def test_a_link_to_a_file_elsewhere_is_read_as_files_are_there(tmp_path, monkeypatch):
    source = save_tiny(tmp_path / "away", "llama")
    (tmp_path / "here").mkdir()
    for shard in source.glob("*.safetensors"):
        (tmp_path / "here" / shard.name).symlink_to(shard)
    monkeypatch.setattr(loading, "is_local", lambda folder: folder == tmp_path.resolve() / "here")
    for folder, way in (("here", "pread"), ("away", "pread")):
        tensor = next(iter(read_header(next((tmp_path / folder).glob("*.safetensors"))).values()))
        assert loading.read([(tensor, np.empty(tensor.nbytes, np.uint8))]) == {way}
