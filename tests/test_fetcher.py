"""Training from object storage and from freeze files: the same batches as from the folder, whatever happens."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import T5, digest, fake_s3, refused, run_script, train, trainer_argv, wait_until
from runs import content
from train_ranks import Ranks

from cachetrain.caching.packing import shard_row
from cachetrain.data import fetcher as fetching
from cachetrain.data import near, objects, order, shards, sources
from cachetrain.data.freeze import freeze_bytes, freeze_of, read_freeze
from cachetrain.data.frozen import FrozenIndex
from cachetrain.data.index import PairIndex
from cachetrain.data.shard_set import ShardSet
from cachetrain.data.sidecar import SidecarError

RUN = ("--batch_size", 5, "--save_steps", 3, "--cond_dropout", 0.2, "--max_steps", 6)
WINDOW = ("--shuffle_window", 1)


def pack(folder, out, rows=2):
    assert run_script("cache/pack_shards.py", "--data_root", folder, "--out", out, "--rows", rows) == 0
    return out


@pytest.fixture(scope="module")
def packed(shapes, tmp_path_factory):
    """24 pairs in 12 numbers, and a freeze file."""
    return frozen(pack(shapes, tmp_path_factory.mktemp("fetcher") / "set"))


def frozen(directory):
    freeze = freeze_of(ShardSet(str(directory), T5))
    (directory / freeze.file_name).write_bytes(freeze_bytes(freeze))
    return directory


def freeze_file(directory):
    (path,) = directory.glob("freeze-*")
    return path


@pytest.fixture(scope="module")
def bucket():
    with fake_s3() as address:
        yield address


def uploaded(directory, url):
    store = objects.open_store(url)
    for path in directory.rglob("*.*"):
        objects.put_new(store, path.relative_to(directory).as_posix(), path.read_bytes())
    return url


@pytest.fixture(scope="module")
def remote(bucket, packed):
    return uploaded(packed, f"{bucket}/set")


@pytest.fixture
def few_lanes(monkeypatch):
    """Rounds of 2 numbers."""
    monkeypatch.setattr(order, "LANES", 2)
    monkeypatch.setattr(sources, "LANES", 2)


@pytest.fixture(scope="module")
def expected(packed, model_t5, tmp_path_factory):
    """{flags: weights} of runs from the set on this machine."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(order, "LANES", 2)
        for flags in ((), WINDOW):
            found[flags] = digest(train(packed, model_t5, tmp_path_factory.mktemp("run") / "run", *RUN, *flags)[1])
    return found


def megabytes(root):
    return sum(path.stat().st_size for path in root.rglob("*.tar")) / 2**20


# Where the pairs come from changes nothing


@pytest.mark.parametrize(("freeze", "flags", "workers"), [(0, (), 0), (0, WINDOW, 2), (1, (), 2), (1, WINDOW, 0)])
def test_training_from_object_storage_is_that_from_the_set(
    freeze, flags, workers, remote, packed, expected, few_lanes, model_t5, tmp_path
):
    data = f"{remote}/{freeze_file(packed).name}" if freeze else remote
    there = ["--shard_cache", tmp_path / "near", "--num_workers", workers, "--log_groups", 1, 5]
    lines, weights = train(data, model_t5, tmp_path / "run", *RUN, *flags, *there)
    assert digest(weights) == expected[flags]
    fractions = [
        line["05_Performance/shard_wait_fraction"] for line in lines if "05_Performance/images_per_second" in line
    ]
    assert fractions and all(0 <= fraction <= 1.01 for fraction in fractions)


def test_ranks_share_a_fetcher_and_train_the_same(packed, few_lanes, model_t5, tmp_path):
    found = {}
    for name, data in (("here", packed), ("there", f"file://{freeze_file(packed)}")):
        argv = trainer_argv(data, model_t5, tmp_path / name, *RUN, *WINDOW, "--shard_cache", tmp_path / "near")
        results = Ranks(argv, 2, tmp_path / f"{name}-ranks").finish()
        assert [rank.code for rank in results] == [0, 0], [rank.output for rank in results]
        found[name] = content(tmp_path / name, 6) | {"shards": None, "settings": None}
    assert found["here"] == found["there"]


