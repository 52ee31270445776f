"""The cache scripts under real faults: killed, stopped, out of space, several at once, launched as ranks.

Whatever happens, what stands under a final name is whole and right, and running the same command again makes what is
missing: equal, bit by bit, to what an undisturbed run makes.
"""

import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
import zlib
from io import BytesIO
from pathlib import Path

import pytest
import torch
from cache_fixtures import make_pipeline, picture, save_pictures, sidecars
from cache_forks import Forks, FullDisk, watched_disk
from conftest import REPO, load_script
from PIL import Image
from safetensors.torch import load_file

from cachetrain import cli
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


def test_kill_at_random_moments_leaves_whole_sidecars_and_a_job_that_can_be_finished(job, tmp_path):
    check_kills_at_random(job, tmp_path, kills=16, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 5))
def test_kill_at_hundreds_of_random_moments(job, tmp_path, seed):
    check_kills_at_random(job, tmp_path, kills=75, seed=seed)


def check_kills_at_random(job, tmp_path, kills, seed):
    rng = random.Random(seed)
    killed = killed_while_writing = folder = 0
    while killed < kills:
        exact = rng.random() < 0.7
        root = job.copy(tmp_path / str(folder := folder + 1))
        argv = list(EXACT if exact else ("--batch_size", 4))
        if job.script == IMAGES[0]:
            argv += ["--num_workers", rng.choice([0, 2])]
        for _ in range(3):
            run = job.start(root, *argv, slow_s=rng.choice([0, 0.003, 0.003, 0.003]))
            wanted = len(job.sidecars(root)) + rng.choice([0, 0, 1, 2, 3, 5])
            run.until(lambda root=root, wanted=wanted: len(job.sidecars(root)) >= wanted)
            time.sleep(rng.choice([0.001, 0.01, 0.1]) * rng.random())
            run.signal(signal.SIGKILL, group=True)
            assert run.wait() in (-signal.SIGKILL, 0), run.output
            killed += run.code != 0
            killed_while_writing += bool(leftovers(root))
            job.check(root, exact)
        job.finish(root, *argv, exact=exact)
        shutil.rmtree(root)
    assert killed_while_writing > killed / 3


@pytest.mark.slow
def test_workers_end_when_the_main_process_is_killed(jobs, tmp_path):
    root = jobs[IMAGES].copy(tmp_path / "data")
    run = jobs[IMAGES].start(root, *EXACT, "--num_workers", 2, slow_s=0.01)
    run.until(lambda: jobs[IMAGES].sidecars(root))
    run.signal(signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL
    deadline_s = time.monotonic() + 20
    while time.monotonic() < deadline_s and processes(run.pid):
        time.sleep(0.1)
    assert processes(run.pid) == []
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
    assert run.wait(20) == 128 + number, run.output
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
    run = job.start(root, *EXACT, *(("--num_workers", 2) if job.script == IMAGES[0] else ()), slow_s=0.01)
    run.until(lambda: len(job.sidecars(root)) >= 8)
    run.signal(number, group)
    check_stopped(job, root, run, number, before=5)
    assert 8 <= len(job.sidecars(root)) < len(job.expected)
    if group:
        job.finish(root)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_while_the_last_files_are_written_waits_for_them(job, three, number):
    run = job.start(three, *EXACT, slow_s=0.15)
    run.until(lambda: len(leftovers(three)) >= 3)
    run.signal(number)
    assert run.wait() == 128 + number
    made = len(payloads(three, job.suffix))
    assert made >= 3 and leftovers(three) == []
    assert f"stopped; run again to continue. {job.suffix[1:]}: {made} encoded, 0 fresh" in run.output


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT])
def test_second_signal_does_not_wait_for_the_disk(job, three, first):
    run = job.start(three, *EXACT, slow_s=20)
    run.until(lambda: run.hears(signal.SIGTERM))
    time.sleep(1)  # the disk hangs in the first operation: nothing shows that they are writing
    run.signal(first)
    time.sleep(0.3)
    assert run.poll() is None
    run.signal(signal.SIGTERM)
    assert run.wait(3) == -signal.SIGTERM
    assert job.sidecars(three) == []


def test_signal_before_encoding_ends_at_once(job, tmp_path):
    root = job.copy(tmp_path / "data")
    for number, group in STOPS:
        run = job.start(root, *EXACT)
        run.until(lambda run=run: run.hears(signal.SIGTERM))
        time.sleep(0.01)
        run.signal(number, group)
        check_stopped(job, root, run, number, before=0)
    assert job.sidecars(root) == []


