"""The cache scripts under real faults: killed, stopped, out of space, several at once, launched as ranks.

Whatever happens, what stands under a final name is whole and right, and running the same command again makes what is
missing: bit-for-bit equal to what an undisturbed run makes. The clock does not decide where a signal falls: the
script stops before a given operation and gets the signal there.
"""

import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import zlib
from collections import Counter
from io import BytesIO
from itertools import count
from pathlib import Path

import pytest
import torch
from cache_fixtures import make_pipeline, picture, save_pictures, sidecars, waiting_at
from cache_forks import Forks, FullDisk, watched_disk
from helpers import HANG_S, REPO, run_script, wait_until
from PIL import Image
from safetensors.torch import load_file
from torch.distributed import PrefixStore, TCPStore
from tqdm import tqdm

from cachetrain import cli
from cachetrain.caching.summary import RunSummary
from cachetrain.caching.writer import Row, Writer
from cachetrain.data import many_files
from cachetrain.data.sidecar import read_sidecar, write_sidecar

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="looks into /proc")

NUM_PAIRS = 24
IMAGES, CAPTIONS = ("create_img_sdxl", ".img_sdxl"), ("create_t5cache_768", ".txt_t5cache")
EXACT = ("--batch_size", 1)  # batches of several round differently


@pytest.fixture(scope="module")
def forks(tmp_path_factory):
    forks = Forks(tmp_path_factory.mktemp("logs"))
    yield forks
    forks.close()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_pipeline(tmp_path_factory.mktemp("models") / "t5", "t5")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A folder of captioned pictures. Copy it before caching anything."""
    folder = tmp_path_factory.mktemp("source") / "data"
    names = [f"{'sub/' if index % 4 == 3 else ''}{index:02}" for index in range(NUM_PAIRS)]
    save_pictures(folder, [f"{name}.png" for name in names], size=(64, 64))
    for index, name in enumerate(names):
        (folder / f"{name}.txt").write_text(f"number {index}" + " red" * (index * 7 % 20))
    return folder


class Job:
    """One cache script on copies of `source`; knows what its sidecars must be."""

    def __init__(self, forks, model, source, kind, tmp_path):
        self.forks, self.model, self.source, (self.script, self.suffix) = forks, model, source, kind
        self.undisturbed = root = self.copy(tmp_path / "undisturbed")
        run = self.start(root, *EXACT)
        assert run.wait() == 0, run.output
        self.expected = {self.name(root, path): content(path) for path in self.sidecars(root)}
        assert len(self.expected) == NUM_PAIRS + (kind is CAPTIONS)

    def copy(self, root):
        return shutil.copytree(self.source, root)  # with the files' times, which headers hold

    def start(self, root, *argv, **options):
        size = ("--resolution", 64) if self.script == IMAGES[0] else ()
        workers = ("--num_workers", 0) if size and "--num_workers" not in argv else ()
        return self.forks.start(
            self.script, "--data_root", root, "--model", self.model, *size, *workers, *argv, **options
        )

    def sidecars(self, root):
        return list(root.rglob(f"*{self.suffix}"))

    def name(self, root, path):
        return path.relative_to(root).as_posix()

    def check(self, root, exact=True):
        """Checks all that stands under a final name; returns how many."""
        standing = self.sidecars(root)
        for path in standing:
            tensors, fields = content(path)
            expected_tensors, expected_fields = self.expected[self.name(root, path)]
            assert fields == (expected_fields if exact else expected_fields | {"sha256": fields["sha256"]})
            tolerance = 0 if exact else 1e-2
            for key, expected in expected_tensors.items():
                torch.testing.assert_close(tensors[key], expected, rtol=tolerance, atol=tolerance)
        return len(standing)

    def finish(self, root, *argv, exact=True):
        """Runs the job to its end: it makes exactly what is missing, and nothing else is left behind."""
        missing = len(self.expected) - len(self.sidecars(root))
        run = self.start(root, *(argv or EXACT))
        assert run.wait() == 0, run.output
        assert f": {missing} encoded, {len(self.expected) - missing} fresh" in run.output
        assert self.check(root, exact) == len(self.expected)
        assert leftovers(root) == []


@pytest.fixture(scope="module")
def jobs(forks, model, source, tmp_path_factory):
    return {kind: Job(forks, model, source, kind, tmp_path_factory.mktemp(kind[0])) for kind in (IMAGES, CAPTIONS)}


@pytest.fixture(params=[IMAGES, CAPTIONS], ids=["images", "captions"])
def job(request, jobs):
    return jobs[request.param]


def content(path):
    """What a sidecar holds: (tensors, header fields). Their order in the file, and so their hash, may differ."""
    tensors, header = read_sidecar(path)
    return tensors, {key: value for key, value in header.metadata.items() if key != "header_sha256"}


@pytest.fixture
def three(tmp_path):
    """Three captioned pictures whose sidecars are all bigger than MAX_BYTES (images: at 256 x 256)."""
    save_pictures(tmp_path / "three", ["a.png", "b.png", "c.png"], size=(64, 64))
    for name in "abc":
        (tmp_path / "three" / f"{name}.txt").write_text(f"{name} red" * 60)
    return tmp_path / "three"


def leftovers(root):
    return sorted(path.name for path in root.rglob("*") if ".cachetrain" in path.name or path.suffix == ".tmp")


# Killed


def crash_in_write(path, tensors, after):
    """Writes a sidecar in a forked process that is killed before file-system operation number `after`.

    Returns:
        whether it lived.
    """
    pid = os.fork()
    if pid == 0:
        operations = iter(range(after))

        def before(*_):
            if next(operations, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)

        with watched_disk(before):
            write_sidecar(path, tensors, {"kind": "img_sdxl"})
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_crash_after_any_operation_of_a_write_leaves_the_old_sidecar_or_the_new(tmp_path):
    path = tmp_path / "a.img_sdxl"
    versions = [{"latent": torch.full((4, 8, 8), float(value))} for value in range(20)]
    number = 0
    for standing in (False, True):  # the first of its name; one in place of another
        for after in range(20):
            if not standing:
                path.unlink(missing_ok=True)
            before = path.read_bytes() if path.exists() else None
            lived = crash_in_write(path, versions[number := number + 1], after)
            if lived:
                assert torch.equal(read_sidecar(path)[0]["latent"], versions[number]["latent"])
                break
            assert (path.read_bytes() if path.exists() else None) == before
        assert after >= 4  # opened, written in two halves, renamed


def test_kill_in_any_operation_leaves_whole_sidecars_and_a_job_that_can_be_finished(job, tmp_path):
    check_kills(job, tmp_path, kills=16, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 5))
def test_kill_in_hundreds_of_operations(job, tmp_path, seed):
    check_kills(job, tmp_path, kills=75, seed=seed)


OPERATIONS = ("open", "write", "replace")  # of a sidecar; "write" is there twice


def draw_operation(rng, num_missing):
    """Returns (operation, number): one that a run comes to that has `num_missing` sidecars to make."""
    operation = rng.choice(OPERATIONS)
    return operation, rng.randint(1, num_missing * (2 if operation == "write" else 1))


def check_kills(job, tmp_path, kills, seed):
    """Kills runs in operations that `seed` chooses, several on the same folder, and has another finish the job."""
    rng = random.Random(seed)
    killed = Counter()
    for number in count():
        exact = rng.random() < 0.7
        root = job.copy(tmp_path / str(number))
        argv = list(EXACT if exact else ("--batch_size", 4))
        if job.script == IMAGES[0]:
            argv += ["--num_workers", rng.choice([0, 2])]
        for _ in range(3):
            standing = len(job.sidecars(root))
            operation, occurrence = draw_operation(rng, len(job.expected) - standing)
            run = job.start(root, *argv, pauses=[(operation, occurrence)])
            run.until_paused()
            run.signal(signal.SIGKILL, group=True)
            assert run.wait() == -signal.SIGKILL, run.output
            killed[operation] += 1
            if operation == "replace":
                assert len(job.sidecars(root)) == standing + occurrence - 1
            if operation != "open":
                assert leftovers(root)  # it was killed while it was writing
            job.check(root, exact)
        job.finish(root, *argv, exact=exact)
        shutil.rmtree(root)
        if killed.total() >= kills:
            break
    assert min(killed[operation] for operation in OPERATIONS) >= 2


def test_workers_end_when_the_main_process_is_killed(jobs, tmp_path):
    root = jobs[IMAGES].copy(tmp_path / "data")
    run = jobs[IMAGES].start(root, *EXACT, "--num_workers", 2, pauses=[("replace", 3)])
    run.until_paused()
    assert len(processes(run.pid)) == 3
    run.signal(signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL
    wait_until(lambda: not processes(run.pid))
    jobs[IMAGES].finish(root)


def processes(group):
    """Ids of the living processes of a group."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, its_group = status.read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue
        if int(its_group) == group and state != "Z":
            found.append(int(status.parent.name))
    return found