def test_a_cache_of_half_the_set_changes_nothing_and_is_never_exceeded(
    remote, packed, expected, few_lanes, model_t5, tmp_path
):
    limit = megabytes(packed) / 2
    flags = [*RUN, *WINDOW, "--shard_cache", tmp_path / "near", "--shard_cache_gb", limit / 1024, "--num_workers", 2]
    with sampled(lambda: megabytes(tmp_path / "near")) as sizes:
        _, weights = train(remote, model_t5, tmp_path / "run", *flags)
    assert digest(weights) == expected[WINDOW]
    assert limit / 2 < max(sizes) <= limit


@contextlib.contextmanager
def sampled(measure):
    """Yields a list that a thread fills with what `measure` returns."""
    values, stopped = [], threading.Event()

    def sample():
        while not stopped.wait(0.01):
            with contextlib.suppress(OSError):
                values.append(measure())

    thread = threading.Thread(target=sample)
    thread.start()
    yield values
    stopped.set()
    thread.join()


def test_a_freeze_file_stands_for_its_shards_whatever_comes_later(packed, expected, few_lanes, model_t5, tmp_path):
    data = tmp_path / "set"
    shutil.copytree(packed, data)
    later = pack_more(data)
    _, weights = train(freeze_file(data), model_t5, tmp_path / "run", *RUN, *WINDOW)
    assert later and digest(weights) == expected[WINDOW]


def pack_more(data):
    """Adds a number to a set: a copy of another; returns the names."""
    added = []
    for path in data.glob("*/00003-*.tar"):
        added.append(path.with_name(path.name.replace("00003", "00077")))
        shutil.copy(path, added[-1])
    return added


def test_a_run_that_goes_on_uses_the_shards_it_started_with(packed, model_t5, tmp_path, capfd):
    data, run = tmp_path / "set", tmp_path / "run"
    shutil.copytree(packed, data)
    train(data, model_t5, tmp_path / "whole", *RUN)
    train(data, model_t5, run, *RUN[:-1], 3)
    added = pack_more(data)
    train(os.path.relpath(data), model_t5, run, *RUN, "--resume", "latest")
    assert content(run, 6) == content(tmp_path / "whole", 6)
    assert (
        f"{os.path.relpath(data)}: not used: 2 shards that were added after the run started" in capfd.readouterr().out
    )
    for path in data.glob("*/00003-*.tar"):
        path.unlink()
    message = refused(data, model_t5, run, "--resume", "latest", "--max_steps", 9)
    assert re.fullmatch(
        rf"{data}/img_sdxl-.{{8}}/00003-.{{8}}\.tar: is gone, though the run uses it; put it back .*", message
    )
    assert len(added) == 2


# What a freeze file says is what the indexes say


@pytest.mark.parametrize("change", ["as it is", "repeats", "a row less"])
def test_a_frozen_index_is_the_index_of_its_set(change, shapes, packed, tmp_path):
    data = packed
    if change != "as it is":
        folder = tmp_path / "folder"
        shutil.copytree(shapes, folder)
        (folder / "multiply.txt").write_text("1.5" if change == "repeats" else "1")
        data = pack(folder, tmp_path / "set", 5)
    if change == "a row less":
        for path in data.glob("txt*/00001-*.tar"):
            rows = [packed_row(path, row) for row in (0, 1, 3, 4)]
            path.write_bytes(shards.build_shard(rows, T5[1], shards.Shard(path).fields["widths"]))
    index = PairIndex([str(data)], *T5, [0.5])
    shard_set = ShardSet(str(data), T5)
    other = FrozenIndex(read_freeze("x", freeze_bytes(freeze_of(ShardSet(str(data), T5)))), shard_set, 0.5)
    assert len(index) == len(other) == 24 - (change == "a row less")
    samples = np.random.default_rng(0).permutation(len(index))
    for name in ("shape_ids", "image_bytes", "tokens", "all_tokens", "repeats"):
        assert np.array_equal(getattr(other, name)[samples], getattr(index, name)[samples]), name
    names = "shapes samples_per_epoch max_tokens num_tokens num_image_bytes num_with_variants varies num_masked "
    names += "text_kind caption_sources text_widths item_bytes image_headers text_header image_settings text_settings"
    assert {name: getattr(index, name) for name in names.split()} == {
        name: getattr(other, name) for name in names.split()
    }
    for name in ("counts", "visits", "blocks"):
        assert np.array_equal(getattr(index, name), getattr(other, name)), name
    for weighted in (False, True):
        assert np.array_equal(index.counts_of_blocks(weighted), other.counts_of_blocks(weighted))
    for i in samples.tolist():
        assert index.stem(i) == other.stem(i) and index.text_path(i) == other.text_path(i)
        assert digest(index.image_tensors(i)[0]) == digest(other.image_tensors(i)[0])
        assert digest(index.text_tensors(i)[0]) == digest(other.text_tensors(i)[0])


