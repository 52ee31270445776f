"""--wandb with the real package, offline: its files hold what TensorBoard's own reader finds in the event files."""

import json
import os
import re
import struct
import sys
import time
from collections import defaultdict
from importlib.machinery import ModuleSpec
from types import SimpleNamespace

import numpy as np
import pytest
import wandb
from helpers import HANG_S, read_events, run_script, train
from wandb.proto.wandb_internal_pb2 import Record

from cachetrain.training import options
from cachetrain.training.logs import wandb_mirror


@pytest.fixture(autouse=True)
def stranger(tmp_path, monkeypatch):
    """Nobody has logged in to wandb here, and no server is there."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    # What wandb waits for is on this machine.
    for name in ("INIT_TIMEOUT", "FINISH_TIMEOUT", "X_SERVICE_WAIT"):
        monkeypatch.setenv(f"WANDB_{name}", str(HANG_S))
    wandb.teardown()  # it reads the environment once
    yield
    wandb.teardown()


def records(out):
    """[(folder, kind, record)] of all that wandb has written, in order.

    A .wandb file is a LevelDB log after 7 bytes: blocks of 32 KiB with chunks of (checksum, size, kind) and data.
    """
    wandb.teardown()  # all is on disk then
    found = []
    for path in sorted(out.glob("wandb/offline-run-*/*.wandb")):
        data, at, whole = path.read_bytes(), 7, b""
        while at < len(data):
            if (left := -at % 2**15) < 7:
                at += left
            _, size, kind = struct.unpack_from("<IHB", data, at)
            whole += data[at + 7 : at + 7 + size]
            at += 7 + size
            if kind in (1, 4):  # all of a record, or its end
                record, whole = Record.FromString(whole), b""
                name = record.WhichOneof("record_type")
                found.append((path.parent / "files", name, getattr(record, name)))
    return found


def mirrored(out):
    """{(tag, step): value} of wandb: a number, a list of a histogram's counts and edges, or a picture's bytes."""
    found = {}
    for files, kind, record in records(out):
        if kind != "history":
            continue
        row = defaultdict(dict)
        for item in record.item:
            tag, *field = item.nested_key or [item.key]
            row[tag][field[0] if field else ""] = json.loads(item.value_json)
        step = row.pop("global_step")[""]
        for tag, fields in row.items():
            if not tag.startswith("_"):  # its own clock and number of rows
                assert (tag, step) not in found
                found[tag, step] = value_of(files, fields)
    return found


def value_of(files, fields):
    if fields.get("_type") == "images/separated":
        [name] = fields["filenames"]
        return (files / name).read_bytes()
    return fields["values"] + fields["bins"] if fields.get("_type") == "histogram" else fields[""]


def logged(log_dir):
    """The same of the event files, by TensorBoard's reader."""
    reader = read_events(log_dir)
    found = {(tag, e.step): e.value for tag in reader.Tags()["scalars"] for e in reader.Scalars(tag)}
    found |= {(tag, e.step): e.encoded_image_string for tag in reader.Tags()["images"] for e in reader.Images(tag)}
    for tag in reader.Tags()["histograms"]:
        for e in reader.Histograms(tag):
            counts, edges = [*e.histogram_value.bucket], [e.histogram_value.min, *e.histogram_value.bucket_limit]
            empty = counts[0] == 0  # wandb leaves out a first bin without any
            found[tag, e.step] = counts[empty:] + edges[empty:]
    return found


def test_a_resumed_run_mirrors_all_numbers_histograms_and_pictures_of_tensorboard(
    shapes, model_t5, tmp_path, monkeypatch
):
    monkeypatch.setenv("WANDB_MODE", "offline")
    flags = ["--wandb", "--batch_size", 6, "--diagnostic_steps", 2, "--sample_steps", 1, "--sampler_steps", 1]
    flags += ["--sample_prompt", "a star", "--sample_cfgs", 1, 4, "--log_groups", *range(1, 10), *range(11, 16)]
    out = tmp_path / "run"
    train(shapes, model_t5, out, "--max_steps", 2, *flags)
    [events] = (tmp_path / "tb" / "run").glob("*tfevents*")  # as if it had been opened just now
    events.rename(events.with_name(re.sub(r"\d{10}", str(int(time.time()) + 2), events.name, count=1)))
    train(shapes, model_t5, out, "--max_steps", 4, *flags, "--resume", "latest")
    expected, found = logged(tmp_path / "tb" / "run"), mirrored(out)
    assert found.keys() == expected.keys()
    assert {tag[:2] for tag, _ in found} == {f"{group:02d}" for group in (*range(1, 8), 9, 11, 12, 13, 14)}
    for key, value in expected.items():
        if isinstance(value, bytes):
            assert found[key] == value, key
        else:
            np.testing.assert_allclose(found[key], value, rtol=1e-5, err_msg=str(key))
    assert any(value[:3] == b"GIF" for value in found.values() if isinstance(value, bytes))
    train(shapes, model_t5, out, "--max_steps", 5, *flags[1:], "--resume", "latest")  # and without it
    runs = [record for _, kind, record in records(out) if kind == "run"]
    identity = ("cachetrain", "run", (out / wandb_mirror.ID).read_text())
    assert [(record.project, record.display_name, record.run_id) for record in runs] == [identity] * 2
    config = [{item.key: json.loads(item.value_json) for item in record.config.update} for record in runs]
    settings = [(of["batch_size"], of["max_steps"], of["resume"]) for of in config]
    assert settings == [(6, "2", None), (6, "4", "latest")]
    roots = [record.root_dir for _, kind, record in records(out) if kind == "tbrecord"]
    assert roots == [str(tmp_path / "tb" / "run")] * 2  # or wandb would look for it, for 10 s


