"""What the cache scripts read with --out: parquet files, masks and captions in tars, odd names; what a rerun says."""

import io
import shutil
import sys
import tarfile
import threading
import time

import numpy as np
import pytest
from cache_fixtures import pack_tar, picture
from helpers import digest, run_script
from PIL import Image

from cachetrain.caching import shard_run
from cachetrain.data.shards import Shard, failed_rows
from cachetrain.data.sidecar import read_sidecar
from cachetrain.modeling import normalisation

SIZE = ("--target_width", 64, "--target_height", 64, "--num_workers", 0, "--batch_size", 4)


def make(half, model, data, out, *flags):
    """Makes a half of a set, or with out=None sidecars; returns the exit code."""
    script, more = ("cache/create_img_sdxl.py", SIZE) if half == "img" else ("cache/create_t5cache_768.py", ())
    return run_script(script, "--model", model, "--data_root", data, *(("--out", out) if out else ()), *more, *flags)


def encoded(array, kind="PNG"):
    file = io.BytesIO()
    Image.fromarray(array).save(file, kind)
    return file.getvalue()


def image(seed=0, kind="JPEG"):
    return encoded(picture(72, 64, seed), kind)


def shards(out, half):
    return sorted(out.glob(f"{half}_*/*.tar"))


def names(shard):
    return [name.decode() for name in Shard(shard).names()]


@pytest.fixture(scope="module")
def samples():
    """{name: members by suffix} of two inputs; some have masks, one has an empty caption."""
    half = np.zeros((64, 72), np.uint8)
    half[:, :30] = 255
    samples = {}
    for i in range(6):
        samples[f"0000{i // 3}000{i % 3}"] = {".jpg": image(i), ".txt": f"picture {i}".encode() if i != 4 else b""}
        if i % 2:
            samples[f"0000{i // 3}000{i % 3}"][".mask.png"] = encoded(half)
    return samples


@pytest.fixture(scope="module")
def tars(samples, tmp_path_factory):
    root = tmp_path_factory.mktemp("inputs")
    for number in ("00000", "00001"):
        of_tar = {k: members for k, members in samples.items() if k.startswith(number)}
        pack_tar(root / f"{number}.tar", {k + suffix: data for k, m in of_tar.items() for suffix, data in m.items()})
    return root


@pytest.fixture(scope="module")
def made(tars, model_t5, tmp_path_factory):
    out = tmp_path_factory.mktemp("sets") / "set"
    assert [make("img", model_t5, tars, out, "--mask", "files"), make("txt", model_t5, tars, out)] == [0, 0]
    return out


def write_parquet(path, columns, **options):
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table(columns), path, **options)


# Parquet


@pytest.mark.parametrize("form", ["img2dataset", "datasets"])
def test_rows_of_parquet_files_are_those_of_tars(form, samples, tars, made, model_t5, tmp_path):
    for number in range(2):
        rows = [(k, m) for k, m in samples.items() if k.startswith(f"0000{number}")]
        images, texts, masks = ([m.get(s) for _, m in rows] for s in (".jpg", ".txt", ".mask.png"))
        keys, texts = [k for k, _ in rows], [text.decode() for text in texts]
        if form == "img2dataset":  # with a download that failed
            columns = {"key": [*keys, "x"], "jpg": [*images, None], "caption": [*texts, None], "mask": [*masks, None]}
            write_parquet(tmp_path / f"{number:05d}.parquet", columns | {"width": [72] * 4}, row_group_size=2)
        else:
            structs = [{"bytes": data, "path": None} for data in images]
            columns = {"image": structs, "text": texts, "mask": [m and {"bytes": m, "path": "m.png"} for m in masks]}
            (tmp_path / "data").mkdir(exist_ok=True)
            write_parquet(tmp_path / "data" / f"train-0000{number}-of-00002.parquet", columns)
    out = tmp_path / "set"
    assert (
        make("img", model_t5, tmp_path, out, "--mask", "files")
        == make("txt", model_t5, f"file://{tmp_path}", out)
        == 0
    )
    for half in ("img", "txt"):
        for own, expected in zip(shards(out, half), shards(made, half), strict=True):
            if form == "img2dataset":
                assert own.read_bytes() == expected.read_bytes()
            else:
                assert names(own) == [f"{own.name[:5]}_00000{row}" for row in range(3)]
                assert Shard(own).arrays["sha256"].tolist() == Shard(expected).arrays["sha256"].tolist()