def test_signal_while_torch_is_imported_ends_at_once(model, source, tmp_path):
    root, script = shutil.copytree(source, tmp_path / "data"), IMAGES[0]
    run = subprocess.Popen(
        [sys.executable, REPO / f"cache/{script}.py", "--data_root", root, "--model", model, "--num_workers", "0"],
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline_s = time.monotonic() + 30
    while "libtorch_cpu" not in Path(f"/proc/{run.pid}/maps").read_text():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)
    run.terminate()
    errors = run.communicate(timeout=20)[1]
    assert run.returncode == 143, errors
    assert "Traceback" not in errors and errors.endswith(f"{script}.py: terminated\n")
    assert not sidecars(root, IMAGES[1]) and leftovers(root) == []


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_signals_at_hundred_random_moments(job, tmp_path, seed):
    rng = random.Random(seed)
    for round_ in range(34):
        root = job.copy(tmp_path / str(round_))
        workers = rng.choice([0, 2])
        run = job.start(root, *EXACT, *(("--num_workers", workers) if job.script == IMAGES[0] else ()), slow_s=0.003)
        run.until(lambda run=run: run.hears(signal.SIGTERM))
        time.sleep(rng.uniform(0.02, 0.6))
        number, group = rng.choice(STOPS)
        # Workers that are just starting do not ignore SIGTERM yet; the main process then says so.
        run.signal(number, group and not (workers and number == signal.SIGTERM and not job.sidecars(root)))
        assert run.wait(20) in (0, -number, 128 + number), run.output
        if "stopped" in run.output:
            check_stopped(job, root, run, number, before=0)
        assert leftovers(root) == []
        job.finish(root)


def test_interrupted_check_does_not_wait_for_what_is_queued():
    checked = []

    def slow_check(item):
        checked.append(item)
        time.sleep(0.001)

    results = many_files.in_threads(slow_check, range(10**6))
    next(results)
    before = len(checked)
    results.close()
    assert len(checked) - before <= 2 * many_files._THREADS


# Out of space


def run_in_process(kind, root, model, *argv):
    """Runs a cache script here, through what its command line goes through; returns its exit code."""
    size = ("--resolution", 64, "--num_workers", 0) if kind is IMAGES else ()
    main = load_script(f"cache/{kind[0]}.py").main
    arguments = ["--data_root", root, "--model", model, *size, *EXACT, *argv]
    with pytest.raises(SystemExit) as end:
        cli.run(lambda: main([str(argument) for argument in arguments]))
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
        assert code == 2
        assert errors.splitlines()[-1].endswith(
            tuple(f"No space left on device: '{p}'" for p in targets(root, suffix))
        )
        made = (standing[f"b{suffix}"] == new[f"b{suffix}"]) + (f"c{suffix}" in standing)
        assert f": {made} encoded (1 stale), " in errors or made == 2  # only the list of upscaled images is missing
        assert run_in_process(kind, root, model) == 0
        assert payloads(root, suffix) == new and leftovers(root) == []
    assert code == 0 and standing == new and after >= 8  # two files of four operations each


def payloads(root, suffix):
    """Name -> what tells one verified sidecar from another."""
    return {path.name: read_sidecar(path)[1].metadata["sha256"] for path in root.glob(f"*{suffix}")}


def targets(root, suffix):
    return [root / f"{name}{suffix}" for name in ("a", "b", "c", "_null_caption")] + [root / f"_upscaled{suffix}.txt"]


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
    """Runs a crowd on one folder, kills one of them, and checks what the others and the next runs do."""
    runs = []

    def written():
        return sum(len(job.sidecars(root)) for job in jobs.values())

    for kind in crowd:  # those that come later find the earlier ones writing
        wanted = written() + rng.randrange(2, 8) if runs else 0
        runs[-1:] and runs[-1].until(lambda wanted=wanted: written() >= wanted)
        runs.append(jobs[kind].start(root, *EXACT, slow_s=0.005))
    victim, wanted = rng.choice(runs), written() + rng.randrange(8)
    victim.until(lambda: written() >= wanted)
    victim.signal(signal.SIGKILL, group=True)
    for run in runs:
        assert run.wait() == (-signal.SIGKILL if run is victim and run.code else 0), run.output
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


