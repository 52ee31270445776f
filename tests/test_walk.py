"""cachetrain/data/walk.py and captions.py: one walk and one caption rule for caching, training and samples."""

import errno
import os
import unicodedata
from argparse import Namespace
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from cachetrain.caching.images import decode_file
from cachetrain.data.captions import Pair, read_caption
from cachetrain.data.index import PairIndex
from cachetrain.data.sidecar import read_sidecar, write_sidecar
from cachetrain.data.split import open_index, split_index
from cachetrain.data.unused import Unused
from cachetrain.data.variants import PLAIN, first_caption, read_captions
from cachetrain.data.walk import Folder, Leftovers, Pairs, find_images, find_sidecars, pair_up, walk_folders
from cachetrain.distributed import World
from cachetrain.sampling.prompts import caption_of

IMAGE, TEXT = ".img_sdxl", ".txt_t5cache"


@pytest.fixture
def tree(tmp_path):
    """A data directory in which every file could be a sidecar pair, with all that makes its order delicate."""
    root = tmp_path / "data"
    for name in (
        "b/1",
        "b/0",
        "a/x/2",
        "a/3",
        "a.b/4",
        "a b/5",
        "B/6",
        "0",
        "ü/7",
        ".hidden/8",
        "b/.9",
        "z/y/x/w/10",
    ):
        write_pair(root / name)
    write_pair(root / os.fsdecode(b"not \xff utf-8") / os.fsdecode(b"\xfe"))
    write_pair(root / "_null_caption")
    (root / "only_image").mkdir()
    (root / "only_image" / f"1{IMAGE}").write_bytes((root / f"0{IMAGE}").read_bytes())
    (root / "b" / "up").symlink_to(root)  # a circle
    (root / "A").symlink_to(root / "b")  # sorts before its target, so the pairs in it have this path
    (root / "c").symlink_to(tmp_path / "elsewhere")
    write_pair(tmp_path / "elsewhere" / "deep" / "11")
    (root / "dangling").symlink_to(tmp_path / "nowhere")
    (root / "self").symlink_to(root / "self")
    for folder, multiple in (("a", "3"), ("a/x", "0.5"), ("z", "2"), ("z/y/x", "1")):
        (root / folder / "multiply.txt").write_text(multiple)
    return root


def write_pair(stem):
    stem.parent.mkdir(parents=True, exist_ok=True)
    write_sidecar(f"{stem}{IMAGE}", {"latent": torch.zeros(4, 2, 2)}, {"kind": "img_sdxl"})
    write_sidecar(f"{stem}{TEXT}", {"emb": torch.zeros(3, 8)}, {"kind": "txt_t5cache"})


def pairs_by_os_walk(root):
    """Yields (stem, repeats) in the order in which runs have listed pairs since the first release."""
    visited, multiples = set(), {}
    for folder, subfolders, names in os.walk(root, followlinks=True):
        if (real := os.path.realpath(folder)) in visited:
            subfolders.clear()
            continue
        visited.add(real)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        multiple = multiples.pop(folder, 1.0)
        if "multiply.txt" in names:
            multiple = float((Path(folder) / "multiply.txt").read_text())
        multiples |= {os.path.join(folder, name): multiple for name in subfolders}
        names = [name for name in names if name[0] != "."]
        images = {name.removesuffix(IMAGE) for name in names if name.endswith(IMAGE)}
        texts = {name.removesuffix(TEXT) for name in names if name.endswith(TEXT)} - {"_null_caption"}
        yield from ((os.path.join(folder, stem), multiple) for stem in sorted(images & texts))


@pytest.mark.parametrize("root_as_given", ["{}", "{}/", "{}//", "{}/b/..", "{}/A"])
def test_pair_list_and_repeats_keep_their_order_so_that_old_runs_resume(tree, root_as_given):
    root = root_as_given.format(tree)
    expected = list(pairs_by_os_walk(root))
    index = PairIndex([root], IMAGE, TEXT)
    assert [(index.stem(i), index.repeats[i]) for i in range(len(index))] == expected
    assert len(expected) >= 10 or root.endswith("A")


def test_pairs_are_listed_depth_first_with_sorted_names(tree):
    index = PairIndex([str(tree)], IMAGE, TEXT)
    names = [os.fsencode(index.relative_name(i)) for i in range(len(index))]
    order = ["0", "A/0", "A/1", "B/6", "a/3", "a/x/2", "a b/5", "a.b/4", "c/deep/11", None, "z/y/x/w/10", "ü/7"]
    order[9] = os.fsdecode(b"not \xff utf-8/\xfe")
    assert names == list(map(os.fsencode, order))
    assert index.repeats.tolist() == [1, 1, 1, 1, 3, 0.5, 1, 1, 1, 1, 1, 1]