def test_lists_beside_tars_are_not_read_but_parquet_files_of_images_are_refused_there(tars, made, model_t5, tmp_path):
    data = shutil.copytree(tars, tmp_path / "tars")
    for number in range(2):
        write_parquet(data / f"0000{number}.parquet", {"url": ["x"], "key": ["y"]})
    assert make("txt", model_t5, data, tmp_path / "set") == 0
    assert [path.name for path in shards(tmp_path / "set", "txt")] == [path.name for path in shards(made, "txt")]
    write_parquet(data / "00000.parquet", {"jpg": [image()], "key": ["y"]})
    for where in (data, f"file://{data}"):
        with pytest.raises(ValueError, match=r"00000\.parquet and .*00000\.tar have one number"):
            make("txt", model_t5, where, tmp_path / "set")


def test_damaged_parquet_files_and_those_without_images_are_named_and_fail_as_a_whole(model_t5, tmp_path, capfd):
    for number in range(3):
        columns = {"png": [image(i, "PNG") for i in range(3)], "text": list("abc"), "key": list("abc")}
        write_parquet(tmp_path / f"{number}.parquet", columns, write_page_checksum=True)
    data = bytearray((tmp_path / "1.parquet").read_bytes())
    data[3000] ^= 1
    (tmp_path / "1.parquet").write_bytes(data)
    write_parquet(tmp_path / "2.parquet", {"image": ["a.png"], "text": ["a"]})
    assert make("img", model_t5, tmp_path, tmp_path / "set") == 1
    assert [path.name[:5] for path in shards(tmp_path / "set", "img")] == ["00000"]
    errors = capfd.readouterr().err
    assert f"{tmp_path}/1.parquet: is no whole parquet file (" in errors
    assert f"{tmp_path}/2.parquet: has no column of image bytes, found image, text; expected one of jpg" in errors


def test_parquet_without_pyarrow_is_one_message(model_t5, tmp_path, monkeypatch):
    (tmp_path / "00000.parquet").touch()
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ValueError, match=r"parquet needs pyarrow; run `pip install -e \.\[parquet\]`"):
        make("txt", model_t5, tmp_path, tmp_path / "set")


def test_a_row_with_the_key_of_another_is_named(model_t5, tmp_path, capfd):
    write_parquet(tmp_path / "0.parquet", {"jpg": [image(), image(1), None], "key": [7, 7, 7]})
    assert make("img", model_t5, tmp_path, tmp_path / "set") == 1
    assert [*map(names, shards(tmp_path / "set", "img"))] == [["7"]]
    assert "0.parquet#7.jpg: row 1 has the key of another row" in capfd.readouterr().err


def test_a_list_of_captions_in_a_row_needs_captions_lines(model_t5, tmp_path, capfd):
    write_parquet(tmp_path / "0.parquet", {"jpg": [image()] * 2, "caption": [["one", "two"], ["one"]]})
    assert make("txt", model_t5, tmp_path, tmp_path / "a") == 1
    assert "00000_000000.jpg: has 2 captions; pass --captions lines" in capfd.readouterr().err
    assert make("txt", model_t5, tmp_path, tmp_path / "b", "--captions", "lines") == 0
    assert [Shard(path).tensors(0)[1]["variants"] for path in shards(tmp_path / "b", "txt")] == ['{".txt":[[0],[1]]}']


# Tars