# Stopped

STOPS = [(number, group) for number in (signal.SIGTERM, signal.SIGINT) for group in (False, True)]


def check_stopped(job, root, run, number, before):
    """Checks the farewell of a run that had found `before` sidecars and was stopped by signal `number`."""
    assert run.wait() == 128 + number, run.output
    assert "Traceback" not in run.output and "ignored" not in run.output
    assert leftovers(root) == [] and processes(run.pid) == []
    last = run.output.splitlines()[-1]
    assert last == f"cache/{job.script}.py: {'terminated' if number == signal.SIGTERM else 'interrupted'}"
    made = job.check(root) - before
    if made:  # one file may be between written and counted
        accounts = [f"{job.suffix[1:]}: {count} encoded, {before} fresh" for count in (made, made - 1)]
        assert run.output.startswith(tuple(f"stopped; run again to continue. {account}" for account in accounts))


@pytest.mark.parametrize(("number", "group"), STOPS)
def test_signal_while_encoding_ends_with_an_account_and_no_leftovers(job, tmp_path, number, group):
    root = job.copy(tmp_path / "data")
    for name in list(job.expected)[:5]:
        shutil.copy(job.undisturbed / name, root / name)
    workers = ("--num_workers", 2) if job.script == IMAGES[0] else ()
    run = job.start(root, *EXACT, *workers, pauses=[("replace", 4)])
    run.until_paused()
    assert len(job.sidecars(root)) == 8
    run.signal(number, group)
    run.resume()
    check_stopped(job, root, run, number, before=5)
    assert 8 <= len(job.sidecars(root)) < len(job.expected)
    if group:
        job.finish(root)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_while_the_last_files_are_written_waits_for_them(job, three, number):
    num_sidecars = 3 + (job.script == CAPTIONS[0])  # the null caption's
    run = job.start(three, *EXACT, pauses=[("write", 1), ("collect", 1)])
    run.until_paused()  # the main thread waits for the disk
    run.until(lambda: len(leftovers(three)) == num_sidecars)  # all are opened, none is written
    run.signal(number)
    run.until(lambda: not run.hears(number))  # it has come: a second one would end the run at once
    assert run.poll() is None and job.sidecars(three) == []
    run.resume()
    assert run.wait() == 128 + number
    assert len(payloads(three, job.suffix)) == num_sidecars and leftovers(three) == []
    assert f"stopped; run again to continue. {job.suffix[1:]}: {num_sidecars} encoded, 0 fresh" in run.output


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT])
def test_second_signal_does_not_wait_for_the_disk(job, three, first):
    run = job.start(three, *EXACT, pauses=[("open", 1)])
    run.until_paused()
    run.signal(first)
    run.until(lambda: not run.hears(signal.SIGTERM))
    assert run.poll() is None
    run.signal(signal.SIGTERM)
    assert run.wait() == -signal.SIGTERM  # the disk still hangs
    assert job.sidecars(three) == []


