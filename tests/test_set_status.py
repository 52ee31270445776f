"""cache/cache_status.py on shard sets, in a directory and in object storage alike: status, --verify, --prune."""

import os
import re
import shutil
from datetime import UTC, datetime

import pytest
from helpers import T5, fake_s3, run_script

from cachetrain.caching.inspect import set_state
from cachetrain.caching.packing import shard_row
from cachetrain.data import objects, set_files, shards
from cachetrain.data.freeze import freeze_bytes, freeze_of
from cachetrain.data.shard_set import ShardSet
from cachetrain.data.shards import Shard
from cachetrain.data.sidecar import read_sidecar, write_sidecar


def pack(folder, out, rows=7):
    flags = ("--imgcache_suffix", T5[0], "--txtcache_suffix", T5[1], "--rows", rows)
    assert run_script("cache/pack_shards.py", "--data_root", folder, "--out", out, *flags) == 0
    return out


@pytest.fixture(scope="module")
def packed(shapes, tmp_path_factory):
    return pack(shapes, tmp_path_factory.mktemp("status") / "set")


@pytest.fixture(scope="module")
def bucket():
    with fake_s3() as address:
        yield address


@pytest.fixture(scope="module")
def remote(bucket, packed):
    return copied(packed, f"{bucket}/set")


def files_of(root):
    """{relative path: bytes} of the files in a set."""
    return {path.relative_to(root): path.read_bytes() for path in root.rglob("*.*") if path.name[0] != "."}


def copied(root, address):
    """A copy of a set in object storage."""
    store = objects.open_store(address)
    for name, data in files_of(root).items():
        objects.put_new(store, name.as_posix(), data)
    return address


def status(root, *flags):
    return run_script("cache/cache_status.py", "--data_root", root, *flags)


def report_of(root, capsys):
    """The lines on stdout, without the place of the set and times."""
    return re.sub("written [-0-9: to]+", "written", capsys.readouterr().out).replace(str(root), "SET")


def change(path, places):
    """Flips a bit of these bytes of a file; returns its path."""
    data = bytearray(path.read_bytes())
    for place in places:
        data[place] ^= 1
    path.write_bytes(data)
    return path


def test_status_of_a_set_counts_rows_names_missing_ones_and_finds_flipped_bytes(packed, tmp_path, capsys):
    assert status(packed, "--verify") == 0
    lines = capsys.readouterr().out
    assert "4 shards, 24 rows" in lines and "latents: 24 of 4x8x8" in lines
    assert "null caption: there" in lines and lines.endswith(f"{packed}: 24 pairs in all halves\n")
    bad = shutil.copytree(packed, tmp_path / "set")
    path = change(sorted(bad.glob("img_*/*.tar"))[1], [-1500])
    next(bad.glob("txt_*/00000-*")).unlink()
    assert status(bad) == 1
    lines = capsys.readouterr().out
    assert "rows in other folders only: 7, 00000, 00001, 00002, ...\n" in lines and "17 pairs in all halves" in lines
    assert "no shard of 1 number: 00000\n" in lines
    assert status(bad, "--verify") == 1
    done = capsys.readouterr()
    assert "damaged: 1, named above" in done.out and f"{path}#" in done.err


def test_rows_that_either_half_lacks_are_named_and_do_not_count_as_pairs(shapes, tmp_path, capsys):
    for name, kind in (("00003", "img_sdxl"), ("00010", "txt_t5cache")):
        folder = shutil.copytree(shapes, tmp_path / name)
        (folder / f"{name}.{kind}").unlink()
        (half,) = pack(folder, tmp_path / f"{name}_set", rows=24).glob(f"{kind}-*")
        shutil.copytree(half, tmp_path / "set" / half.name)
    capsys.readouterr()
    assert status(tmp_path / "set") == 1
    lines = capsys.readouterr().out
    assert re.findall("rows in other folders only: (.*)", lines) == ["1, 00003", "1, 00010"]
    assert "22 pairs in all halves" in lines


def test_the_rows_of_a_shard_that_cannot_be_read_do_not_count_as_missing(packed, tmp_path, capsys):
    target = shutil.copytree(packed, tmp_path / "set")
    (path,) = target.glob("txt_*/00001-*.tar")
    path.write_bytes(path.read_bytes()[:-1])
    assert status(target) == 1
    done = capsys.readouterr()
    assert f"{path}: is truncated" in done.err and "damaged: 1, named above" in done.out
    assert "rows in other folders" not in done.out and "17 pairs in all halves" in done.out


