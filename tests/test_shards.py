"""Shard sets: what they hold, that training from them is training from the folder, and what is refused."""

import pickle
import re
import shutil
import sys
import tarfile

import numpy as np
import pytest
import torch
from helpers import T5, digest, refused, run_script, train
from runs import content
from sdxl_fixtures import SDXL

from cachetrain.data.dataset import Sidecars
from cachetrain.data.index import PairIndex
from cachetrain.data.ram import RamCache
from cachetrain.data.shards import Shard, member_header
from cachetrain.data.sidecar import SidecarError, read_sidecar, write_sidecar

RUN = ("--batch_size", 5, "--save_steps", 3, "--cond_dropout", 0.2, "--val_split", 0.2, "--val_steps", 3)


def pack(folder, out, *flags, suffixes=T5, rows=7):
    names = ["--imgcache_suffix", *np.atleast_1d(suffixes[0]), "--txtcache_suffix", suffixes[1]]
    assert (
        run_script("cache/pack_shards.py", "--data_root", folder, "--out", out, *names, "--rows", rows, *flags) == 0
    )
    return out


@pytest.fixture(scope="module")
def folder(shapes, tmp_path_factory):
    """Pairs in two folders; those of one are repeated, and some latents have another size."""
    root = tmp_path_factory.mktemp("shards") / "folder"
    (root / "b ü").mkdir(parents=True)
    for path in shapes.glob("*.*"):
        if path.suffix in T5:
            shutil.copy2(path, root / "b ü" if path.stem < "00008" else root)
    (root / "b ü" / "multiply.txt").write_text("1.5")
    for path in sorted(root.glob("*.img_sdxl"))[::3]:
        tensors, header = read_sidecar(path)
        write_sidecar(path, {"latent": tensors["latent"][:, :, :6]}, header.metadata)
    return root


@pytest.fixture(scope="module")
def packed(folder):
    return pack(folder, folder.parent / "set")


def files_of(root):
    """{relative path: bytes} of the shards and null captions in a set."""
    return {path.relative_to(root): path.read_bytes() for path in root.rglob("*.*") if path.name[0] != "."}


def indexes(*directories, suffixes=T5, **options):
    return [PairIndex([str(directory)], *suffixes, **options) for directory in directories]


def same_samples(a, b):
    """Whether two indexes list the same samples with the same tensors and header fields, in the same order."""
    columns = ("shape_ids", "image_bytes", "tokens", "all_tokens", "repeats")
    assert all(np.array_equal(getattr(a, name), getattr(b, name)) for name in columns) and a.shapes == b.shapes
    assert (a.caption_sources, a.num_masked, a.checksum()) == (b.caption_sources, b.num_masked, b.checksum())
    for i in range(len(a)):
        for of_a, of_b in zip(map(Sidecars(a).image, [i]), map(Sidecars(b).image, [i]), strict=True):
            assert (digest(of_a[0]), of_a[1]) == (digest(of_b[0]), of_b[1])
        (text_a, fields_a), (text_b, fields_b) = Sidecars(a).text(i), Sidecars(b).text(i)
        assert (digest(text_a), fields_a) == (digest(text_b), fields_b)
    return True


@pytest.mark.parametrize("name", ["a.x", "b/" * 49 + "ab", "b/" * 50 + "a", "ü.x", "caf\udce9.x"])
@pytest.mark.parametrize("size", [0, 511, 8**11 - 1, 8**11])
def test_headers_of_members_are_those_of_tarfile(name, size):
    expected = tarfile.TarInfo(name)
    expected.size = size
    assert member_header(name, size) == expected.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")


def test_tars_give_back_each_sidecar_byte_for_byte(folder, packed, tmp_path):
    names = []
    for path in packed.rglob("*.tar"):
        with tarfile.open(path) as tar:
            assert tar.getnames()[0] == "__index__/index.safetensors"
            names += tar.getnames()[1:]
            tar.extractall(tmp_path, filter="data")
    sidecars = [path for path in folder.rglob("*.*") if path.suffix in T5 and path.stem != "_null_caption"]
    assert sorted(names) == sorted(path.relative_to(folder).as_posix() for path in sidecars)
    for path in sidecars:
        assert (tmp_path / path.relative_to(folder)).read_bytes() == path.read_bytes()


