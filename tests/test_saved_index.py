"""Index files (--save_index): a start with one lists what a start without it lists, whatever has changed since."""

import json
import os
import shutil
import signal

import numpy as np
import pytest
import torch
from helpers import T5
from runs import Runs
from safetensors.numpy import load_file
from safetensors.torch import save_file

from cachetrain import atomic
from cachetrain.data import index as reading
from cachetrain.data import index_file as index_file_format
from cachetrain.data import saved_index
from cachetrain.data.index import PairIndex
from cachetrain.data.saved_index import IndexFiles
from cachetrain.data.sidecar import layout_of, read_header, read_sidecar, write_sidecar
from cachetrain.data.walk import Leftovers, find_images, find_sidecars

COUNTS = ("num_unpaired", "num_without_image", "num_alone", "num_without_pair", "num_masked", "num_foreign")
COLUMNS = ("repeats", "shape_ids", "image_bytes", "tokens", "all_tokens", "blocks")


@pytest.fixture(autouse=True)
def settle(monkeypatch):
    monkeypatch.setattr(
        saved_index, "SETTLE_S", 0.02
    )  # the clock of Linux's file systems has steps of 0.01 s at most


@pytest.fixture(scope="module")
def model_folder(shapes, tmp_path_factory):
    """24 pairs in 4 folders: of two sizes, some without image, header or partner, one with variants and a mask."""
    root = tmp_path_factory.mktemp("saved") / "data"
    folders = [root, root / "a ü", root / "a ü" / "5_b", root / os.fsdecode(b"c\xff")]
    for number, path in enumerate(sorted(shapes.glob("0*.*"))):
        folders[number % 4].mkdir(exist_ok=True, parents=True)
        shutil.copy2(path, folders[int(path.stem) % 4])
    (root / "a ü" / "multiply.txt").write_text("1.5")
    (root / "00004.png").unlink()
    (root / "00008.img_sdxl").unlink()
    latents, header = read_sidecar(root / "00004.img_sdxl")
    write_sidecar(root / "00004.img_sdxl", {"latent": latents["latent"][:, :, :6]}, header.metadata)
    latents["mask"] = torch.ones(1, *latents["latent"].shape[1:])
    write_sidecar(root / "00012.img_sdxl", latents, header.metadata | {"mask_share": "1"})
    (emb, header), stem = read_sidecar(root / "00016.txt_t5cache"), root / "00016.txt_t5cache"
    fields = {"num_tokens.1": str(len(emb["emb"])), "variants": '{".txt":[[0],[1]]}'}
    write_sidecar(stem, emb | {"emb.1": emb["emb"].clone()}, header.metadata | fields)
    return root


@pytest.fixture
def folder(model_folder, tmp_path):
    return shutil.copytree(model_folder, tmp_path / "data")


class Reads(list):
    """The paths of the headers that are read."""


@pytest.fixture
def reads(monkeypatch):
    paths, read = Reads(), reading.read_header
    monkeypatch.setattr(reading, "read_header", lambda path: (paths.append(os.fspath(path)), read(path))[1])
    return paths


def listed(*roots, save=False, suffixes=T5, **options):
    return PairIndex(list(map(os.fspath, roots)), *suffixes, index_files=IndexFiles(save), **options)


def index_file(folder, name="index.img_sdxl.txt_t5cache.safetensors"):
    return folder / ".cachetrain" / name


def check_same(index, *roots, suffixes=T5, **options):
    """Compares an index with one that reads all headers."""
    plain = PairIndex(list(map(os.fspath, roots)), *suffixes, **options)
    for name in COLUMNS:
        a, b = getattr(index, name), getattr(plain, name)
        assert a.dtype == b.dtype and np.array_equal(a, b), name
    for name in (*COUNTS, "shapes", "caption_sources", "image_headers", "text_header", "directories"):
        assert getattr(index, name) == getattr(plain, name), name
    assert list(map(index.stem, range(len(index)))) == list(map(plain.stem, range(len(plain))))
    assert list(index.numbered_folders) == list(plain.numbered_folders) and index.checksum() == plain.checksum()


# Fresh


def test_a_start_with_an_index_file_reads_the_first_headers_only_and_lists_the_same(folder, reads, capsys):
    check_same(listed(folder, save=True), folder)
    assert f"{index_file(folder)}: saved, with 23 pairs in 4 folders" in capsys.readouterr().out
    del reads[:]
    index = listed(folder)
    assert set(reads) == {index.image_path(0), index.text_path(0)}
    assert f"{index_file(folder)}: used in place of reading headers" in capsys.readouterr().out
    check_same(index, folder)
    assert (index.num_masked, index.num_unpaired, index.caption_sources, len(index.shapes)) == (1, 1, [".txt"], 2)