def test_images_and_sidecars_come_in_the_order_of_the_pairs(tree):
    index = PairIndex([str(tree)], IMAGE, TEXT)
    stems = [index.stem(i) for i in range(len(index))]
    for path in find_sidecars([str(tree)], [IMAGE]):
        Path(path.removesuffix(IMAGE) + ".png").touch()
    images = [os.path.splitext(pair.image)[0] for pair in find_images([str(tree)], pytest.fail)]
    assert [stem for stem in images if "only_image" not in stem] == stems


def test_folder_that_cannot_be_read_is_reported_or_raised_and_trained_without(tree, monkeypatch, capsys):
    real_scandir = os.scandir

    def scandir(path):
        if os.path.basename(path) == "a":
            raise PermissionError(13, "Permission denied", path)
        return real_scandir(path)

    monkeypatch.setattr(os, "scandir", scandir)
    errors = []
    folders = [folder.path for folder in walk_folders(tree, set(), str, lambda *error: errors.append(error))]
    assert errors == [(str(tree / "a"), "cannot be read: Permission denied")]
    assert str(tree / "a b") in folders and str(tree / "a" / "x") not in folders
    with pytest.raises(PermissionError):
        list(walk_folders(tree, set(), str))
    assert len(PairIndex([str(tree)], IMAGE, TEXT)) == 10
    assert f"warning: {tree / 'a'}: cannot be read" in capsys.readouterr().err


def test_folder_listed_only_in_part_is_reported_and_gives_no_image_without_its_caption(tmp_path, monkeypatch):
    for name in ("a/1.png", "a/1.txt", "b/2.png", "b/2.txt", "b/sub/3.png", "b/sub/3.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    real_scandir = os.scandir

    def scandir(path):
        @contextmanager
        def breaks_off():
            with real_scandir(path) as entries:
                yield fails_after(sorted(entries, key=lambda entry: entry.name == "2.txt"))

        return breaks_off() if os.path.basename(path) == "b" else real_scandir(path)

    def fails_after(entries):
        yield from entries[:-1]
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "scandir", scandir)
    errors = []
    pairs = list(find_images([str(tmp_path)], lambda *error: errors.append(error)))
    assert [os.path.relpath(pair.caption_file, tmp_path) for pair in pairs] == ["a/1.txt", "b/sub/3.txt"]
    assert errors == [(str(tmp_path / "b"), "cannot be read: Input/output error")]


def test_entry_that_cannot_be_looked_at_is_reported_and_hides_no_other(tmp_path, monkeypatch):
    """As a link into a mount whose server is gone."""
    for name in ("a.png", "a.txt", "mount"):
        (tmp_path / name).touch()
    entries = [
        SimpleNamespace(name=e.name, path=e.path, is_symlink=e.is_symlink, is_dir=e.is_dir)
        for e in os.scandir(tmp_path)
    ]

    def gone():
        raise OSError(errno.ENOTCONN, "Transport endpoint is not connected")

    next(entry for entry in entries if entry.name == "mount").is_dir = gone
    monkeypatch.setattr(os, "scandir", lambda path: nullcontext(entries))
    errors = []
    (pair,) = find_images([str(tmp_path)], lambda *error: errors.append(error))
    assert pair == Pair(f"{tmp_path}/a.png", f"{tmp_path}/a.txt")
    assert errors == [(f"{tmp_path}/mount", "cannot be read: Transport endpoint is not connected")]


def test_folders_of_other_programs_are_skipped(tmp_path):
    for folder in ("@eaDir/a.png", "__MACOSX", "#recycle", "sub"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "a.png").touch()
    (pair,) = find_images([str(tmp_path)], pytest.fail)
    assert pair.image == f"{tmp_path}/sub/a.png"


def test_caption_suffixes_may_be_in_capitals(tmp_path):
    pairs = Pairs()
    for number, suffix in enumerate((".txt", ".TXT", ".Txt", ".caption", ".CAPTION", "")):
        (tmp_path / f"{number}.png").touch()
        if suffix:
            (tmp_path / f"{number}{suffix}").write_text(f"from {suffix}")
    for pair in find_images([str(tmp_path)], pytest.fail):
        pairs.append(pair)
    texts = [read_caption(pairs[i]).text for i in range(len(pairs))]
    assert texts == ["from .txt", "from .TXT", "from .Txt", "from .caption", "from .CAPTION", "5"]
    assert [first_caption(f"{tmp_path}/{number}", PLAIN) for number in range(6)] == texts