def test_a_run_resumed_in_the_second_of_its_last_event_file_waits_for_a_later_one(tmp_path, monkeypatch):
    log_dir, started_s = tmp_path / "tb/run", []

    class Clock:
        now_s = 1000.25

        def time(self):
            return self.now_s

        def sleep(self, seconds):
            self.now_s += seconds

    def init(**_):
        started_s.append(int(clock.now_s))
        return SimpleNamespace(define_metric=lambda *_, **__: None)

    clock = Clock()
    monkeypatch.setattr(wandb_mirror, "time", clock)
    monkeypatch.setattr(wandb, "init", init)
    log_dir.mkdir(parents=True)
    (tmp_path / "run").mkdir()
    for opened_s, expected in ((900, 1000), (1000, 1001), (1010, 1001), (1003, 1004)):
        (log_dir / f"events.out.tfevents.{opened_s:010d}.host.1.0").touch()
        assert wandb_mirror.start(arguments(tmp_path / "run"))
        assert started_s[-1] == expected


def arguments(out):
    return SimpleNamespace(output_dir=str(out), logdir=str(out.parent / "tb"))


def start_and_finish(out):
    """Returns {kind: record} of what wandb has kept of it."""
    out.mkdir()
    wandb_mirror.finish(wandb_mirror.start(arguments(out)))
    return {kind: record for _, kind, record in records(out)}


def test_without_a_login_the_mirror_stays_here_and_nobody_is_asked(tmp_path, monkeypatch, capsys):
    terminal, keyboard = (os.fdopen(descriptor, mode) for descriptor, mode in zip(os.openpty(), "wr", strict=True))
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stdin", keyboard)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert start_and_finish(tmp_path / "run")["run"].project == "cachetrain"
    assert "warning: --wandb: UsageError: No API key configured" in capsys.readouterr().err
    assert sys.stdin is keyboard
    terminal.close()


@pytest.mark.slow
def test_without_a_server_the_mirror_stays_here(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_API_KEY", 40 * "a")
    for name in ("INIT_TIMEOUT", "FINISH_TIMEOUT"):
        monkeypatch.delenv(f"WANDB_{name}")
    init, started = wandb.init, []

    def noted(mode, settings, **options):
        started.append((mode, settings.init_timeout, settings.finish_timeout))
        settings.init_timeout = HANG_S if mode else 1  # wandb keeps to it, which is not tested here
        return init(mode=mode, settings=settings, **options)

    monkeypatch.setattr(wandb, "init", noted)
    assert start_and_finish(tmp_path / "run")["run"].project == "cachetrain"
    assert "logging offline instead; upload the log with `wandb sync`" in capsys.readouterr().err
    assert started == [(None, 30, 120), ("offline", 30, 120)]


def test_the_environment_wins_and_an_error_marks_the_run_as_failed(tmp_path, monkeypatch):
    for name, value in {"MODE": "offline", "PROJECT": "mine", "NAME": "ours", "RUN_ID": "abc"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    healthy = start_and_finish(tmp_path / "healthy")
    assert (healthy["run"].project, healthy["run"].display_name, healthy["run"].run_id) == ("mine", "ours", "abc")
    try:
        raise ValueError
    except ValueError:
        failed = start_and_finish(tmp_path / "failed")
    assert (healthy["exit"].exit_code, failed["exit"].exit_code) == (0, 1)


def test_what_wandb_cannot_do_ends_no_run(tmp_path, monkeypatch, capsys):
    def broken(*_, **__):
        raise AttributeError

    monkeypatch.setattr(wandb, "init", broken)
    (tmp_path / "run").mkdir()
    assert wandb_mirror.start(arguments(tmp_path / "run")) is None
    wandb_mirror.finish(SimpleNamespace(finish=broken))
    assert capsys.readouterr().err.count("warning: --wandb: AttributeError") == 3


@pytest.mark.parametrize("spec", [None, ModuleSpec("wandb", None, is_package=True)])  # a folder has a spec too
def test_without_the_package_the_flag_is_refused(spec, monkeypatch, capsys):
    monkeypatch.setattr(options, "find_spec", lambda name: spec)
    with pytest.raises(SystemExit):
        run_script("train_from_cached.py", "--train_data_dir", "x", "--model", "x", "--output_dir", "x", "--wandb")
    assert "error: --wandb needs Weights & Biases: pip install wandb" in capsys.readouterr().err