def test_masks_and_captions_in_tars_are_those_beside_extracted_images(tars, made, samples, model_t5, tmp_path):
    more = {"000000001.long.txt": b"a longer one", "000000002.caption": b"another"}
    members = {k + s: data for k, m in samples.items() if k < "00001" for s, data in m.items()}
    (tmp_path / "tars").mkdir()
    pack_tar(tmp_path / "tars" / "00000.tar", members | more)
    for name, data in (members | more).items():
        (tmp_path / "folder").mkdir(exist_ok=True)
        (tmp_path / "folder" / name).write_bytes(data)
    captions = ("--captions", "files")
    assert make("img", model_t5, tmp_path / "folder", None, "--mask", "files") == 0
    assert make("txt", model_t5, tmp_path / "folder", None, *captions) == 0
    assert make("txt", model_t5, tmp_path / "tars", tmp_path / "set", *captions) == 0
    masked = num_variants = 0
    for shard in (shards(made, "img")[0], *shards(tmp_path / "set", "txt")):
        with tarfile.open(shard) as tar:
            tar.extractall(rows := tmp_path / "rows", filter="data")
            for name in tar.getnames()[1:]:
                tensors, header = read_sidecar(rows / name)
                expected_tensors, expected = read_sidecar(tmp_path / "folder" / name)
                assert digest(tensors) == digest(expected_tensors)
                changed = {key for key, value in header.metadata.items() if value != expected.metadata[key]}
                assert header.metadata.keys() == expected.metadata.keys()
                assert changed <= {"source_mtime_ns", "mask_mtime_ns", "header_sha256"}
                masked, num_variants = masked + ("mask" in tensors), num_variants + ("emb.1" in tensors)
    assert (masked, num_variants) == (1, 2)


ODD = {  # members beside a good sample -> (names of the rows that images give, what the image half says)
    "empty image": ({"a.jpg": b""}, [], "#a.jpg: not an image in one of the formats"),
    "too large": ({"a.ppm": b"P6 20000 20000 255 "}, [], "#a.ppm: has more than 178,956,970 pixels"),
    "folders": ({"x/a.jpg": image(), "y/a.jpg": image()}, ["x/a", "y/a"], None),
    "twice": ([("a.jpg", b"no image"), ("a.jpg", image())], ["a"], None),
    "two images": ({"a.jpg": image(), "a.png": image()}, ["a"], "#a.png: would share its sidecar with "),
    "two cases": ({"a.jpg": image(), "a.JPG": image()}, ["a"], "#a.JPG: would share its sidecar with "),
    "outside": ({"../a.jpg": image()}, [], "#../a.jpg: no sidecar can have this name"),
    "dots": ({"a.b.jpg": image()}, [], "#a.b.jpg: is no image, as the name of a sample ends at its first dot"),
    "not text": ({"caf\udce9.jpg": image()}, ["caf\udce9"], None),
    "control": ({"a\x1b[1m.jpg": b""}, [], r"#a\x1b[1m.jpg: not an image"),
    "long name": (
        {f"{'a' * 246}.jpg": image(), f"{'b' * 247}.jpg": image()},
        ["a" * 246],
        "its sidecar would be too",
    ),
    "16 bit": ({"a.png": encoded(np.full((64, 64), 40000, np.uint16))}, ["a"], None),
}


@pytest.mark.parametrize("case", ODD)
def test_odd_members_give_rows_or_are_named(case, model_t5, tmp_path, capfd):
    members, expected, message = ODD[case]
    members = [*(members.items() if isinstance(members, dict) else members), ("ok.jpg", image()), ("ok.txt", b"x")]
    pack_tar(tmp_path / "0.tar", members)
    assert make("img", model_t5, tmp_path, tmp_path / "set") == (1 if message else 0)
    (shard,) = shards(tmp_path / "set", "img")
    assert Shard(shard).names() == [name.encode("utf-8", "surrogateescape") for name in [*expected, "ok"]]
    assert message is None or message in capfd.readouterr().err