def test_status_of_object_storage_is_that_of_the_directory_by_one_read_of_each_shard(
    remote, packed, capsys, monkeypatch
):
    assert status(packed) == 0
    expected = report_of(packed, capsys)
    calls = []
    whole = objects.read_range
    monkeypatch.setattr(objects, "read_range", lambda *args: calls.append(args[1:]) or whole(*args))
    assert status(remote) == 0
    assert report_of(remote, capsys) == expected
    assert len({name for name, *_ in calls}) == len(calls) == 8
    assert status(remote, "--verify") == 0
    assert report_of(remote, capsys) == expected


def test_an_index_that_one_read_does_not_hold_is_read_by_two(packed, monkeypatch):
    monkeypatch.setattr(set_files, "_FIRST_READ", 100)
    (path, *_) = sorted(packed.glob("img_*/*.tar"))
    files, name = set_files.Directory(packed), path.relative_to(packed).as_posix()
    index = set_files.read_index(files, set_files.Entry(name, path.stat().st_size, 0))
    assert index.names() == Shard(path).names()


def test_verify_names_every_damaged_row_and_only_those(packed, bucket, tmp_path, capsys):
    target, chosen = shutil.copytree(packed, tmp_path / "set"), (0, 3, 6)
    (path, *_) = sorted(target.glob("txt_*/*.tar"))
    change(path, [int(Shard(path).arrays["offset"][row]) + row for row in chosen])
    copied(target, f"{bucket}/damaged")
    for root in (target, f"{bucket}/damaged"):
        assert status(root, "--verify") == 1
        named = capsys.readouterr().err
        where = f"{root}/{path.relative_to(target)}"
        rows = re.findall(rf"^{re.escape(where)}#.*\.txt_t5cache: row (\d) does not match", named, re.M)
        assert tuple(map(int, rows)) == chosen and len(named.splitlines()) == 3
    assert status(target) == 0  # without --verify, rows are not read


def test_verify_names_damage_between_rows(packed, tmp_path, capsys):
    target = shutil.copytree(packed, tmp_path / "set")
    (path, *_) = sorted(target.glob("txt_*/*.tar"))
    shard, whole = Shard(path), path.read_bytes()
    header = int(shard.arrays["offset"][3]) - 512
    where = f"{shard.where(3)}: its tar header is damaged"
    damage = {header: where, header + 148: where, header - 1: where, header + 511: where}
    for place, line in (damage | {150: f"{path}: its first tar", len(whole) - 1: f"{path}: its end is"}).items():
        change(path, [place])
        assert status(target, "--verify") == 1
        (named,) = capsys.readouterr().err.splitlines()
        assert named.startswith(line)
        path.write_bytes(whole)
    assert status(target, "--verify") == 0


def test_verify_reads_pieces_of_any_size(packed, monkeypatch):
    reference = {path: [Shard(path).where(row) for row in range(len(Shard(path)))] for path in packed.rglob("*.tar")}
    for size in (1, 700, 10**6):
        monkeypatch.setattr(set_files, "_CHUNK", size)
        files = set_files.Directory(packed)
        entries = [entry for entry in files.entries() if entry.name.endswith(".tar")][:2]
        for entry, inspected in set_state.inspect_shards(files, entries, verify=True):
            index = inspected.index
            assert inspected.problems == [] and len(index) == len(reference[packed / entry.name])


def test_status_names_rows_that_failed(shapes, tmp_path, capsys, monkeypatch):
    sealed, failed = shards.sealed, [2, [["b/1", "is cut off"], ["b/2", "is no image"]]]
    monkeypatch.setattr(shards, "sealed", lambda arrays, fields: sealed(arrays, fields | {"failed": failed}))
    pack(shapes, tmp_path / "set", rows=12)
    capsys.readouterr()
    assert status(tmp_path / "set") == 1
    expected = "  rows that failed when the shards were made: 4\n    b/1: is cut off\n    b/2: is no image\n"
    assert expected in capsys.readouterr().out


def shorten(path, kind="txt_t5cache"):
    """Leaves the last row of a shard of captions out; kind None: of images."""
    shard = Shard(path)
    rows = [shard_row(shard.name(i), "", bytes(shard.read(i)), kind) for i in range(len(shard) - 1)]
    path.write_bytes(shards.build_shard([row for row, _ in rows], shard.fields["suffix"], shard.fields["widths"]))