def test_the_same_folder_gives_the_same_bytes_and_shards_that_are_there_are_kept(folder, packed, tmp_path, capsys):
    again = pack(folder, tmp_path / "set")
    files = files_of(packed)
    assert files == files_of(again)
    one = sorted(again.rglob("*.tar"))[1]
    one.unlink()
    times = {path: path.stat().st_mtime_ns for path in again.rglob("*.tar")}
    pack(folder, again)
    assert "24 pairs in 8 shards; 1 shard written" in capsys.readouterr().out
    assert one.read_bytes() == files[one.relative_to(again)]
    assert times.items() <= {path: path.stat().st_mtime_ns for path in again.rglob("*.tar")}.items()
    capsys.readouterr()
    for path, size in zip(times, (-1, 0), strict=False):
        path.write_bytes(path.read_bytes()[:size])
    names = ("--imgcache_suffix", T5[0], "--txtcache_suffix", T5[1], "--rows", 7)
    assert run_script("cache/pack_shards.py", "--data_root", folder, "--out", again, *names) == 1
    said = capsys.readouterr().err
    cut, empty = list(times)[:2]
    for path, problem in ((cut, "is truncated"), (empty, "is not a shard")):
        assert f"{path}: {problem}; delete it, and run again\n" in said


def test_processes_share_the_packing(folder, packed, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        pack(folder, tmp_path)
    assert files_of(tmp_path) == files_of(packed)


def test_an_index_of_the_set_is_that_of_the_folder(folder, packed):
    assert same_samples(*indexes(folder, packed))
    assert same_samples(*indexes(folder, packed, one_text=str(folder / "00009.txt_t5cache")))
    assert same_samples(*(PairIndex([str(one), str(other)], *T5, [1, 2]) for one, other in [(folder, folder)] * 2))


def test_a_set_from_memory_and_in_another_process_reads_the_same(folder, packed):
    index = indexes(packed)[0]
    Sidecars(index).image(3)
    copied, memory = pickle.loads(pickle.dumps(index)), RamCache(index)
    for i in (0, 11, 23):
        expected, fields = read_sidecar(index.stem(i).replace(str(packed), str(folder)) + ".img_sdxl")
        for tensors, metadata in (Sidecars(copied).image(i), memory.image(i)):
            assert digest(tensors) == digest(expected) and metadata == fields.metadata


def test_training_from_a_set_is_that_from_the_folder_and_each_resumes_the_other(folder, packed, model_t5, tmp_path):
    runs = {name: tmp_path / name for name in ("folder", "set", "resumed", "back")}
    lines, weights = train(folder, model_t5, runs["folder"], *RUN, "--max_steps", 6)
    of_set, weights_of_set = train(packed, model_t5, runs["set"], *RUN, "--max_steps", 6, "--num_workers", 2)
    losses = [
        [line["01_Training/loss_raw"] for line in of_run if "01_Training/loss_raw" in line]
        for of_run in (lines, of_set)
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 6
    assert digest(weights) == digest(weights_of_set)
    for data, first, run in ((packed, "folder", "resumed"), (folder, "set", "back")):
        resume = ["--resume", runs[first] / "checkpoint-000003"]
        train(data, model_t5, runs[run], *RUN, "--max_steps", 6, *resume)
        assert content(runs[run], 6) | {"shards": None} == content(runs["folder"], 6) | {"shards": None}


def test_folders_and_sets_mix_with_their_repeats(shapes, folder, packed):
    mixed = [PairIndex([str(one), str(shapes)], *T5, [2, 0.5]) for one in (folder, packed)]
    assert same_samples(*mixed)
    assert mixed[0].samples_per_epoch == 2 * (16 + 8 * 1.5) + 12


def test_ranks_share_the_indexes_of_sets_and_folders(shapes, packed):
    class World:
        ranks = 2
        records, arrays, part = [], [], None

        def __init__(self, rank):
            self.rank = rank

        def gather(self, record):
            World.records.append(record)
            return World.part[0] if World.part else [record]

        def share(self, make, _):
            return make()

        def sum_array(self, array):
            World.arrays.append(array)
            return array

    whole = PairIndex([str(packed), str(shapes)], *T5)
    parts = [PairIndex([str(packed), str(shapes)], *T5, world=World(rank)) for rank in (0, 1)]
    for name in ("image_bytes", "tokens", "all_tokens"):
        assert np.array_equal(sum(getattr(part, name) for part in parts), getattr(whole, name))


def test_rows_of_one_half_are_matched_by_name(folder, packed, tmp_path):
    """Another order of the text half, with a row missing and one too many, as caching that failed for some leaves."""
    other = shutil.copytree(folder, tmp_path / "folder")
    (other / "00010.txt_t5cache").unlink()
    for kind, source in (("img_sdxl", packed), ("txt_t5cache", pack(other, tmp_path / "other", rows=24))):
        whole = pack(folder, tmp_path / "whole", rows=24) if source is packed else source
        (from_folder,) = whole.glob(f"{kind}-*")
        shutil.copytree(from_folder, tmp_path / "set" / from_folder.name)
    (path,) = (tmp_path / "set").glob("img_*/*.tar")
    assert len(Shard(path)) == 24
    index = indexes(tmp_path / "set")[0]
    assert same_samples(index, indexes(other)[0]) and index.num_unpaired == 1


@pytest.mark.parametrize("kind", ["variants and masks", "sdxl"])
def test_variants_masks_crops_and_sizes_are_packed_too(kind, request, tmp_path):
    if kind == "sdxl":
        folder, suffixes = request.getfixturevalue("shapes_sdxl"), SDXL
    else:
        folder, suffixes = tmp_path / "data", ((".img_sdxl", ".img_64"), ".txt_t5cache")
        folder.mkdir()
        for i in range(4):
            fields = {"kind": "img_sdxl", "encoder": "x", "settings": "{}", "scaling_factor": "0.5"}
            latent, mask = torch.randn(4, 8, 8).half(), torch.rand(1, 8, 8).half()
            crops = {"latent.1": latent + 1} if i == 2 else {}
            write_sidecar(
                folder / f"{i}.img_sdxl", {"latent": latent, **crops} | ({"mask": mask} if i else {}), fields
            )
            write_sidecar(folder / f"{i}.img_64", {"latent": latent[:, :, :4]}, fields)
            emb = {"emb": torch.randn(3 + i, 64).bfloat16()} | (
                {"emb.1": torch.randn(9, 64).bfloat16()} if i > 1 else {}
            )
            fields = {"kind": "txt_t5cache", "encoder": "y", "settings": "{}"}
            write_sidecar(folder / f"{i}.txt_t5cache", emb, fields)
    packed = pack(folder, tmp_path / "set", suffixes=suffixes, rows=3)
    assert same_samples(*indexes(folder, packed, suffixes=suffixes))


# Faults


def damaged(packed, target, change):
    """A copy of a set in which change(bytearray) has altered its second image shard; returns (set, that shard)."""
    shutil.copytree(packed, target)
    path = sorted(target.glob("img_sdxl-*/*.tar"))[1]
    data = bytearray(path.read_bytes())
    data = change(data) or data
    path.write_bytes(data)
    return target, path


def test_a_flipped_byte_is_named_by_shard_and_row(folder, packed, model_t5, tmp_path):
    intact = Shard(sorted(packed.glob("img_sdxl-*/*.tar"))[1])
    for place in (0, 40, int(intact.arrays["length"][2]) - 1):  # in the header and in the tensors

        def flip(data, place=place):
            data[int(intact.arrays["offset"][2]) + place] ^= 1

        bad, path = damaged(packed, tmp_path / f"set{place}", flip)
        index = indexes(bad)[0]
        with pytest.raises(SidecarError, match=rf"{re.escape(str(path))}#.*\.img_sdxl: row 2 does not match"):
            Sidecars(index).image(7 + 2)
        Sidecars(index).image(7 + 3)
    train(bad, model_t5, tmp_path / "run", "--batch_size", 2, "--max_steps", 24, "--cond_dropout", 0)
    assert f"{path}#" in (tmp_path / "run" / "quarantine.tsv").read_text()


def test_every_flipped_byte_of_an_index_is_noticed(packed, tmp_path):
    (whole, *_) = sorted(packed.glob("img_sdxl-*/*.tar"))
    data = whole.read_bytes()
    path = tmp_path / "x.tar"
    for place in range(512, 512 + int(data[124:135], 8), 23):
        changed = bytearray(data)
        changed[place] ^= 4
        path.write_bytes(changed)
        with pytest.raises(SidecarError, match=str(path)):
            Shard(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data[:-1024], "is truncated; copy or pack it again"),
        (lambda data: data[:700], "its index is damaged; copy or pack it again"),
        (lambda data: data[512:], "is not a shard"),
        (lambda _: b"\0", "is not a shard"),
    ],
)
def test_what_is_no_whole_shard_is_refused_at_the_start(change, message, packed, model_t5, tmp_path):
    bad, path = damaged(packed, tmp_path / "set", change)
    assert refused(bad, model_t5, tmp_path / "run").startswith(f"{path}: {message}")


