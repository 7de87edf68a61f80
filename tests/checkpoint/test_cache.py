"""Sources by folder, by the root of a model in a cache, and by name; the network only where it is asked for."""

import os
import shutil

import pytest
from helpers import save_tiny

from lowmem_wanda import Checkpoint, check, prune
from lowmem_wanda.cli.main import main
from lowmem_wanda.errors import CheckpointError


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A cache with one model of two snapshots, whose files are links into its blobs."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    root = tmp_path / "hub/models--org--tiny"
    made = save_tiny(tmp_path / "made", "llama", shard="1GB")
    for revision in ("abc", "def"):
        folder = root / "snapshots" / revision
        folder.mkdir(parents=True)
        (root / "blobs").mkdir(exist_ok=True)
        for file in made.iterdir():
            shutil.copy(file, root / "blobs" / f"{revision}-{file.name}")
            (folder / file.name).symlink_to(os.path.relpath(root / "blobs" / f"{revision}-{file.name}", folder))
    (root / "refs").mkdir()
    (root / "refs/main").write_text("def\n")
    return root


def test_a_root_and_a_name_are_the_snapshot_of_main(root, tmp_path):
    for source in (root, str(root), "org/tiny"):
        assert Checkpoint(source).path == root / "snapshots/def"
    prune("org/tiny", tmp_path / "out", method="magnitude")
    assert not check(tmp_path / "out", "org/tiny").problems


def test_without_a_branch_the_only_snapshot_counts_and_several_are_named(root):
    (root / "refs/main").unlink()
    with pytest.raises(
        CheckpointError, match="holds 2 snapshots; give the folder of one: snapshots/abc, snapshots/def"
    ):
        Checkpoint("org/tiny")
    shutil.rmtree(root / "snapshots/abc")
    assert Checkpoint("org/tiny").path.name == "def"
    shutil.rmtree(root / "snapshots/def")
    with pytest.raises(CheckpointError, match="holds 0 snapshots; download it again"):
        Checkpoint(root)


@pytest.mark.parametrize("variable", ["HF_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"])
def test_the_cache_is_where_huggingface_hub_has_it(root, tmp_path, monkeypatch, variable):
    monkeypatch.delenv("HF_HUB_CACHE"), monkeypatch.delenv("HF_HOME", raising=False)
    place = {"HF_HUB_CACHE": tmp_path / "hub", "HF_HOME": tmp_path, "XDG_CACHE_HOME": tmp_path / "x"}[variable]
    if variable == "XDG_CACHE_HOME":
        (tmp_path / "x/huggingface").mkdir(parents=True)
        (tmp_path / "hub").rename(tmp_path / "x/huggingface/hub")
    monkeypatch.setenv(variable, str(place))
    assert Checkpoint("org/tiny").path.name == "def"


def test_a_folder_of_that_name_comes_first(root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tmp_path / "made", tmp_path / "org/tiny")
    assert str(Checkpoint("org/tiny").path) == "org/tiny"


def test_what_is_not_there_says_what_to_type(root):
    with pytest.raises(
        CheckpointError, match="org/other: is neither a folder nor a model in the local cache .*--download"
    ):
        Checkpoint("org/other")
    with pytest.raises(CheckpointError, match="no such directory"):
        Checkpoint("org/other/deeper")


def test_a_download_is_asked_for(root, tmp_path, monkeypatch, capsys):
    asked = []

    def snapshot_download(name, allow_patterns):
        asked.append((name, allow_patterns))
        return str(root / "snapshots/abc")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main(["prune", "org/new", str(tmp_path / "out"), "--method", "magnitude"]) == 1 and not asked
    assert "--download" in capsys.readouterr().err
    assert main(["prune", "org/new", str(tmp_path / "out"), "--method", "magnitude", "--download"]) == 0
    assert asked[0][0] == "org/new" and "*.safetensors" in asked[0][1] and "*.bin" not in asked[0][1]
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda *_, **__: (_ for _ in ()).throw(OSError("no network"))
    )
    assert main(["prune", "org/new", str(tmp_path / "out2"), "--download"]) == 1
    assert "org/new: cannot be downloaded (no network)" in capsys.readouterr().err
    assert main(["prune", "../secret", str(tmp_path / "out3"), "--download"]) == 1
    assert "is not the name of a model" in capsys.readouterr().err