@pytest.fixture
def two_runs(shapes, packed, tmp_path):
    """A set with captions of two runs, an hour apart, and with an older shard of one number; (set, what is old)."""
    other = shutil.copytree(shapes, tmp_path / "folder")
    for path in other.rglob("*.txt_t5cache"):
        tensors, header = read_sidecar(path)
        write_sidecar(path, tensors, header.metadata | {"settings": '{"max_length": 99}'})
    target = pack(other, shutil.copytree(packed, tmp_path / "set"))
    (old,) = (target / path.name for path in packed.glob("txt_*"))
    newer = next(path for path in target.glob("txt_*") if path != old)
    image = sorted(target.glob("img_*/*.tar"))[2]
    stale = shutil.copy(image, image.with_name("00002-00000000.tar"))
    for path in (*old.iterdir(), stale):
        os.utime(path, (10**9, 10**9))
    return target, newer, {*old.iterdir(), stale}


def test_prune_deletes_what_is_old_and_only_after_a_yes(two_runs, capsys):
    target, newer, old = two_runs
    before = files_of(target)
    for flags in ([], ["--prune"]):  # there is no terminal
        assert status(target, *flags) == 1
        lines = capsys.readouterr().out
        assert re.search(rf"older than {newer.name}, differs in .*max_length", lines)
        assert "1 older shard of the same numbers" in lines
        assert "6 files to be deleted" in lines and "written 2001-09-09" in lines
        assert files_of(target) == before
    assert status(target, "--prune", "--yes") == 0
    assert files_of(target).keys() == before.keys() - {path.relative_to(target) for path in old}
    assert status(target, "--prune") == 0
    assert capsys.readouterr().out.endswith("nothing to prune\n")


def test_an_interrupted_prune_is_finished_by_the_next(two_runs, monkeypatch):
    target, newer, old = two_runs
    unlink, deleted = os.unlink, []

    def stop_after_four(path):
        if len(deleted) == 4:
            raise KeyboardInterrupt
        deleted.append(path)
        unlink(path)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(set_files.os, "unlink", stop_after_four)
        status(target, "--prune", "--yes")
    assert sum(path.exists() for path in old) == 2
    assert status(target, "--prune", "--yes") == 0
    assert not any(path.exists() for path in old) and len(list(newer.iterdir())) == 5


@pytest.mark.parametrize(
    "case",
    [
        "newer half lacks a shard",
        "same time",
        "newer is damaged",
        "a row of the newer is damaged",
        "newer lacks the null caption",
        "newer null caption is damaged",
        "newer has fewer rows",
    ],
)
def test_prune_keeps_the_older_one_where_the_newer_cannot_replace_it(case, two_runs, capsys):
    target, newer, old = two_runs
    stale = next(path for path in old if path.parent.name.startswith("img_"))
    stale.unlink()
    first, *_ = sorted(newer.glob("*.tar"))
    reason = {
        "newer half lacks a shard": "the newer one lacks 1 shard of it, like 00000",
        "same time": "both were written at the same time",
        "newer is damaged": "1 shard of the newer one cannot be used",
        "a row of the newer is damaged": "1 shard of the newer one cannot be used",
        "newer lacks the null caption": "the null caption of the newer one is missing",
        "newer null caption is damaged": "the null caption of the newer one is damaged",
        "newer has fewer rows": "the newer one has 1 row fewer",
    }[case]
    null = newer / "_null_caption.txt_t5cache"
    if case == "newer half lacks a shard":
        first.unlink()
    elif case == "newer is damaged":
        first.write_bytes(first.read_bytes()[:600])
    elif case == "a row of the newer is damaged":
        change(first, [-1500])
    elif case == "newer lacks the null caption":
        null.unlink()
    elif case == "newer null caption is damaged":
        change(null, [-1])
    elif case == "newer has fewer rows":
        shorten(first)
    for path in (path for folder in target.glob("txt_*") for path in folder.iterdir() if case == "same time"):
        os.utime(path, (10**9, 10**9))
    before = files_of(target)
    assert status(target, "--prune", "--yes") == 1
    assert f"kept by --prune, since {reason}" in capsys.readouterr().out
    assert files_of(target) == before


def test_prune_keeps_an_older_shard_with_more_rows(two_runs, capsys):
    target, _, old = two_runs
    (stale,) = (path for path in old if path.parent.name.startswith("img_"))
    newer = next(path for path in stale.parent.glob("00002-*") if path != stale)
    shorten(newer, None)
    assert status(target, "--prune", "--yes") == 1
    assert "kept by --prune, since the newer one has 1 row fewer" in capsys.readouterr().out
    assert {path for path in old if path.exists()} == {stale}