@pytest.mark.parametrize("operation", ["resolve", "load"])
def test_signal_before_encoding_ends_at_once(job, tmp_path, operation):
    root = job.copy(tmp_path / "data")
    for number, group in STOPS:
        run = job.start(root, *EXACT, pauses=[(operation, 1)])
        run.until_paused()
        run.signal(number, group)
        check_stopped(job, root, run, number, before=0)
    assert job.sidecars(root) == []


# Python imports a module of this name at its start; torch imports torch.nn when its libraries are loaded.
STOP_IN_IMPORT = """
import os, sys, time

class Stop:
    def find_spec(name, *_):
        if name == "torch.nn":
            os.close(os.open({marker!r}, os.O_WRONLY | os.O_CREAT))
            while True:
                time.sleep(0.01)

sys.meta_path.insert(0, Stop)
"""


def test_signal_while_torch_is_imported_ends_at_once(model, source, tmp_path):
    root, script, marker = shutil.copytree(source, tmp_path / "data"), IMAGES[0], tmp_path / "paused"
    (tmp_path / "startup").mkdir()
    (tmp_path / "startup/sitecustomize.py").write_text(STOP_IN_IMPORT.format(marker=str(marker)))
    path = [str(tmp_path / "startup"), *filter(None, [os.environ.get("PYTHONPATH")])]
    run = subprocess.Popen(
        [sys.executable, REPO / f"cache/{script}.py", "--data_root", root, "--model", model, "--num_workers", "0"],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(path)},
    )
    wait_until(lambda: marker.exists() or run.poll() is not None)
    assert "libtorch_cpu" in Path(f"/proc/{run.pid}/maps").read_text()
    run.terminate()
    errors = run.communicate(timeout=HANG_S)[1]
    assert run.returncode == 143, errors
    assert "Traceback" not in errors and errors.endswith(f"{script}.py: terminated\n")
    assert not sidecars(root, IMAGES[1]) and leftovers(root) == []


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_signals_at_a_hundred_points(job, tmp_path, seed):
    rng = random.Random(seed)
    for round_ in range(34):
        root = job.copy(tmp_path / str(round_))
        workers = rng.choice([0, 2])
        argv = [*EXACT, *(("--num_workers", workers) if job.script == IMAGES[0] else ())]
        loading = rng.random() < 0.3
        point = (rng.choice(["resolve", "load"]), 1) if loading else draw_operation(rng, len(job.expected))
        run = job.start(root, *argv, pauses=[point])
        run.until_paused()
        number, group = rng.choice(STOPS)
        # Workers that are just starting do not ignore SIGTERM yet; the main process then says so.
        run.signal(number, group and not (workers and number == signal.SIGTERM and not job.sidecars(root)))
        if not loading:
            run.resume()
        check_stopped(job, root, run, number, before=0)
        job.finish(root)