def test_what_is_not_used_is_counted_in_one_line(tmp_path):
    """Lists of captions, formats that are not read, captions of no image, repeats in the name of a folder."""
    names = ["a.png", "a.txt", "b.png", "b.caption", "b.txt", "phone.heic", "phone.txt", "new.jxl", "LICENSE"]
    names += ["metadata.jsonl", "dog.png", "dog.png.txt", "10_cat/1.png", "10_cat/1.txt", "5_dog/1.png"]
    names += [unicodedata.normalize("NFC", "\u00e9.png"), unicodedata.normalize("NFD", "\u00e9.txt")]
    ours = [
        "a.img_sdxl",
        "a.img_other",
        "a.txt_mine",
        "_upscaled.img_sdxl.txt",
        "_null_caption.txt_clipl",
        "5_dog/multiply.txt",
    ]
    for name in names + ours:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    leftovers = Leftovers(".img_other")
    pairs = list(find_images([str(tmp_path)], pytest.fail, leftovers))
    assert len(pairs) == 6
    start, line = leftovers.unused.line().split(": ", 1)
    line, hint = line.split("; ")
    assert start == "found and not used" and hint == "dataset_scripts/import_captions.py reads lists of captions"
    assert sorted(line.split("), ")) == [
        "1 *.heic (phone.heic",
        "1 *.jsonl (metadata.jsonl",
        "1 *.jxl (new.jxl",
        "1 folder whose number counts only in a multiply.txt or with --kohya_repeats (10_cat)",
        "1 without extension (LICENSE",
        "3 captions without an image (dog.png.txt, ...",
    ]
    (tmp_path / "clean").mkdir()
    (tmp_path / "clean/a.png").touch()
    clean = Leftovers(".img_other")
    assert len(list(find_images([str(tmp_path / "clean")], pytest.fail, clean))) == 1
    assert clean.unused.line() == ""


def test_kinds_that_are_not_used_are_listed_up_to_a_limit():
    unused = Unused()
    for number in range(10_000):
        unused.add_file(f"a.{number}")
    unused.add_file("b.0")
    assert unused.line().startswith("found and not used: 9,900 of other kinds (") and len(unused._counts) < 200
    assert unused.line().endswith(" others")


@pytest.mark.parametrize(("with_text", "warns"), [(9, False), (8, True)])
def test_file_names_as_captions_are_warned_of_above_a_tenth(with_text, warns, capsys):
    unused = Unused()
    for number in range(10):
        unused.add_pair(Pair(f"IMG_{number}.jpg", f"{number}.txt" if number < with_text else None))
    unused.warn_of_file_names()
    line = "file names serve as captions of 2 of 10 images, as 'IMG' of IMG_8.jpg"
    assert (line in capsys.readouterr().err) == warns


@pytest.mark.parametrize("name", ["a.png", "a.txt", f"a{TEXT}"])
def test_pipe_in_place_of_a_file_is_an_error_and_waits_for_nobody(tmp_path, name):
    os.mkfifo(tmp_path / name)
    pair = Pair(str(tmp_path / "a.png"), str(tmp_path / "a.txt"))
    read = {".png": lambda: decode_file(pair.image, [(8, 8)]), ".txt": lambda: read_caption(pair)}
    with pytest.raises(OSError, match="is not a regular file"):
        read.get(os.path.splitext(name)[1], lambda: read_sidecar(tmp_path / name))()


# Directories that overlap


def relative_pairs(root, index):
    return [os.path.relpath(index.stem(i), root) for i in range(len(index))]


@pytest.mark.parametrize("order", [("", "sub"), ("sub", ""), ("", ""), ("", "link"), ("sub", "", "sub/deep")])
def test_overlapping_directories_give_each_pair_once_and_on_one_side_of_a_split(tmp_path, order, capsys):
    root = tmp_path / "data"
    for number in range(40):
        write_pair(root / ("", "sub", "sub/deep")[number % 3] / f"{number:02}")
    (root / "link").symlink_to(root / "sub")
    roots = [str(root / folder) for folder in order]
    index = PairIndex(roots, IMAGE, TEXT, repeats=[2.0, 3.0, 4.0][: len(roots)])
    names = {os.path.realpath(index.stem(i)) for i in range(len(index))}
    assert len(names) == len(index) == 40
    first = sum(os.path.realpath(index.stem(i)).startswith(os.path.realpath(roots[0]) + "/") for i in range(40))
    assert index.repeats.tolist() == [2.0] * first + [3.0] * (40 - first)
    is_warned = "count once, with the repeats of that directory" in capsys.readouterr().err
    assert is_warned == (order != ("sub", ""))
    parts = split_index(index, 0.4)
    sides = [{os.path.realpath(part.stem(i)) for i in range(len(part))} for part in parts]
    assert sides[0] | sides[1] == names and not sides[0] & sides[1]
    assert all(not name.startswith("..") for name in map(index.relative_name, range(40)))