@pytest.mark.parametrize("options", [{"repeats": [2.5]}, {"kohya_repeats": True}])
def test_repeats_of_a_start_are_its_own(options, folder, reads):
    listed(folder, save=True)
    check_same(listed(folder, **options), folder, **options)


def test_a_start_with_other_suffixes_has_an_index_file_of_its_own(folder, reads):
    listed(folder, save=True)
    clip = (T5[0], ".txt_clipl")
    del reads[:]
    index = listed(folder, suffixes=clip, save=True)
    assert len(set(reads)) == 2 * 23
    check_same(index, folder, suffixes=clip)
    del reads[:]
    assert listed(folder).num_pairs == 23 and len(set(reads)) == 2
    options = {"one_text": str(folder.parent / "one")}
    for change in (lambda _: None, replace):  # of the caption of all
        change(folder)
        shutil.copy(folder / "00012.txt_t5cache", options["one_text"])
        check_same(listed(folder, save=change is not replace, **options), folder, **options)


def test_an_index_file_of_other_suffixes_is_refused(folder, capsys):
    listed(folder, save=True)
    other = index_file(folder, "index.img_sdxl.txt_clipl.safetensors")
    shutil.copy(index_file(folder), other)
    clip = (T5[0], ".txt_clipl")
    check_same(listed(folder, suffixes=clip), folder, suffixes=clip)
    assert "not used (of sidecars with other suffixes" in capsys.readouterr().err


def test_several_directories_nested_ones_and_links_between_them_are_listed_as_without(
    folder, shapes, tmp_path, capsys
):
    shapes = shutil.copytree(shapes, tmp_path / "shapes")
    inner = folder / "a ü"
    (tmp_path / "link").symlink_to(folder, target_is_directory=True)
    linked = tmp_path / "linked"
    linked.mkdir()
    for path in [*sorted(inner.glob("0*.*"))[:8], *sorted(shapes.glob("00000.*"))]:
        (linked / path.name).symlink_to(path)
    orders = [
        (folder, shapes),
        (inner, folder),
        (folder, inner),
        (linked, folder),
        (folder, linked),
        (shapes, linked),
    ]
    for roots in [*orders, *orders]:
        check_same(listed(*roots, save=True), *roots)
    check_same(listed(tmp_path / "link"), tmp_path / "link")
    shutil.rmtree(folder / ".cachetrain")
    check_same(listed(linked, folder, save=True), linked, folder)
    check_same(listed(folder), folder)  # of which the links had taken some pairs
    assert "not used" not in capsys.readouterr().err


def test_sidecars_without_a_header_are_counted_as_without(folder):
    for path in folder.rglob("*.txt_t5cache"):
        save_file({"emb": read_sidecar(path)[0]["emb"]}, path)
    listed(folder, save=True)
    index = listed(folder)
    assert index.num_foreign == 23
    check_same(index, folder)


def test_other_tools_take_no_notice_of_index_files(folder):
    found = []
    for save in (False, True):
        listed(folder, save=save)
        leftovers = Leftovers(".img_sdxl")
        pairs = list(find_images([str(folder)], pytest.fail, leftovers))
        found.append((pairs, leftovers.unused.line(), list(find_sidecars([str(folder)], [".safetensors", *T5]))))
    assert found[0] == found[1] and index_file(folder).exists()


# Stale


def add(folder):
    for suffix in T5:
        shutil.copy(folder / f"00000{suffix}", folder / f"00099{suffix}")


def remove(folder):
    (folder / "00000.txt_t5cache").unlink()


def replace(folder):
    tensors, header = read_sidecar(folder / "00012.txt_t5cache")
    write_sidecar(folder / "00012.txt_t5cache", {"emb": tensors["emb"][:2]}, header.metadata | {"num_tokens": "2"})


def rename(folder):
    (folder / "a ü").rename(folder / "d")


def new_folder(folder):
    (folder / "e" / "f").mkdir(parents=True)
    shutil.copy(folder / "00000.img_sdxl", folder / "e" / "f")
    shutil.copy(folder / "00000.txt_t5cache", folder / "e" / "f")


def remove_folder(folder):
    shutil.rmtree(folder / "a ü")


def image_gone(folder):
    (folder / "00000.png").unlink()