def packed_row(path, row):
    shard = shards.Shard(path)
    data = bytes(shard.read(row))
    return shard_row(shard.name(row), str(path), data, "txt_t5cache")[0]


def test_every_flipped_byte_of_a_freeze_file_is_noticed(packed):
    data = freeze_file(packed).read_bytes()
    for place in range(0, len(data), 7):
        broken = bytearray(data)
        broken[place] ^= 1
        with pytest.raises(SidecarError, match="is no freeze file, or damaged"):
            read_freeze("x", bytes(broken))


def test_a_shard_with_another_content_than_the_freeze_file_says_is_refused(packed, tmp_path):
    data = tmp_path / "set"
    shutil.copytree(packed, data)
    first, second, *_ = sorted(data.glob("img*/*.tar"))
    shutil.copy(first, second)
    shard_set = ShardSet(str(data), T5)
    index = FrozenIndex(read_freeze("x", freeze_file(data).read_bytes()), shard_set)
    assert index.image_tensors(0)
    with pytest.raises(SidecarError, match=rf"{second}: has another content than the freeze file says"):
        index.image_tensors(2)


def test_a_freeze_file_is_found_by_its_bare_name_and_what_has_no_effect_is_said(packed, model_t5, tmp_path, capfd):
    with contextlib.chdir(packed):
        name, flags = freeze_file(packed).name, ("--shard_cache", tmp_path / "near", "--batch_size", 5)
        train(name, model_t5, tmp_path / "run", "--max_steps", 1, *flags)
    assert "--shard_cache does nothing: no directory is in object storage" in capfd.readouterr().err


# What goes wrong


@pytest.fixture
def near_set(packed, tmp_path, monkeypatch):
    """A Fetcher of a copy of the set, whose store is a directory; and a Near."""
    store, directory = tmp_path / "store", tmp_path / "near"
    shutil.copytree(packed, store)
    directory.mkdir()
    fetchers = []

    def start(limit=None):
        fetchers.append(near.Fetcher({str(directory): str(store)}, limit))
        return fetchers[-1], near.Near(directory, str(store))

    start.store, start.directory = store, directory
    yield start
    for one in fetchers:
        one.close()


def shards_of(store):
    return sorted(path.relative_to(store).as_posix() for path in store.glob("*-*/*.tar"))


def test_what_is_planned_comes_without_being_asked_for_and_what_is_wanted_comes_first(near_set):
    fetcher, wanted = near_set()
    names = shards_of(near_set.store)
    assert wanted.index_of(names[-1]).endswith(".tar.index") and shards_of(near_set.directory) == []
    fetcher.plan([(str(near_set.directory), name) for name in names[:5]])
    wait_until(lambda: shards_of(near_set.directory) == names[:5])
    opened = shards.Shard(near_set.directory / names[-1], index=wanted.index_of(names[-1]))
    wanted.open(opened, names[-1])
    assert opened.read(0) == shards.Shard(near_set.store / names[-1]).read(0) and wanted.waited_s > 0


