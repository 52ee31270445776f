"""Shard sets made from tars of images and captions by the cache scripts: the rows, several processes, failures."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile

import pytest
from cache_fixtures import damage_tars, files, make_tars
from cache_fixtures import shard_command as command
from helpers import REPO, T5, digest, fake_s3, run_script, train, wait_until

from cachetrain.data import objects
from cachetrain.data.index import PairIndex
from cachetrain.data.shards import Shard
from cachetrain.data.sidecar import read_sidecar


def make(model, data, out, *flags):
    """Makes both halves; returns the exit codes."""
    return [run_script(*command(half, model, data, out, *flags)) for half in ("img", "txt")]


@pytest.fixture(scope="module")
def tars(tmp_path_factory):
    return make_tars(tmp_path_factory.mktemp("tars"))


@pytest.fixture(scope="module")
def made(tars, model_t5, tmp_path_factory):
    out = tmp_path_factory.mktemp("sets") / "set"
    assert make(model_t5, tars, out) == [0, 0]
    return out


def test_rows_are_the_sidecars_of_the_extracted_images(tars, made, model_t5, tmp_path):
    for path in tars.glob("*.tar"):
        with tarfile.open(path) as tar:
            tar.extractall(folder := tmp_path / path.stem, filter="data")
        if path.stem == "00001":  # the one without a .txt
            (folder / "000010003.txt").write_text("from json 3")
        assert make(model_t5, folder, None) == [0, 0]
        for suffix in T5:
            (shard,) = made.glob(f"{suffix[1:]}-*/{path.stem}-*.tar")
            with tarfile.open(shard) as tar:
                assert [name.partition(".")[0] for name in tar.getnames()[1:]] == sorted(
                    path.stem for path in folder.glob("*.jpg")
                )
                tar.extractall(rows := tmp_path / "rows", filter="data")
            for expected in folder.glob(f"0*{suffix}"):
                tensors, header = read_sidecar(rows / expected.name)
                expected_tensors, expected_header = read_sidecar(expected)
                assert digest(tensors) == digest(expected_tensors)
                of_file = ["source_mtime_ns", "header_sha256"]
                if expected.name == "000010003.txt_t5cache":
                    of_file.append("source_size")  # of the .json
                changed = {key for key in header.metadata if header.metadata[key] != expected_header.metadata[key]}
                assert changed == set(of_file) and header.metadata.keys() == expected_header.metadata.keys()


def test_a_rerun_writes_nothing_and_loads_no_text_encoder(tars, made, model_t5, monkeypatch, capsys):
    before = {path: path.stat().st_mtime_ns for path in made.rglob("*.*")}
    monkeypatch.setattr("cachetrain.modeling.text_encoders.open_text_encoder", None)
    assert make(model_t5, tars, made) == [0, 0]
    assert {path: path.stat().st_mtime_ns for path in made.rglob("*.*")} == before
    assert capsys.readouterr().out.count("0 shards of 3 inputs written") == 2


@pytest.mark.parametrize("ranks", [[0, 1, 2], [2]])
def test_processes_make_the_same_bytes_in_any_number_and_one_makes_what_others_left(
    ranks, tars, made, model_t5, tmp_path, monkeypatch
):
    monkeypatch.setenv("WORLD_SIZE", "3")
    for rank in ranks:
        monkeypatch.setenv("RANK", str(rank))
        workers = ("--num_workers", 2 if len(ranks) == 1 else 0)
        assert run_script(*command("img", model_t5, tars, tmp_path, *workers)) == 0
        assert run_script(*command("txt", model_t5, tars, tmp_path)) == 0
    assert files(tmp_path) == files(made)


def test_addresses_of_stores_are_read_and_written_like_directories(tars, made, model_t5):
    with fake_s3() as bucket:
        store = objects.open_store(bucket)
        for path in tars.glob("*.tar"):
            objects.put_new(store, f"cached/tars/{path.name}", path.read_bytes())
        objects.put_new(store, "cached/tars/00000.parquet", b"no list of URLs")
        assert make(model_t5, f"{bucket}/cached/tars", f"{bucket}/cached/set") == [0, 0]
        names = [name for name in objects.names_in(store) if name.startswith("cached/set/")]
        sidecars = [objects.read(store, name)[0] for name in names]
        assert sorted(sidecars) == sorted(files(made).values())  # under names with the ETags of the tars
        assert make(model_t5, f"{bucket}/cached/tars/", f"{bucket}/cached/set") == [0, 0]
        assert [name for name in objects.names_in(store) if name.startswith("cached/set/")] == names


def test_file_addresses_give_the_shards_of_their_paths(tars, made, model_t5, tmp_path):
    (tmp_path / "a b").symlink_to(tars)
    (out := tmp_path / "set").mkdir()
    assert make(model_t5, f"file://{tmp_path}/a%20b", f"file://{out}") == [0, 0]
    assert files(out) == files(made)
    with pytest.raises(ValueError, match="file://data: names another machine"):
        make(model_t5, "file://data", out)


def test_processes_start_with_their_own_tars_and_go_on_with_different_others(monkeypatch):
    from cachetrain.caching.inputs import Input
    from cachetrain.caching.shard_run import _in_turn

    tars = [Input(number, "", "", "") for number in range(9)]
    monkeypatch.setenv("WORLD_SIZE", "3")
    orders = []
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        orders.append([tar.number for tar in _in_turn(tars)])
    assert [order[:3] for order in orders] == [[0, 3, 6], [1, 4, 7], [2, 5, 8]]
    assert all(sorted(order) == list(range(9)) for order in orders)
    assert orders[0][3:] == [7, 8, 4, 5, 1, 2] and len({order[3] for order in orders}) == 3


def test_a_killed_process_continued_by_two_gives_the_bytes_of_a_clean_run(
    tars, made, model_t5, tmp_path, monkeypatch
):
    """Killed after the first shard, when it is at the second tar."""
    out = tmp_path / "set"
    code = (
        "import runpy, sys, time\n"
        "from cachetrain.caching import shard_run\n"
        "original = shard_run.Inputs.open\n"
        "def open(self, one):\n"
        "    if one.number == 1:\n"
        "        time.sleep(3600)\n"
        "    return original(self, one)\n"
        "shard_run.Inputs.open = open\n"
        "sys.argv = sys.argv[1:]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    argv = [sys.executable, "-c", code, *command("img", model_t5, tars, out)]
    process = subprocess.Popen(argv, cwd=REPO, env=os.environ | {"PYTHONPATH": str(REPO)})
    wait_until(lambda: list(out.rglob("00000-*.tar")), lambda: process.poll() is None)
    process.send_signal(signal.SIGKILL)
    process.wait()
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert len(list(out.rglob("*.tar"))) == 1
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        assert make(model_t5, tars, out) == [0, 0]
    assert files(out) == files(made)


def test_the_first_writer_wins(tars, made, model_t5, tmp_path, monkeypatch, capsys):
    """Another process writes the shards while this one encodes them."""
    from cachetrain.caching import shard_run

    put = shard_run.put_new

    def put_late(store, name, data):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"of the other")
        return put(store, name, data)

    monkeypatch.setattr(shard_run, "put_new", put_late)
    assert run_script(*command("img", model_t5, tars, tmp_path)) == 0
    assert set(files(tmp_path).values()) == {b"of the other"}
    assert "0 shards of 3 inputs written" in capsys.readouterr().out


@pytest.fixture(scope="module")
def faulty(tars, tmp_path_factory):
    return damage_tars(tars, tmp_path_factory.mktemp("faulty") / "tars")


def test_rows_that_fail_are_missing_in_their_half_named_and_matched_in_training(faulty, model_t5, tmp_path, capfd):
    out = tmp_path / "set"
    assert run_script(*command("img", model_t5, faulty, out)) == 1
    errors = capfd.readouterr().err
    assert "00001.tar#000010000.jpg: not an image" in errors
    assert "00002.tar: is no whole tar" in errors and "2 failed" in errors
    assert run_script(*command("txt", model_t5, faulty, out)) == 1
    errors = capfd.readouterr().err
    assert "00001.tar#000010001.txt: not UTF-8 text" in errors
    assert '00001.tar#000010003.json: has no text under "caption"' in errors and "3 failed" in errors
    assert sorted(len(Shard(path)) for path in out.rglob("*.tar")) == [3, 4, 5, 5]
    index = PairIndex([str(out)], *T5)
    assert [index.relative_name(i) for i in range(len(index))][5:] == ["000010002", "000010004"]
    assert index.num_unpaired == 3
    train(out, model_t5, tmp_path / "run", "--max_steps", 2, "--batch_size", 3, "--cond_dropout", 0.5)


def test_a_tar_that_changed_is_made_anew_and_the_old_shard_is_named(tars, made, model_t5, tmp_path, capfd):
    data, out = shutil.copytree(tars, tmp_path / "tars"), shutil.copytree(made, tmp_path / "set")
    os.utime(data / "00001.tar", ns=(0, 0))
    (old,) = out.glob("img_*/00001-*.tar")
    assert run_script(*command("img", model_t5, data, out)) == 0
    captured = capfd.readouterr()
    assert "1 shard of 3 inputs written" in captured.out
    assert f"{old}: is of an earlier state of its input, or made with other options; delete it" in captured.err
    (new,) = set(out.glob("img_*/00001-*.tar")) - {old}
    assert new.read_bytes() == old.read_bytes()
    old.unlink()
    PairIndex([str(out)], *T5)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--overwrite",), "--overwrite cannot be combined with --out"),
        (("--data_root", "other"), "--out takes one --data_root"),
    ],
)
def test_options_that_tars_do_not_have_are_refused(flags, message, tars, model_t5, tmp_path):
    with pytest.raises(ValueError, match=message):
        run_script(*command("img", model_t5, tars, tmp_path / "set", *flags))


@pytest.mark.parametrize(("out", "message"), [("", "no directory given"), ("gs:/a", "did you mean gs://a")])
def test_places_that_are_none_are_refused(out, message, tars, model_t5, capsys):
    with pytest.raises(SystemExit):
        run_script(*command("txt", model_t5, tars, None, "--out", out))
    assert message in capsys.readouterr().err


def test_folders_without_tars_and_two_tars_of_one_number_are_refused(tars, model_t5, tmp_path):
    with pytest.raises(ValueError, match=r"no tars like 00000\.tar"):
        run_script(*command("txt", model_t5, tmp_path, tmp_path / "set"))
    for name in ("a-00000.tar", "b-00000.tar"):
        shutil.copy(tars / "00000.tar", tmp_path / name)
    with pytest.raises(ValueError, match=r"a-00000.tar and .*b-00000.tar have one number"):
        run_script(*command("txt", model_t5, tmp_path, tmp_path / "set"))


def test_variants_of_captions_are_made_from_tars_too_and_anew_with_other_options(tars, model_t5, tmp_path, capfd):
    shards = {}
    for prefix in ("a ", "b "):
        flags = ("--captions", "lines", "--prefix", prefix)
        assert run_script(*command("txt", model_t5, tars, tmp_path, *flags)) == 0
        captured = capfd.readouterr()
        assert "3 shards of 3 inputs written" in captured.out
        paths = set(tmp_path.rglob("*.tar")).difference(*shards.values())
        assert len({path.parent for path in tmp_path.rglob("*.tar")}) == 1
        for path in paths:
            fields = Shard(path).tensors(0)[1]
            assert json.loads(fields["captions"]) == {"captions": ["lines"], "prefix": prefix}
        shards[prefix] = paths
    old = re.search(r"warning: (.*): is of an earlier state of its input, or made with other options", captured.err)
    assert old[1] == str(min(shards["a "])) and "delete it, and 2 shards like it, before training" in captured.err


@pytest.mark.parametrize("cut", [1, 512, 700, 3000, -10240])
def test_every_cut_off_tar_is_noticed(cut, tars, tmp_path):
    from cachetrain.caching.tars import OpenTar

    data = (tars / "00000.tar").read_bytes()
    assert len(OpenTar("x.tar", data).pairs) == 5
    with tarfile.open(tars / "00000.tar") as tar:
        end = max(member.offset_data + -(-member.size // 512) * 512 for member in tar)
    with pytest.raises(ValueError, match=r"x\.tar: is no whole tar"):
        OpenTar("x.tar", data[: cut if cut > 0 else end])