def test_interrupted_check_does_not_wait_for_what_is_queued(monkeypatch):
    ahead, threads, stopped = 2 * many_files._CHUNK, many_files._THREADS, threading.Event()
    checked = []

    class Stop(threading.Event):
        def set(self):
            super().set()
            stopped.set()

    def check(item):
        checked.append(item)
        if item >= ahead:
            assert stopped.wait(HANG_S)

    monkeypatch.setattr(many_files, "Event", Stop)
    monkeypatch.setattr(time, "thread_time", lambda: 0.0)  # each check waits, for a slow disk
    results = many_files.in_threads(check, range(10**6))
    for _ in range(many_files._CHUNK + 1):  # the first that comes from a thread
        next(results)
    wait_until(lambda: len(checked) == ahead + threads)  # each thread is in a check
    results.close()
    assert len(checked) == ahead + threads


# Out of space


def run_in_process(kind, root, model, *argv):
    """Runs a cache script here, through what its command line goes through; returns its exit code."""
    size = ("--resolution", 64, "--num_workers", 0) if kind is IMAGES else ()
    arguments = ["--data_root", root, "--model", model, *size, *EXACT, *argv]
    with pytest.raises(SystemExit) as end:
        cli.run(lambda: run_script(f"cache/{kind[0]}.py", *arguments))
    return end.value.code