def test_a_missing_shard_and_one_that_is_none_are_named_and_may_come_later(near_set, capfd):
    _, wanted = near_set()
    first, second, *_ = shards_of(near_set.store)
    whole = [(near_set.store / name).read_bytes() for name in (first, second)]
    (near_set.store / first).unlink()
    (near_set.store / second).write_bytes(b"x" * 9999)
    with pytest.raises(OSError, match=re.escape(f"{first} cannot be read")):
        wanted.open(SimpleNamespace(open=None), first)
    with pytest.raises(OSError, match=re.escape(f"{second}: is not a shard")):
        wanted.open(SimpleNamespace(open=None), second)
    for name, data in zip((first, second), whole, strict=True):
        (near_set.store / name).write_bytes(data)
        wait_until(lambda name=name: can_open(wanted, near_set.directory, name))


@pytest.mark.parametrize("ending", [".tar", ".tar.index"])
def test_a_damaged_copy_is_fetched_again_once(ending, near_set, tmp_path):
    _, wanted = near_set()
    shard_set = ShardSet(str(near_set.directory), T5, shards_of(near_set.store), wanted)
    shard_set.read_indexes(1, lambda name: None)
    whole = shard_set.read(4, 0)
    name = shard_set.names_of(4)[0]
    damage(near_set.directory / f"{name}{ending.removeprefix('.tar')}")
    fresh = ShardSet(str(near_set.directory), T5, shards_of(near_set.store), near.Near(near_set.directory, "s3://x"))
    fresh.read_indexes(1, lambda name: None)
    assert fresh.read(4, 0) == whole
    damage(near_set.store / name)
    damage(near_set.directory / name)
    fresh = ShardSet(str(near_set.directory), T5, shards_of(near_set.store), near.Near(near_set.directory, "s3://x"))
    fresh.read_indexes(1, lambda name: None)
    with pytest.raises(SidecarError, match=rf"s3://x/{name}#.*: row 0 does not match the SHA-256"):
        fresh.read(4, 0)


def damage(path):
    """Flips a bit of the first row, or of the index if there is no row."""
    data = bytearray(path.read_bytes())
    place = 900 if path.suffix == ".index" else shards.Shard(path).arrays["offset"].item(0) + 500
    data[place] ^= 1
    path.write_bytes(data)


def test_a_worker_does_not_wait_when_the_trainer_is_gone(near_set):
    _, wanted = near_set()
    wanted._trainer = -1
    with pytest.raises(OSError, match="the trainer has ended"):
        wanted.index_of("img_sdxl-00000000/00000-00000000.tar")


def can_open(wanted, directory, name):
    try:
        wanted.open(SimpleNamespace(open=(directory / name).read_bytes), name)
        return True
    except OSError:
        return False


def test_a_killed_fetcher_is_started_again_and_goes_on_with_the_plan(near_set, capfd):
    fetcher, _ = near_set()
    names = shards_of(near_set.store)
    (near_set.store / names[0]).rename(near_set.store / "later")
    fetcher.plan([(str(near_set.directory), name) for name in names])
    wait_until(lambda: len(shards_of(near_set.directory)) == len(names) - 1)
    os.kill(fetcher._process.pid, signal.SIGKILL)
    (near_set.store / "later").rename(near_set.store / names[0])
    wait_until(lambda: shards_of(near_set.directory) == names)
    assert "the process that fetches shards has ended (-9); restarting it" in capfd.readouterr().err