def test_trainer_tells_what_a_user_may_not_expect_in_the_list_of_pairs(tmp_path, capsys):
    """Pairs whose image is gone, directories of sidecars alone, repeats in the name of a folder."""
    for root, number in (("some", 4), ("none", 3), ("some/10_cat", 1), ("some/5_dog", 1), ("some/b/3_x", 1)):
        for pair in range(number):
            write_pair(tmp_path / root / f"{pair}.x")
    (tmp_path / "some/1.x.JPG").touch()
    (tmp_path / "some/5_dog/multiply.txt").write_text("5")
    (tmp_path / "some/b/multiply.txt").write_text("3")
    data = [str(tmp_path / root) for root in ("some", "none")]
    args = Namespace(train_data_dir=data, dir_weights=[1, 1], imgcache_suffix=IMAGE, txtcache_suffix=TEXT)
    others = {"force_txtcache": None, "sizes": None, "overfit": 0, "val_split": 0, "val_data_dir": None}
    others |= {"shard_cache": None, "shard_cache_gb": None}
    index, *_ = open_index(Namespace(kohya_repeats=False, **others, **vars(args)), World())
    output = capsys.readouterr()
    assert "warning: no image beside 6 of 10 pairs, which train all the same" in output.err
    assert f"cache/cache_status.py --data_root {data[0]}" in output.err
    assert "in directories of sidecars alone, without images: 3 of 10 pairs" in output.out
    assert f"not used: the number in front of 1 folder, the first {data[0]}/10_cat; " in output.err
    assert index.samples_per_epoch == 3 + 4 + 1 + 5 + 3
    index, *_ = open_index(Namespace(kohya_repeats=True, **others, **vars(args)), World())
    output = capsys.readouterr()
    assert "--kohya_repeats: repeats 2 folders by the number in the name, the first" in output.out
    assert "it is not used" not in output.err and index.samples_per_epoch == 3 + 4 + 10 + 5 + 3
    assert PairIndex(data[1:], IMAGE, TEXT).num_without_image == 0


def test_pair_up_takes_the_first_of_two_images_of_one_stem():
    errors = []
    folder = Folder("d", sorted(["a.jpg", "a.png", "a.caption", "b.JPG", "b.txt", "b.caption", "c.png", "c.TXT"]))
    pairs = list(pair_up(folder, lambda *error: errors.append(error)))
    assert pairs == [Pair("d/a.jpg", "d/a.caption"), Pair("d/b.JPG", "d/b.txt"), Pair("d/c.png", "d/c.TXT")]
    assert errors == [("d/a.png", "would share its sidecar with a.jpg; rename one of the two images")]


@pytest.mark.parametrize(
    ("name", "files", "expected"),
    [
        ("1", {".txt": b" from txt\r\n", ".caption": b"from caption"}, "from txt"),
        ("2", {".caption": "\ufefffrom caption é".encode()}, "from caption é"),
        ("a man riding_(1)", {}, "a man riding"),
        ("v1.5 of it_2", {}, "v1.5 of it"),
        ("empty_1", {".txt": b"\xef\xbb\xbf \n"}, ""),
    ],
)
def test_caching_and_samples_read_the_same_caption(tmp_path, name, files, expected):
    (tmp_path / f"{name}.png").touch()
    for suffix, data in files.items():
        (tmp_path / f"{name}{suffix}").write_bytes(data)
    (pair,) = find_images([str(tmp_path)], pytest.fail)
    stem = str(tmp_path / name)
    assert read_caption(pair).text == read_captions(pair).texts[0] == caption_of(stem) == expected


@pytest.mark.parametrize("data", [b"caf\xe9", "a cat".encode("utf-16"), "a cat".encode("utf-16-le")])
def test_caption_that_is_not_utf8_is_an_error_that_names_the_file_and_a_warning_for_a_sample(data, tmp_path, capsys):
    (tmp_path / "a.txt").write_bytes(data)
    pair = Pair("", str(tmp_path / "a.txt"))
    for read in (lambda: first_caption(str(tmp_path / "a"), PLAIN), lambda: read_caption(pair)):
        with pytest.raises(ValueError, match=r"/a\.txt: not UTF-8 text .*; save it as UTF-8"):
            read()
    assert caption_of(str(tmp_path / "a")) == "a"
    assert f"{tmp_path / 'a.txt'}: not UTF-8" in capsys.readouterr().err