@pytest.fixture
def handlers():
    """Puts back the signal handlers that `cli.run` replaces."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("kind", [IMAGES, CAPTIONS], ids=["images", "captions"])
def test_full_disk_at_any_operation_damages_nothing_and_the_next_run_finishes(
    kind, model, tmp_path, capsys, handlers
):
    suffix = kind[1]
    save_pictures(tmp_path / "data", ["a.png", "b.png", "c.png"], size=(40, 40))  # enlarged: they are listed, too
    for name in "abc":
        (tmp_path / "data" / f"{name}.txt").write_text(f"first {name}")
    assert run_in_process(kind, tmp_path / "data", model) == 0
    # Now a is fresh, b stale and c missing.
    old = payloads(tmp_path / "data", suffix)
    Image.fromarray(picture(40, 40, seed=7)).save(tmp_path / "data" / "b.png")
    (tmp_path / "data" / "b.txt").write_text("second b")
    (tmp_path / "data" / f"c{suffix}").unlink()
    shutil.copytree(tmp_path / "data", tmp_path / "good")
    assert run_in_process(kind, tmp_path / "good", model) == 0
    new = payloads(tmp_path / "good", suffix)
    for after in range(100):
        root = shutil.copytree(tmp_path / "data", tmp_path / str(after))
        disk = FullDisk(after)
        capsys.readouterr()
        with watched_disk(disk):
            code = run_in_process(kind, root, model)
        errors = capsys.readouterr().err
        standing = payloads(root, suffix)
        assert all(payload in (old[name], new[name]) for name, payload in standing.items())
        assert standing.keys() >= new.keys() - {f"c{suffix}"} and leftovers(root) == []
        if not disk.hit:
            break
        assert f"No space left on device: '{tmp_path}/{after}/" in errors
        made = (standing[f"b{suffix}"] == new[f"b{suffix}"]) + (f"c{suffix}" in standing)
        if code == 0:
            assert standing == new and "warning: upscaled images are not listed" in errors
        else:
            assert code == 2 and f": {made} encoded (1 stale), " in errors
            assert errors.splitlines()[-1].endswith(tuple(f"'{path}'" for path in targets(root, suffix)))
        assert run_in_process(kind, root, model) == 0
        assert payloads(root, suffix) == new and leftovers(root) == []
    assert code == 0 and standing == new and after >= 8  # two files of four operations each


def payloads(root, suffix):
    """Name -> what tells one verified sidecar from another."""
    return {path.name: read_sidecar(path)[1].metadata["sha256"] for path in root.glob(f"*{suffix}")}


def targets(root, suffix):
    return [root / f"{name}{suffix}" for name in ("a", "b", "c", "_null_caption")]


MAX_BYTES = 4000


def test_file_size_limit_damages_nothing_and_names_every_file(job, three):
    argv = [*EXACT, *(("--resolution", 256) if job.script == IMAGES[0] else ())]
    assert job.start(three, *argv).wait() == 0
    (three / f"b{job.suffix}").unlink()
    good = payloads(three, job.suffix)
    limited = job.start(three, *argv, "--overwrite", max_bytes=MAX_BYTES)
    assert limited.wait() == 1
    assert payloads(three, job.suffix) == good and leftovers(three) == []
    for name in "abc":
        target = three / f"{name}{job.suffix}"
        assert f"its sidecar cannot be written: [Errno 27] File too large: '{target}'" in limited.output
    assert "3 failed" in limited.output and "Traceback" not in limited.output
    finished = job.start(three, *argv)
    assert finished.wait() == 0 and ": 1 encoded, " in finished.output
    assert len(payloads(three, job.suffix)) == len(good) + 1


@pytest.fixture
def tmpfs(tmp_path):
    """A file system of 4 MiB."""
    folder = tmp_path / "tmpfs"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("mounting a tmpfs is not permitted here")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def test_full_file_system_keeps_what_fits_and_the_next_run_finishes(job, tmpfs):
    root = job.copy(tmpfs / "data")
    for name in list(job.expected)[:5]:
        shutil.copy(job.undisturbed / name, root / name)
    filler = tmpfs / "filler"
    with open(filler, "wb", buffering=0) as file, pytest.raises(OSError, match="No space"):
        while True:
            file.write(bytes(4096))
    os.truncate(filler, filler.stat().st_size - 6 * 4096)
    run = job.start(root, *EXACT)
    assert run.wait() == 2
    made = job.check(root) - 5
    assert 0 < made < NUM_PAIRS - 5 and leftovers(root) == []
    *_, account, last = run.output.splitlines()
    assert f"stopped; run again to continue. {job.suffix[1:]}: {made} encoded, 5 fresh" in account
    assert last.startswith(f"cache/{job.script}.py: [Errno 28] No space left on device: '{root}")
    filler.unlink()
    job.finish(root)


# Several at once


def check_runs_at_once(jobs, root, crowd, rng):
    """Runs a crowd on one folder, kills one of them, and checks what the others and the next runs do.

    Each has stopped at an operation on a sidecar when the next one starts, and when one is killed.
    """
    runs = []
    for kind in crowd:  # those that come later find the earlier ones writing
        runs.append(jobs[kind].start(root, *EXACT, pauses=[draw_operation(rng, 5)]))
        runs[-1].until_paused()
    victim = rng.choice(runs)
    victim.signal(signal.SIGKILL, group=True)
    for run in runs:
        if run is not victim:
            run.resume()
    for run in runs:
        assert run.wait() == (-signal.SIGKILL if run is victim else 0), run.output
        assert "failed" not in run.output
    for job in jobs.values():
        job.check(root)
        job.finish(root)


CROWDS = [(IMAGES, IMAGES), (CAPTIONS, CAPTIONS), (IMAGES, IMAGES, CAPTIONS), (IMAGES, CAPTIONS, CAPTIONS)]


@pytest.mark.parametrize("crowd", CROWDS, ids=lambda crowd: "+".join(kind[1][1:4] for kind in crowd))
def test_runs_at_once_on_one_folder_are_safe_when_one_is_killed(jobs, tmp_path, crowd):
    root = jobs[IMAGES].copy(tmp_path / "data")
    check_runs_at_once(jobs, root, crowd, random.Random(str(crowd)))


@pytest.mark.slow
def test_runs_at_once_many_times(jobs, tmp_path):
    rng = random.Random(0)
    for round_ in range(40):
        root = jobs[IMAGES].copy(tmp_path / str(round_))
        check_runs_at_once(jobs, root, rng.choice(CROWDS), rng)
        shutil.rmtree(root)


# Ranks


@pytest.fixture
def port():
    """A port that no other process is given while the test runs. It is bound here; a rank can still listen on it."""
    with socket.socket() as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]


def start_ranks(job, root, size, port, *argv, pauses=None):
    """Starts one cache script as `size` ranks. pauses: {rank: where it stops, as in Forks.start}."""
    env, pauses = {"WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}, pauses or {}
    return [job.start(root, *EXACT, *argv, RANK=rank, pauses=pauses.get(rank, ()), **env) for rank in range(size)]


def until_handed_in(ranks, port, *of):
    """Waits until these ranks have handed in their account: they are at the meeting, where rank 0 serves a store."""
    ranks[0].until(lambda: listening(port))
    store = PrefixStore("cachetrain", TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False))
    ranks[0].until(lambda: store.check([f"record/{rank}" for rank in of]))
    assert [ranks[rank].poll() for rank in of] == [None] * len(of)


def listening(port):
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def share(rank, size, paths):
    return [path for path in paths if zlib.crc32(os.fsencode(path)) % size == rank]


def folder_for_all(tmp_path, names, size):
    """A folder in which each of `size` ranks has two or more of the images `names`: it depends on the whole path."""
    folders = [tmp_path / f"data{number}" for number in range(1000)]
    return next(f for f in folders if all(len(share(r, size, [f / name for name in names])) > 1 for r in range(size)))


@pytest.fixture
def mixed(source, tmp_path):
    """A function: name -> a folder with two sizes of images, among them undersized ones and one that is none."""

    def make(name):
        root = tmp_path / name
        save_pictures(root, [f"{index}.png" for index in range(6)], size=(192, 192))
        save_pictures(root, [f"wide{index}.png" for index in range(3)], size=(300, 150))
        save_pictures(root, [f"small{index}.png" for index in range(3)], size=(100, 100))
        (root / "bad.jpg").write_text("no image")
        return root

    return make


BUCKETS = ("--resolution", 192, "--bucket")


def check_merged(output, alone_output, root, alone_root):
    """Checks the account of all ranks, and what they wrote, against those of a single process on a copy."""
    table = alone_output[alone_output.index("     bucket ") : alone_output.index("img_sdxl: ")]
    assert table in output and "all         12   100.0%" in table
    assert output.count(": 12 encoded, 0 fresh, 3 images upscaled, 1 failed in") == 1
    assert output.count("encoded") == 1 and "1 failed:" in output and f"{root / 'bad.jpg'}: not an image" in output
    lists = [(folder / "_upscaled.img_sdxl.txt").read_text().splitlines() for folder in (root, alone_root)]
    assert sorted(lists[0]) == sorted(line.replace(str(alone_root), str(root)) for line in lists[1])
    assert len(lists[0]) == 3 and leftovers(root) == []
    assert payloads(root, ".img_sdxl") == payloads(alone_root, ".img_sdxl")


def test_ranks_share_the_files_and_give_one_account(jobs, mixed, port):
    job, root, alone = jobs[IMAGES], mixed("ranks"), mixed("alone")
    single = job.start(alone, *EXACT, *BUCKETS)
    ranks = start_ranks(job, root, 3, port, *BUCKETS)
    assert [rank.wait() for rank in (single, *ranks)] == [1, 1, 1, 1]
    check_merged(ranks[0].output, single.output, root, alone)
    assert all("encoded" not in rank.output and "Traceback" not in rank.output for rank in ranks[1:])


def test_ranks_leave_when_rank_0_has_given_the_account(jobs, tmp_path, port):
    names = [f"{'x' * length}.png" for length in range(1, 9)]
    root = folder_for_all(tmp_path, names, size=2)
    save_pictures(root, names, size=(32, 32))
    num_sidecars = len(share(0, 2, [root / name for name in names]))
    ranks = start_ranks(jobs[IMAGES], root, 2, port, pauses={0: [("replace", num_sidecars + 1)]})
    ranks[0].until_paused()  # it is writing the list
    until_handed_in(ranks, port, 1)
    assert not (root / "_upscaled.img_sdxl.txt").exists()
    ranks[0].resume()
    ranks[1].wait()
    assert "8 encoded" in ranks[0].output and (root / "_upscaled.img_sdxl.txt").exists()
    assert [rank.wait() for rank in ranks] == [0, 0]


def test_list_of_upscaled_images_of_a_rank_that_waits_for_hours_survives_a_run_beside_it(jobs, tmp_path, port):
    names = [f"{'x' * length}.png" for length in range(1, 9)]
    root = folder_for_all(tmp_path, names, size=2)
    save_pictures(root, names, size=(32, 32))
    ranks = start_ranks(jobs[IMAGES], root, 2, port, pauses={0: [("replace", 1)]})
    ranks[0].until_paused()
    [part] = wait_until(lambda: list(root.glob(".cachetrain*.txt.tmp")))
    os.utime(part, (0, 0))  # hours pass
    ranks[1].until(lambda: part.stat().st_mtime > 0)
    assert jobs[CAPTIONS].start(root).wait() == 0
    ranks[0].resume()
    assert [rank.wait() for rank in ranks] == [0, 0], ranks[0].output
    lines = (root / "_upscaled.img_sdxl.txt").read_text().splitlines()
    assert sorted(lines) == [f"{root / name}\t32x32 -> 64x64" for name in names] and leftovers(root) == []


def test_rank_that_waits_for_a_killed_one_hears_signals_and_the_next_run_finishes(job, tmp_path, port):
    names = [path.relative_to(job.source) for path in job.source.rglob("*.png")]
    root = job.copy(folder_for_all(tmp_path, names, size=3))
    images = [root / name for name in names]
    ranks = start_ranks(job, root, 3, port, pauses={1: [("replace", 1)]})
    ranks[1].until_paused()
    ranks[1].signal(signal.SIGKILL)
    until_handed_in(ranks, port, 0, 2)
    for rank in ranks[::2]:
        rank.signal(signal.SIGTERM)
    assert [rank.wait() for rank in ranks] == [143, -signal.SIGKILL, 143]
    others = share(0, 3, images) + share(2, 3, images)
    assert all(image.with_suffix(job.suffix).exists() for image in others)
    assert len(others) <= job.check(root) < len(job.expected)
    job.finish(root)


class Torchrun:
    """`torchrun --nproc_per_node size` of a cache script, in a session of its own."""

    def __init__(self, kind, root, model, size, *argv, env=None):
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", size]
        size = ("--resolution", 64, "--num_workers", 0) if kind is IMAGES else ()
        script = [REPO / f"cache/{kind[0]}.py", "--data_root", root, "--model", model, *EXACT, *size, *argv]
        self.process = subprocess.Popen(
            [str(argument) for argument in [*launcher, *script]],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            env=env,
        )

    def finish(self):
        """Returns (exit code, output)."""
        try:
            output = self.process.communicate(timeout=HANG_S)[0]
        except subprocess.TimeoutExpired:
            self.kill()
            raise
        return self.process.returncode, output

    def kill(self):
        for pid in [*self.ranks().values(), self.process.pid]:
            os.kill(pid, signal.SIGKILL)

    def ranks(self):
        """Rank -> process id."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        found = {}
        for pid in children:
            environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            found |= {int(entry[5:]): int(pid) for entry in environment if entry.startswith(b"RANK=")}
        return found