def test_prune_of_object_storage(two_runs, bucket, monkeypatch):
    target, _, old = two_runs
    copied(target, f"{bucket}/two")
    old = {path.relative_to(target).as_posix() for path in old}
    entries_in = objects.entries_in
    past = {"last_modified": datetime(2001, 9, 9, tzinfo=UTC)}

    def listed(store):
        return [one | (past if one["path"] in old else {}) for one in entries_in(store)]

    monkeypatch.setattr(objects, "entries_in", listed)
    assert status(f"{bucket}/two", "--prune", "--yes") == 0
    left = objects.names_in(objects.open_store(f"{bucket}/two"))
    assert set(left) == {name.as_posix() for name in files_of(target)} - old


def test_status_of_an_address_without_shards_is_one_line(bucket):
    with pytest.raises(ValueError, match="s3://bucket/nothing: holds no shards"):
        status(f"{bucket}/nothing")


# ---- freeze files ----


def test_freeze_writes_once_what_freeze_of_finds_in_the_directory(packed, bucket, tmp_path, capsys):
    target = shutil.copytree(packed, tmp_path / "set")
    address = copied(packed, f"{bucket}/frozen")
    expected = freeze_of(ShardSet(str(packed), T5))
    capsys.readouterr()
    for root in (target, address):
        for state in ("written", "there already"):
            assert status(root, "--freeze") == 0
            lists = f"{state}, 24 pairs in 4 shards each of .img_sdxl and .txt_t5cache"
            assert capsys.readouterr().out.splitlines()[-1] == f"{root}/{expected.file_name}: {lists}"
    data = freeze_bytes(expected)
    assert (target / expected.file_name).read_bytes() == data
    assert objects.read(objects.open_store(address), expected.file_name)[0] == data


def test_status_names_shards_of_a_freeze_that_are_gone_and_prune_keeps_those_it_lists(two_runs, tmp_path, capsys):
    target, newer, old = two_runs
    earlier = shutil.move(newer, tmp_path / "newer")
    next(path for path in old if path.name == "00002-00000000.tar").unlink()
    assert status(target, "--freeze") == 0
    shutil.move(earlier, newer)
    (freeze,) = target.glob("freeze-*")
    capsys.readouterr()
    before = files_of(target)
    assert status(target, "--prune", "--yes") == 1 and files_of(target) == before
    assert f"kept by --prune, since it is listed in {freeze.name}" in capsys.readouterr().out
    (gone, *_) = sorted(path for path in old if path.exists() and path.suffix == ".tar")
    gone.unlink()
    assert status(target) == 1
    assert f"1 shard of it gone, like {gone.relative_to(target)}" in capsys.readouterr().out
    renamed = freeze.rename(target / "mine.safetensors")
    before = files_of(target)
    assert status(target, "--prune", "--yes") == 1 and files_of(target) == before
    done = capsys.readouterr()
    assert f"{renamed}: is a freeze file under another name" in done.err
    assert "kept by --prune, since it may be listed in mine.safetensors, which cannot be used" in done.out
    change(renamed.rename(freeze), [-1])
    before = files_of(target)
    assert status(target, "--prune", "--yes") == 1 and files_of(target) == before
    done = capsys.readouterr()
    assert f"{freeze}: is no freeze file, or damaged" in done.err
    assert f"kept by --prune, since it may be listed in {freeze.name}, which cannot be used" in done.out


def test_freeze_refuses_a_set_with_two_runs_and_an_unclear_choice(two_runs, shapes, packed):
    target, _, _ = two_runs
    with pytest.raises(ValueError, match="hold another content under one number"):
        status(target, "--freeze")
    with pytest.raises(ValueError, match=r"has no \*\.txt_sdxl, only \*\.img_sdxl and \*\.txt_t5cache"):
        status(packed, "--freeze", "--cache_suffix", ".txt_sdxl")
    with pytest.raises(ValueError, match=r"expected image sidecars and one kind of captions, found \.img_sdxl; name"):
        status(packed, "--freeze", "--cache_suffix", ".img_sdxl")
    with pytest.raises(ValueError, match="is no shard set"):
        status(shapes, "--freeze")


# ---- tools that take rows ----


def lines_of(capsys, script, *argv):
    capsys.readouterr()
    assert run_script(script, *argv) == 0
    return capsys.readouterr().out