def multiply(folder):
    (folder / "a ü" / "multiply.txt").write_text("3.5")


@pytest.mark.parametrize("change", [add, remove, replace, rename, new_folder, remove_folder, image_gone])
def test_a_folder_with_another_list_of_files_is_listed_and_read_again_alone(change, folder, reads, capsys):
    listed(folder, save=True)
    change(folder)
    del reads[:]
    index = listed(folder, save=True)
    untouched = {path for path in reads if os.fsencode(path).startswith(os.fsencode(folder) + b"/c\xff")}
    assert not untouched and 2 < len(reads) < 40
    check_same(index, folder)
    assert "changed since it was saved, and are read again, the first" in capsys.readouterr().out
    del reads[:]
    check_same(listed(folder), folder)


def test_multiply_txt_counts_as_it_is_now_even_if_edited_in_place(folder, reads):
    listed(folder, save=True)
    multiply(folder)
    del reads[:]
    index = listed(folder)
    assert len(set(reads)) == 2 and 3.5 in index.repeats
    check_same(index, folder)


def test_sidecars_written_over_in_place_are_noticed_when_read(folder):
    listed(folder, save=True)
    path = folder / "00012.img_sdxl"
    tensors, header = read_sidecar(path)
    write_sidecar(folder.parent / "other", {"latent": tensors["latent"][:, :, :4]}, header.metadata)
    path.write_bytes((folder.parent / "other").read_bytes())
    index = listed(folder)
    place = list(map(index.stem, range(len(index)))).index(str(folder / "00012"))
    with pytest.raises(ValueError, match=r"00012\.img_sdxl: replaced since it was listed: the latent was"):
        index.image_sidecar(place)


def test_sidecars_of_another_model_written_in_place_make_the_file_useless(folder, reads, capsys):
    listed(folder, save=True)
    for path in folder.rglob("*.txt_t5cache"):
        tensors, header = read_sidecar(path)
        write_sidecar(folder.parent / "other", tensors, header.metadata | {"encoder": "e" * 64})
        path.write_bytes((folder.parent / "other").read_bytes())
    del reads[:]
    check_same(listed(folder, save=True), folder)
    assert "its index file is of sidecars made with another model" in capsys.readouterr().err
    del reads[:]
    listed(folder)
    assert len(set(reads)) == 2


def test_linked_sidecars_and_links_that_lead_nowhere_are_looked_at_at_each_start(folder, shapes, tmp_path):
    """Their folder keeps its time when what they lead to changes."""
    target = shutil.copytree(folder / "a ü", tmp_path / "elsewhere")
    (folder / "links").mkdir()
    for path in target.glob("*.txt_t5cache"):
        (folder / "links" / path.name).symlink_to(path)
        shutil.copy(path.with_suffix(".img_sdxl"), folder / "links")
    (folder / "d").mkdir()
    (folder / "d" / "later").symlink_to(tmp_path / "mount")
    listed(folder, save=True)
    path = next(target.glob("*.txt_t5cache"))
    tensors, header = read_sidecar(path)
    write_sidecar(path, {"emb": tensors["emb"][:2]}, header.metadata | {"num_tokens": "2"})
    shutil.copytree(folder / "a ü", tmp_path / "mount")
    check_same(listed(folder), folder)
    assert len(listed(folder)) == 23 + 6 + 12


def test_what_changes_while_it_is_listed_or_read_is_not_relied_on(folder, monkeypatch, capsys):
    read, busy = reading.read_header, folder / "a ü"

    def change(path):
        if "a ü/0" in str(path):
            (busy / "new").touch()
        return read(path)

    monkeypatch.setattr(reading, "read_header", change)
    listed(folder, save=True)
    assert "in 3 folders; 1 folder left out, which changed meanwhile or hold links" in capsys.readouterr().out
    monkeypatch.undo()
    monkeypatch.setattr(saved_index, "SETTLE_S", 5.0)
    monkeypatch.setattr(saved_index.time, "sleep", lambda _: (busy / "new").touch())  # it never stands still
    shutil.rmtree(folder / ".cachetrain")
    listed(folder, save=True)
    assert "saved, with 0 pairs in 0 folders" in capsys.readouterr().out
    check_same(listed(folder), folder)


# Damaged, killed, not to be written