def test_sets_that_hold_more_than_one_state_are_refused_with_both_named(folder, packed, model_t5, tmp_path, capsys):
    changed = shutil.copytree(folder, tmp_path / "folder")
    (changed / "00023.img_sdxl").unlink()
    with pytest.raises(ValueError, match="is of an earlier state of the folder's image sidecars"):
        pack(changed, shutil.copytree(packed, tmp_path / "set"))
    with pytest.raises(ValueError, match="is of an earlier state of the folder"):  # fewer shards
        pack(folder, tmp_path / "set", rows=24)
    repeated = shutil.copytree(folder, tmp_path / "repeated")
    (repeated / "b ü" / "multiply.txt").write_text("3")
    with pytest.raises(ValueError, match=r"is of an earlier state of the folder's image sidecars or multiply\.txt"):
        pack(repeated, shutil.copytree(packed, tmp_path / "third"))
    for half in (tmp_path / "third").glob("img_*"):
        shutil.rmtree(half)
    with pytest.raises(ValueError, match=r"'s text sidecars or multiply\.txt, or of another .*; delete .*/txt_t5"):
        pack(repeated, tmp_path / "third")
    last = sorted(pack(changed, tmp_path / "other").glob("img_sdxl-*/*.tar"))[-1]
    old = sorted((tmp_path / "set").glob("img_sdxl-*/*.tar"))[-1]
    shutil.copy(last, old.parent)
    message = refused(tmp_path / "set", model_t5, tmp_path / "run")
    assert str(old) in message and str(old.parent / last.name) in message and "under one number" in message
    (old.parent / last.name).unlink()
    shutil.copytree(old.parent, another := old.parent.with_name("img_sdxl-00000000"))
    message = refused(tmp_path / "set", model_t5, tmp_path / "run")
    assert str(old.parent) in message and str(another) in message and "other models or settings" in message