@pytest.mark.parametrize(
    ("member", "row"),
    [
        ({"a.txt": b" \n"}, True),
        ({"a.txt": b"\xef\xbb\xbfA\r\n"}, True),
        ({"a.json": b'{"caption": "x", "exif": {"a": [null]}}'}, True),
        ({"a.json": b'{"caption": null}'}, False),
        ({"a.json": b"[]"}, False),
        ({}, False),
    ],
)
def test_odd_captions_give_rows_or_are_named(member, row, model_t5, tmp_path, capfd):
    pack_tar(tmp_path / "0.tar", [("ok.jpg", image()), ("ok.txt", b"x"), ("a.jpg", image()), *member.items()])
    assert make("txt", model_t5, tmp_path, tmp_path / "set") == (0 if row else 1)
    assert [*map(names, shards(tmp_path / "set", "txt"))] == [["ok", "a"] if row else ["ok"]]
    assert row or "0.tar#a." in capfd.readouterr().err


def test_inputs_are_found_in_subfolders_and_shards_and_compressed_tars_are_none(tars, made, model_t5, tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    for number in range(2):
        shutil.copy(tars / f"0000{number}.tar", tmp_path / "a" / "b"[:number] / f"x-{number}.tar")
    for where in (tmp_path, f"file://{tmp_path}"):  # the set is below, too
        assert make("txt", model_t5, where, tmp_path / "set") == 0
    assert {path.read_bytes() for path in shards(tmp_path / "set", "txt")} == {
        path.read_bytes() for path in shards(made, "txt")
    }
    (tmp_path / "a" / "2.tar.gz").write_bytes(b"\x1f\x8b")
    with pytest.raises(ValueError, match=r"a/2\.tar\.gz: is compressed; unpack it to a/2\.tar"):
        make("txt", model_t5, tmp_path, tmp_path / "set")


# Reruns


@pytest.fixture(scope="module")
def faulty(tmp_path_factory):
    root = tmp_path_factory.mktemp("faulty")
    good = {"ok.jpg": image(), "ok.txt": b"x"}
    bad = {"a.jpg": b"", "b.jpg": b"", "b.txt": b"\xff", "c.jpg": image(), "c.png": b""}
    pack_tar(root / "00000.tar", good)
    pack_tar(root / "00001.tar", good | bad)
    return root


def test_a_rerun_names_the_rows_that_failed_before_without_reading_inputs(
    faulty, model_t5, tmp_path, capfd, monkeypatch
):
    assert make("img", model_t5, faulty, tmp_path) == make("txt", model_t5, faulty, tmp_path) == 1
    capfd.readouterr()
    monkeypatch.setattr("cachetrain.caching.shard_run.Inputs.open", None)
    assert make("img", model_t5, faulty, tmp_path) == make("txt", model_t5, faulty, tmp_path) == 1
    errors = capfd.readouterr().err
    assert (
        f"3 rows failed when the shards were made, the first {faulty}/00001.tar#c: c.png: would share its" in errors
    )
    (clean, shard) = shards(tmp_path, "txt")
    assert failed_rows(Shard(shard).fields) == (4, [
        ["c", "c.png: would share its sidecar with c.jpg; rename one of the two images"],
        ["a", "has no caption"],
        ["b", "b.txt: not UTF-8 text (line 1); save it as UTF-8"],
        ["c", "has no caption"],
    ])  # fmt: skip
    assert failed_rows(Shard(clean).fields) == (0, ())
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, said in (("0", False), ("1", True)):  # each looks at its own
        monkeypatch.setenv("RANK", rank)
        assert make("img", model_t5, faulty, tmp_path) == int(said)
        assert ("3 rows failed when the shards were made" in capfd.readouterr().err) == said
    (path, _) = shards(tmp_path, "img")
    monkeypatch.setenv("RANK", "0")
    whole = path.read_bytes()
    for size, problem in ((len(whole) - 1, "is truncated"), (600, "its index is damaged"), (0, "is not a shard")):
        path.write_bytes(whole[:size])
        assert make("img", model_t5, faulty, tmp_path) == 1
        assert f"{path}: {problem}; delete it, and run again\n" in capfd.readouterr().err


def test_shards_with_failed_rows_have_the_same_bytes_wherever_the_input_is(faulty, model_t5, tmp_path):
    moved = shutil.copytree(faulty, tmp_path / "moved")
    for half in ("img", "txt"):
        workers = ("--num_workers", 2, "--batch_size", 1) if half == "img" else ()
        assert (
            make(half, model_t5, faulty, tmp_path / "a") == make(half, model_t5, moved, tmp_path / "b", *workers) == 1
        )
        a, b = (shards(tmp_path / name, half) for name in "ab")
        assert [path.read_bytes() for path in a] == [path.read_bytes() for path in b]


def test_at_most_a_hundred_failed_rows_are_named_in_a_shard(model_t5, tmp_path):
    bad = {f"{number}.jpg": b"" for number in range(150)}
    pack_tar(tmp_path / "0.tar", bad | {"ok.jpg": image()})
    assert make("img", model_t5, tmp_path, tmp_path / "set") == make("img", model_t5, tmp_path, tmp_path / "set") == 1
    (shard,) = shards(tmp_path / "set", "img")
    assert (failed_rows(Shard(shard).fields).number, len(failed_rows(Shard(shard).fields).first)) == (150, 100)


def test_a_rerun_of_images_loads_no_vae(tars, made, model_t5, monkeypatch):
    monkeypatch.setattr("cachetrain.modeling.load.load_vae", None)
    assert make("img", model_t5, tars, made, "--mask", "files") == 0


@pytest.mark.parametrize("config", [{}, {"scaling_factor": 1}, {"scaling_factor": 0.3611, "shift_factor": 0.1159}])
def test_scaling_is_known_from_the_config_of_a_vae_alone(config):
    from diffusers import AutoencoderKL

    vae = AutoencoderKL(block_out_channels=(32,), **config)
    from_file = normalisation.of_config({"_class_name": "AutoencoderKL", **config}, "x")
    assert (
        from_file == normalisation.of_vae(vae)
        and from_file.header_fields() == normalisation.of_vae(vae).header_fields()
    )
    assert normalisation.of_config({"_class_name": "AutoencoderKLFlux2"}, "x") is None


# Reading in advance


def test_the_next_input_is_read_while_one_is_encoded_and_never_more(tars, model_t5, tmp_path, monkeypatch):
    for number in range(5):
        shutil.copy(tars / "00000.tar", tmp_path / f"{number}.tar")
    events, original, shard = [], shard_run.Inputs.open, shard_run.ShardRun._shard

    def slowly(self, one):
        events.append(("read", one.number, threading.current_thread() is threading.main_thread()))
        time.sleep(0.1)
        return original(self, one)

    def observed(self, samples, encode):
        data = shard(self, samples, encode)
        time.sleep(0.15)
        events.append(("made", int(samples.where[-5]), True))
        return data

    monkeypatch.setattr(shard_run.Inputs, "open", slowly)
    monkeypatch.setattr(shard_run.ShardRun, "_shard", observed)
    monkeypatch.setattr(shard_run, "_WORTH_AHEAD", 0.001)
    assert make("txt", model_t5, tmp_path, tmp_path / "set") == 0
    order = [f"{what}{number}" for what, number, _ in events]
    assert order == ["read0", "made0", "read1", "read2", "made1", "read3", "made2", "read4", "made3", "made4"]
    assert [number for what, number, in_main in events if what == "read" and in_main] == [0, 1]
    monkeypatch.setattr(shard_run, "_WORTH_AHEAD", 1e9)
    events.clear()
    assert make("txt", model_t5, tmp_path, tmp_path / "other") == 0
    assert all(in_main for _, _, in_main in events)