def cut(data):
    return data[: len(data) // 2]


def flip(data):
    start, layout = layout_of(data)
    place = start + layout["tokens"][2]
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


def flip_header(data):
    return data[:300] + bytes([data[300] ^ 1]) + data[301:]


@pytest.mark.parametrize("damage", [cut, flip, flip_header, lambda _: b"", lambda _: b"{}" * 50])
def test_a_damaged_file_is_named_and_never_used(damage, folder, capsys):
    listed(folder, save=True)
    index_file(folder).write_bytes(damage(index_file(folder).read_bytes()))
    check_same(listed(folder), folder)
    assert f"warning: {index_file(folder)}: not used (damaged), so all headers are read" in capsys.readouterr().err
    listed(folder, save=True)
    capsys.readouterr()
    listed(folder)
    assert "used in place" in capsys.readouterr().out


def test_a_sidecar_or_a_file_of_another_version_in_its_place_is_named(folder, monkeypatch, capsys):
    monkeypatch.setattr(index_file_format, "FORMAT", "0")
    listed(folder, save=True)
    monkeypatch.undo()
    check_same(listed(folder), folder)
    assert "not used (of format 0, this version reads 1)" in capsys.readouterr().err
    shutil.copy(folder / "00000.img_sdxl", index_file(folder))
    check_same(listed(folder), folder)
    assert "not used (damaged)" in capsys.readouterr().err


def rewritten(path, change):
    """Rewrites an index file with right hashes."""
    arrays, header = load_file(path), read_header(path)
    fields = json.loads(header.metadata["index"])
    change(arrays, fields)
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    write_sidecar(path, tensors, {"kind": "index", "index": json.dumps(fields)})


@pytest.mark.parametrize(
    "change",
    [
        lambda arrays, _: arrays["stems"].__setitem__(slice(0, 2), list(b"/x")),
        lambda arrays, _: arrays["subfolders"].__setitem__(0, ord(".")),
        lambda arrays, _: arrays["shape_ids"].__setitem__(0, 99),
        lambda arrays, _: arrays["counts"].__setitem__((0, 0), 99),
        lambda arrays, _: arrays.update(tokens=arrays["tokens"][1:].copy()),
        lambda arrays, _: arrays.update(times=arrays["times"][1:].copy()),
        lambda arrays, _: arrays.update(all_tokens=arrays["all_tokens"].astype(np.float32)),
        lambda arrays, _: arrays.pop("foreign") is None,
        lambda _, fields: fields.update(identities=5),
        lambda _, fields: fields.pop("sources"),
    ],
)
def test_a_file_that_was_not_saved_here_is_named_and_never_used(change, folder, capsys):
    listed(folder, save=True)
    rewritten(index_file(folder), lambda *_: None)
    assert listed(folder).num_pairs == 23 and "used in place of reading headers" in capsys.readouterr().out
    rewritten(index_file(folder), change)
    check_same(listed(folder), folder)
    assert "not used (damaged)" in capsys.readouterr().err


def test_a_save_that_is_killed_leaves_the_old_file_and_nothing_else_in_the_end(folder):
    listed(folder, save=True)
    before = index_file(folder).read_bytes()
    add(folder)
    if not (child := os.fork()):
        atomic.os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        try:
            listed(folder, save=True)
        finally:
            os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert index_file(folder).read_bytes() == before and len(list(index_file(folder).parent.iterdir())) == 2
    check_same(listed(folder, save=True), folder)
    assert [path.name for path in index_file(folder).parent.iterdir()] == [index_file(folder).name]


def test_a_directory_that_cannot_be_written_to_is_an_error_before_headers_are_read(folder, reads, monkeypatch):
    (folder / ".cachetrain").touch()
    with pytest.raises(OSError, match=r"--save_index cannot write there: .*/data/\.cachetrain"):
        listed(folder, save=True)
    (folder / ".cachetrain").unlink()
    monkeypatch.setattr(saved_index, "_times", lambda _: (0, 0))
    with pytest.raises(OSError, match="has times that do not change with its files; omit --save_index"):
        listed(folder, save=True)
    assert reads == []


# Training


def test_training_with_an_index_file_is_training_without(folder, model_t5, tmp_path, capsys):
    runs = Runs(folder, model_t5, tmp_path)
    flags = ["--batch_size", 5, "--max_steps", 4, "--val_split", 0.3, "--cond_dropout", 0]
    plain = runs.train(tmp_path / "saving", *flags, "--save_index")  # lists all and reads all headers
    assert "saved, with 23 pairs" in capsys.readouterr().out
    assert runs.train(tmp_path / "saved", *flags) == plain
    assert "used in place of reading headers" in capsys.readouterr().out