def test_stop_signals_do_not_end_it_and_the_end_of_the_trainer_does(near_set):
    fetcher, wanted = near_set()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        fetcher._process.send_signal(number)
    assert wanted.index_of(shards_of(near_set.store)[0])
    trainer = (
        "import sys, os, signal; from cachetrain.data.near import Fetcher\n"
        f"fetcher = Fetcher({{{str(near_set.directory) + '2'!r}: {str(near_set.store)!r}}})\n"
        "print(fetcher._process.pid, flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    os.makedirs(f"{near_set.directory}2")
    result = subprocess.run([sys.executable, "-c", trainer], capture_output=True, text=True)
    pid = int(result.stdout)
    wait_until(lambda: not os.path.exists(f"/proc/{pid}") or "Z" in open(f"/proc/{pid}/stat").read())


def test_two_runs_do_not_share_a_near_directory(near_set, capfd):
    near_set()
    with pytest.raises(ValueError, match="the shards cannot be fetched; see above"):
        near_set()
    assert f"{near_set.directory}: another process is writing there" in capfd.readouterr().err


def test_a_full_disk_waits_for_room_and_says_so(near_set, monkeypatch, capfd):
    names, full = shards_of(near_set.store), shutil.disk_usage("/")._replace(free=0)
    shelf = fetching.Shelf({str(near_set.directory): str(near_set.store)}, None)
    for of in (near.WANTED, near.FAILED):
        (near_set.directory / of).mkdir()
    copies = fetching.Copies(shelf)
    (near_set.directory / near.WANTED / near.request_name(names[0])).touch()
    monkeypatch.setattr(fetching.shutil, "disk_usage", lambda _: full)
    wait_until(lambda: copies.go_on() or "no room for" in capfd.readouterr().err)
    assert shards_of(near_set.directory) == [] and near.request_name(names[0]) in os.listdir(
        near_set.directory / "wanted"
    )
    monkeypatch.undo()
    wait_until(lambda: copies.go_on() or shards_of(near_set.directory) == names[:1])
    wait_until(lambda: copies.go_on() or not os.listdir(near_set.directory / "wanted"))
    assert (near_set.directory / names[0]).read_bytes() == (near_set.store / names[0]).read_bytes()


def test_what_is_needed_last_goes_first(near_set):
    names = shards_of(near_set.store)
    sizes = [(near_set.store / name).stat().st_size for name in names]
    shelf = fetching.Shelf({str(near_set.directory): str(near_set.store)}, sum(sizes[:3]))
    keys = [(str(near_set.directory), name) for name in names]
    shelf.plan(keys[:3])
    for key in keys[:3]:
        shelf.copy(key, wanted=False)
    with pytest.raises(fetching.NoRoomError):  # all that is there is needed
        shelf.copy(keys[3], wanted=False)
    shelf.copy(keys[3], wanted=True)
    assert shards_of(near_set.directory) == [names[0], names[1], names[3]]
    shelf.plan(keys[:2])
    shelf.copy(keys[2], wanted=False)
    assert shards_of(near_set.directory) == names[:3]


def test_what_cannot_be_fetched_at_all_is_refused_in_one_line(
    remote, bucket, packed, few_lanes, model_t5, tmp_path, monkeypatch
):
    cache = ["--shard_cache", tmp_path / "near"]
    assert refused(remote, model_t5, tmp_path / "x") == (
        f"{remote}: training from object storage needs --shard_cache, a directory for its shards"
    )
    assert "s3://bucket/other: no shards there" in refused(f"{bucket}/other", model_t5, tmp_path / "x", *cache)
    with pytest.raises(OSError, match=r"cannot be listed: .*404"):
        train("s3://nobucket/set", model_t5, tmp_path / "x", *cache, "--max_steps", 1)
    full = shutil.disk_usage(tmp_path)._replace(free=10)
    for flags, flag, room in (
        (["--shard_cache_gb", 1e-6], "--shard_cache_gb", "1.07kB"),
        ([], "--shard_cache", "10.0B"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(sources.shutil, "disk_usage", lambda _: full)
            message = refused(remote, model_t5, tmp_path / "x", *cache, *flags)
        assert re.match(
            rf"{flag}: .*B of {remote} are read at a time \(without --shuffle_window, all of it\)", message
        )
        assert f"there is room for {room}; " in message
    held_out = uploaded(packed, f"{bucket}/held_out")
    just_one = ["--shard_cache_gb", 1.5 * megabytes(packed) / 1024]
    message = refused(remote, model_t5, tmp_path / "x", *cache, "--val_data_dir", held_out, *just_one)
    assert f"B of {remote}, {held_out} are read at a time" in message
    store = objects.open_store(remote)
    gone = shards_of(packed)[0]
    data = objects.read(store, gone)[0]
    objects.delete(store, [gone])
    message = refused(f"{remote}/{freeze_file(packed).name}", model_t5, tmp_path / "x", *cache)
    assert message.startswith(
        f"{remote}/{gone}: is gone, though the freeze file lists it; put it back (1 shard missing)"
    )
    objects.put_new(store, gone, data)
