"""cachetrain/data/walk.py and captions.py: one walk and one caption rule for caching, training and samples."""

import os
from pathlib import Path

import pytest
import torch

from cachetrain.data.captions import Pair, find_caption, read_caption
from cachetrain.data.index import PairIndex
from cachetrain.data.sidecar import write_sidecar
from cachetrain.data.walk import Folder, find_images, find_sidecars, pair_up, walk_folders
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


def test_pair_up_takes_the_first_of_two_images_of_one_stem():
    errors = []
    folder = Folder("d", sorted(["a.jpg", "a.png", "a.caption", "b.JPG", "b.txt", "b.caption", "c.png", "c.TXT"]))
    pairs = list(pair_up(folder, lambda *error: errors.append(error)))
    assert pairs == [Pair("d/a.jpg", "d/a.caption"), Pair("d/b.JPG", "d/b.txt"), Pair("d/c.png", None)]
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
    assert read_caption(pair).text == find_caption(stem).text == caption_of(stem) == expected
    assert read_caption(pair) == find_caption(stem)


def test_caption_that_is_not_utf8_is_an_error_that_names_the_file_and_a_warning_for_a_sample(tmp_path, capsys):
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    for read in (lambda: find_caption(str(tmp_path / "a")), lambda: read_caption(Pair("", str(tmp_path / "a.txt")))):
        with pytest.raises(ValueError, match=r"/a\.txt: not UTF-8 text .*; save it as UTF-8"):
            read()
    assert caption_of(str(tmp_path / "a")) == "a"
    assert f"{tmp_path / 'a.txt'}: not UTF-8" in capsys.readouterr().err
