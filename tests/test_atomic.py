"""cachetrain/atomic.py: what may be replaced by a file or directory that is written."""

import os
import stat

import pytest

from cachetrain.atomic import atomic_write, staged_directory, staged_file


def write(path):
    atomic_write(path, b"new")


def stage_file(path):
    with staged_file(path) as stage:
        stage.write_bytes(b"new")


def stage_directory(path):
    with staged_directory(path, overwrite=True) as stage:
        (stage / "file").write_bytes(b"new")


@pytest.mark.parametrize("writer", [write, stage_file, stage_directory])
@pytest.mark.parametrize("through_a_link", [False, True])
def test_device_or_pipe_is_never_replaced(tmp_path, writer, through_a_link):
    """As --out /dev/full would do for root."""
    path = tmp_path / "pipe"
    os.mkfifo(path)
    if through_a_link:
        path = tmp_path / "link"
        path.symlink_to("pipe")
    with pytest.raises((OSError, ValueError), match="choose another"):
        writer(path)
    assert stat.S_ISFIFO(os.stat(path).st_mode) and path.is_symlink() == through_a_link
    assert sorted(os.listdir(tmp_path)) == sorted({"pipe", path.name})


def test_directory_does_not_replace_a_file_nor_a_link(tmp_path):
    (tmp_path / "file").write_text("old")
    (tmp_path / "directory").mkdir()
    (tmp_path / "link").symlink_to("directory")
    for name in ("file", "link"):
        with pytest.raises(ValueError, match="is not a directory"):
            stage_directory(tmp_path / name)
    assert (tmp_path / "file").read_text() == "old" and os.listdir(tmp_path / "directory") == []
    stage_directory(tmp_path / "directory")
    assert os.listdir(tmp_path / "directory") == ["file"]


@pytest.mark.parametrize("writer", [write, stage_file])
def test_file_replaces_a_file_a_link_to_one_and_a_link_to_nothing(tmp_path, writer):
    (tmp_path / "target").write_text("old")
    (tmp_path / "link").symlink_to("target")
    (tmp_path / "dangling").symlink_to("nowhere")
    for name in ("target", "link", "dangling", "new"):
        writer(tmp_path / name)
        assert (tmp_path / name).read_bytes() == b"new" and not (tmp_path / name).is_symlink()