def test_a_shard_of_other_sidecars_in_the_folder_of_a_set_is_refused(folder, packed, model_t5, tmp_path):
    target = shutil.copytree(packed, tmp_path / "set")
    other = shutil.copytree(folder, tmp_path / "folder")
    for path in other.rglob("*.img_sdxl"):
        tensors, header = read_sidecar(path)
        write_sidecar(path, tensors, header.metadata | {"encoder": "another"})
    stray = sorted(pack(other, tmp_path / "other").glob("img_sdxl-*/*.tar"))[1]
    mine = sorted(target.glob("img_sdxl-*/*.tar"))[1]
    shutil.copy(stray, mine)
    assert f"{mine}: differs in encoder from" in refused(target, model_t5, tmp_path / "run")


def test_a_set_inside_a_folder_and_half_a_set_are_refused(folder, packed, model_t5, tmp_path):
    outer = shutil.copytree(folder, tmp_path / "folder")
    shutil.copytree(packed, outer / "set")
    for directory, where in ((outer, outer / "set"), (next(packed.glob("img_*")), packed)):
        assert f"is part of the shard set {where}" in refused(directory, model_t5, tmp_path / "run")


def test_sets_that_cannot_be_made_are_named(folder, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=f"{tmp_path}/file: cannot be opened: File exists"):
        pack(folder, tmp_path / "file")


def test_arguments_of_packing_that_cannot_be_meant_are_refused(folder, packed, tmp_path, monkeypatch, capsys):
    for out, message in (("", "no directory given"), ("s3:/bucket/x", "did you mean s3://bucket/x")):
        with pytest.raises(SystemExit):
            pack(folder, out)
        assert message in capsys.readouterr().err
    with pytest.raises(ValueError, match=f"{packed}: is a shard set already"):
        pack(packed, tmp_path)
    with pytest.raises(ValueError, match="has a suffix twice"):
        pack(folder, tmp_path, suffixes=([T5[0], T5[0]], T5[1]))
    with pytest.raises(ValueError, match="is the folder that is packed"):
        pack(folder, f"{folder.parent}/../{folder.parent.name}/folder/")
    monkeypatch.setenv("RANK", "x")
    with pytest.raises(ValueError, match="variable RANK is 'x', expected a number"):
        pack(folder, tmp_path)


def test_sidecars_without_a_header_are_not_packed(shapes, tmp_path):
    from helpers import without_headers

    folder = without_headers(shapes, tmp_path / "foreign")
    with pytest.raises(ValueError, match="24 pairs without a header cannot be packed"):
        pack(folder, tmp_path / "set")
    assert not list((tmp_path / "set").rglob("*.tar"))


def test_a_shard_deleted_while_training_costs_its_samples_and_is_named(packed, tmp_path):
    target = shutil.copytree(packed, tmp_path / "set")
    index = indexes(target)[0]
    path = sorted(target.glob("img_sdxl-*/*.tar"))[2]
    index = pickle.loads(pickle.dumps(index))  # with no shard open
    path.unlink()
    with pytest.raises(OSError, match=re.escape(str(path))):
        Sidecars(index).image(20)
    Sidecars(index).image(1)


def test_packing_needs_obstore_and_says_so(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "obstore.store", None)
    with pytest.raises(ValueError, match=r"pip install -e '.\[cloud\]'"):
        pack(folder, tmp_path / "set")