@pytest.mark.slow  # ranks without torchrun show the same above
@pytest.mark.parametrize("size", [2, 3])
def test_torchrun_gives_what_one_process_gives(jobs, model, mixed, size):
    root, alone = mixed("ranks"), mixed("alone")
    launched = Torchrun(IMAGES, root, model, size, *BUCKETS)
    single = jobs[IMAGES].start(alone, *EXACT, *BUCKETS)
    assert single.wait() == 1
    code, output = launched.finish()
    assert code == 1, output
    check_merged(output, single.output, root, alone)


@pytest.mark.slow
def test_torchrun_of_captions_gives_what_one_process_gives(jobs, model, tmp_path):
    root = jobs[CAPTIONS].copy(tmp_path / "data")
    code, output = Torchrun(CAPTIONS, root, model, 2).finish()
    assert code == 0 and output.count(f": {NUM_PAIRS + 1} encoded, 0 fresh") == 1, output
    jobs[CAPTIONS].finish(root)


def test_torchrun_ends_when_a_rank_is_killed_and_one_process_finishes(jobs, model, tmp_path):
    names = [f"{index:02}.png" for index in range(40)]
    root = folder_for_all(tmp_path, names, size=2)
    save_pictures(root, names, size=(64, 64))
    stuck = share(1, 2, sorted(root.iterdir()))[-1]
    env = waiting_at(stuck, tmp_path / "patch")  # rank 1 will wait before it reads this image
    argv = ("--resolution", 256)
    launched = Torchrun(IMAGES, root, model, 2, *argv, env=env)
    pipe = wait_until(lambda: opened_by_reader(tmp_path / "patch" / "pipe"), lambda: launched.process.poll() is None)
    wait_until(lambda: jobs[IMAGES].sidecars(root))
    os.kill(launched.ranks()[1], signal.SIGKILL)
    code, output = launched.finish()
    os.close(pipe)
    assert code not in (0, None), output
    standing = payloads(root, ".img_sdxl")
    assert 0 < len(standing) < 40
    run = jobs[IMAGES].start(root, *EXACT, *argv)
    assert run.wait() == 0 and f": {40 - len(standing)} encoded, {len(standing)} fresh" in run.output
    finished = payloads(root, ".img_sdxl")
    assert len(finished) == 40 and standing.items() <= finished.items() and leftovers(root) == []