def test_previews_of_rows_are_those_of_their_sidecars(shapes, packed, remote, model_t5, tmp_path):
    show = ("cache/show_vae_latent.py", "--model", model_t5, "--device", "cpu")
    (path,) = packed.glob("img_*/00001-*.tar")
    address = f"{remote}/{path.relative_to(packed)}"
    expected = shapes / "00009.img_sdxl", shapes / "00010.img_sdxl"
    assert run_script(*show, *expected, "--out", tmp_path / "files") == 0
    assert run_script(*show, f"{path}#00009", f"{path}#00010.img_sdxl", "--out", tmp_path / "rows") == 0
    assert run_script(*show, path, "--out", tmp_path / "shard") == 0
    assert run_script(*show, f"{address}#00009", "--out", tmp_path / "far") == 0
    assert run_script(*show, remote, "--out", tmp_path / "set", "--num_images", 1) == 0
    written = {}
    for kind in ("files", "rows", "shard", "far", "set"):
        pictures = {path.name.partition(".")[0]: path.read_bytes() for path in (tmp_path / kind).rglob("*.png")}
        written[kind] = pictures
    assert written["files"] == written["rows"] and len(written["shard"]) == 7 and len(written["set"]) == 1
    assert written["files"].items() <= written["shard"].items() and written["far"].items() <= written["files"].items()


def test_text_std_of_a_set_is_that_of_its_folder(shapes, packed, remote, capsys):
    expected = lines_of(capsys, "cache/check_text_cache_std.py", shapes, "--cache_suffix", T5[1])
    expected = [line for line in expected.splitlines() if "_null_caption" not in line]
    (half,) = packed.glob("txt_*")
    for paths in ([packed], [half], [remote], sorted(half.glob("*.tar"))):
        assert lines_of(capsys, "cache/check_text_cache_std.py", *paths).splitlines() == expected


def test_compare_takes_rows_and_shards(shapes, packed, remote, tmp_path, capsys):
    compare, sidecar = "cache/compare_tensorfiles.py", shapes / "00009.img_sdxl"
    (path,) = packed.glob("img_*/00001-*.tar")
    assert lines_of(capsys, compare, sidecar, f"{path}#00009") == lines_of(capsys, compare, sidecar, sidecar)
    assert "7 pairs: 7 identical" in lines_of(capsys, compare, path, f"{remote}/{path.relative_to(packed)}")
    folder = tmp_path / "folder"
    folder.mkdir()
    for number in range(7, 13):
        shutil.copy(shapes / f"{number:05}.img_sdxl", folder)
    assert run_script(compare, path, folder) == 1
    assert "only in A:\n  00013.img_sdxl\n6 pairs: 6 identical" in capsys.readouterr().out
    with pytest.raises(ValueError, match="expected two files or rows"):
        run_script(compare, sidecar, f"{path}#99999")


def test_a_row_that_is_not_there_or_is_damaged_is_named(packed, tmp_path, capsys):
    target = shutil.copytree(packed, tmp_path / "set")
    (path,) = target.glob("txt_*/00001-*.tar")
    change(path, [int(Shard(path).arrays["offset"][0])])
    assert run_script("cache/check_text_cache_std.py", f"{path}#99999", f"{path}#00007", f"{path}#00008") == 1
    named = capsys.readouterr().err
    assert f"{path}: has no row 99999; it has 7 rows, like 00007" in named
    assert f"{path}#00007.txt_t5cache: row 0 does not match" in named


def test_latents_of_shards_are_validated_against_images_of_their_names(shapes, packed, model_t5, tmp_path, capsys):
    (tmp_path / "images").mkdir()
    for path in sorted(shapes.glob("*.png"))[:3]:
        shutil.copy(path, tmp_path / "images")
    validate = "cache/validate_img_cache.py", "--model", model_t5, "--device", "cpu"
    of_set = lines_of(capsys, *validate, "--data_root", tmp_path / "images", "--shards", packed)
    for path in sorted(shapes.glob("*.img_sdxl"))[:3]:
        shutil.copy(path, tmp_path / "images")
    of_folder = lines_of(capsys, *validate, "--data_root", tmp_path / "images")
    assert of_set.splitlines()[-1] == of_folder.splitlines()[-1] and "over 3 images of 3 cached" in of_set
    with pytest.raises(ValueError, match="no images of the 24 rows"):
        run_script(*validate, "--data_root", tmp_path, "--shards", packed)