def test_list_of_upscaled_images_survives_a_run_beside_it_that_comes_hours_later(jobs, tmp_path):
    root = jobs[IMAGES].copy(tmp_path / "data")
    save_pictures(root, ["00.png"], size=(32, 32))
    run = jobs[IMAGES].start(root, *EXACT, slow_s=0.03)
    run.until(lambda: len(jobs[IMAGES].sidecars(root)) >= 14)
    for path in root.glob(".cachetrain*.txt.tmp"):
        os.utime(path, (0, 0))
    assert jobs[CAPTIONS].start(root).wait() == 0
    assert run.wait() == 0, run.output
    assert (root / "_upscaled.img_sdxl.txt").read_text() == f"{root / '00.png'}\t32x32 -> 64x64\n"


# Ranks


def start_ranks(job, root, size, *argv, **options):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {"WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [job.start(root, *EXACT, *argv, RANK=rank, **env, **options) for rank in range(size)]


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


def test_ranks_share_the_files_and_give_one_account(jobs, mixed):
    job, root, alone = jobs[IMAGES], mixed("ranks"), mixed("alone")
    single = job.start(alone, *EXACT, *BUCKETS)
    ranks = start_ranks(job, root, 3, *BUCKETS)
    assert [rank.wait() for rank in (single, *ranks)] == [1, 1, 1, 1]
    check_merged(ranks[0].output, single.output, root, alone)
    assert all("encoded" not in rank.output and "Traceback" not in rank.output for rank in ranks[1:])


def test_ranks_leave_when_rank_0_has_given_the_account(jobs, tmp_path):
    save_pictures(tmp_path, [f"{index}.png" for index in range(4)], size=(32, 32))
    ranks = start_ranks(jobs[IMAGES], tmp_path, 2, slow_s=0.15)
    ranks[1].wait()
    assert "4 encoded" in ranks[0].output and (tmp_path / "_upscaled.img_sdxl.txt").exists()
    assert [rank.wait() for rank in ranks] == [0, 0]


def test_rank_that_waits_for_a_killed_one_hears_signals_and_the_next_run_finishes(job, tmp_path):
    root = job.copy(tmp_path / "data")
    images = [path.relative_to(root).with_suffix("") for path in root.rglob("*.png")]
    others = [name for name in images if zlib.crc32(f"{root / name}.png".encode()) % 3 != 1]
    ranks = start_ranks(job, root, 3, slow_s=0.03)
    ranks[1].until(lambda: job.sidecars(root))
    ranks[1].signal(signal.SIGKILL)
    ranks[0].until(lambda: all((root / f"{name}{job.suffix}").exists() for name in others))
    time.sleep(1)
    assert ranks[0].poll() is None and ranks[2].poll() is None
    for rank in ranks[::2]:
        rank.signal(signal.SIGTERM)
    assert [rank.wait(10) for rank in ranks] == [143, -signal.SIGKILL, 143]
    assert len(others) <= job.check(root) < len(job.expected)
    job.finish(root)


class Torchrun:
    """`torchrun --nproc_per_node size` of a cache script, in a session of its own."""

    def __init__(self, kind, root, model, size, *argv):
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", size]
        size = ("--resolution", 64, "--num_workers", 0) if kind is IMAGES else ()
        script = [REPO / f"cache/{kind[0]}.py", "--data_root", root, "--model", model, *EXACT, *size, *argv]
        self.process = subprocess.Popen(
            [str(argument) for argument in [*launcher, *script]],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def finish(self, timeout_s=120):
        """Returns (exit code, output)."""
        try:
            output = self.process.communicate(timeout=timeout_s)[0]
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


@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.slow)])
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
    root = tmp_path / "data"
    save_pictures(root, [f"{index:02}.png" for index in range(40)], size=(64, 64))
    argv = ("--resolution", 256)
    launched = Torchrun(IMAGES, root, model, 2, *argv)
    deadline_s = time.monotonic() + 60
    while not jobs[IMAGES].sidecars(root) and time.monotonic() < deadline_s:
        time.sleep(0.005)
    os.kill(launched.ranks()[1], signal.SIGKILL)
    code, output = launched.finish(20)
    assert code not in (0, None), output
    standing = payloads(root, ".img_sdxl")
    assert 0 < len(standing) < 40
    run = jobs[IMAGES].start(root, *EXACT, *argv)
    assert run.wait() == 0 and f": {40 - len(standing)} encoded, {len(standing)} fresh" in run.output
    finished = payloads(root, ".img_sdxl")
    assert len(finished) == 40 and standing.items() <= finished.items() and leftovers(root) == []


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