def opened_by_reader(fifo):
    """A descriptor of a named pipe's other end, once a process has opened it for reading; None before."""
    try:
        return os.open(fifo, os.O_WRONLY | os.O_NONBLOCK)
    except OSError:
        return None


# Bad images and pickles


def test_bad_files_of_any_format_are_named_and_the_rest_is_cached_by_workers(jobs, tmp_path):
    job = jobs[IMAGES]
    root = job.copy(tmp_path / "data")
    bad = {"empty.png", "gone.jpg", "header.gif"}
    for suffix in ("png", "webp", "gif", "tif", "bmp", "jpg"):
        data = BytesIO()
        Image.fromarray(picture(64, 64)).save(data, Image.registered_extensions()[f".{suffix}"])
        for percent in (5, 50, 95):
            bad.add(f"cut{percent}_{suffix}.{suffix}")
            (root / f"cut{percent}_{suffix}.{suffix}").write_bytes(data.getvalue()[: data.tell() * percent // 100])
    (root / "empty.png").touch()
    (root / "header.gif").write_bytes(b"GIF89a")
    (root / "gone.jpg").symlink_to(root / "nowhere.jpg")
    run = job.start(root, *EXACT, "--num_workers", 2)
    assert run.wait() == 1
    assert f"{len(bad)} failed:" in run.output and "Traceback" not in run.output
    assert all(f"{root / name}: " in run.output for name in bad)
    assert job.check(root) == NUM_PAIRS and leftovers(root) == []


class Payload:
    """Unpickles to a file at `canary`."""

    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return Path.touch, (self.canary,)


@pytest.mark.parametrize(
    ("kind", "weights"),
    [
        (IMAGES, "vae/diffusion_pytorch_model"),
        (CAPTIONS, "text_encoder/model"),
        (CAPTIONS, "projection/diffusion_pytorch_model"),
    ],
    ids=["vae", "text_encoder", "projection"],
)
def test_pickled_weights_are_refused_and_never_read(kind, weights, model, tmp_path, capsys, handlers):
    model = shutil.copytree(model, tmp_path / "model")
    save_pictures(tmp_path / "data", ["a.png"], size=(64, 64))
    good = model / f"{weights}.safetensors"
    pickled = good.with_name({"model": "pytorch_model"}.get(good.stem, good.stem) + ".bin")
    state = load_file(good)
    good.unlink()
    # As people publish them, and as an attacker would.
    for content in (state, state | {"extra": Payload(tmp_path / "canary")}):
        torch.save(content, pickled)
        capsys.readouterr()
        assert run_in_process(kind, tmp_path / "data", model) == 2
        assert str(good.parent) in capsys.readouterr().err
        assert not payloads(tmp_path / "data", kind[1]) and not (tmp_path / "canary").exists()
    torch.load(pickled, weights_only=False)
    assert (tmp_path / "canary").exists()  # it would have shown


@pytest.mark.parametrize("queued", [False, True])
def test_signal_while_a_batch_is_queued_loses_no_account(queued, tmp_path):
    summary = RunSummary("img_sdxl", [tmp_path], ".img_sdxl")
    rows = [Row(f"{i}.png", tmp_path / f"{i}.img_sdxl", {"latent": torch.zeros(4, 2, 2)}, {}) for i in range(8)]

    def interrupted(submit):
        def submit_and_stop(write):
            writer.pool.submit = submit  # the next call is not interrupted
            if queued:
                submit(write)
            raise KeyboardInterrupt

        return submit_and_stop

    with pytest.raises(KeyboardInterrupt), tqdm(disable=True) as progress, Writer(summary, progress) as writer:
        writer.submit(rows[:4])
        writer.pool.submit = interrupted(writer.pool.submit)
        writer.submit(rows[4:])
    assert len(list(tmp_path.glob("*.img_sdxl"))) == summary.counts["encoded"] == 8
