"""Training on several processes, gloo on the CPU: against one process, and when one of them is refused or dies."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from diffusers import DiffusionPipeline, UNet2DConditionModel
from helpers import HANG_S, REPO, digest, load_script
from PIL import Image
from safetensors.torch import load_file
from train_ranks import Ranks, listing_rank, sharing_rank, starved_rank

STEPS = 4
COMMON = ["--max_steps", STEPS, "--gradient_accum", 2, "--use_snr", "--ema_decay", 0.9, "--cond_dropout", 0.2,
          "--lr", 1e-3, "--gradient_clip", 0.5]  # fmt: skip


@pytest.fixture(scope="module")
def folders(shapes, model_t5, tmp_path_factory):
    """Two directories with latents of different sizes: 24 pairs and 12."""
    wide = tmp_path_factory.mktemp("wide") / "wide"
    assert load_script("dataset_scripts/draw_shapes.py").main(["--out", str(wide), "--num_images", "12"]) == 0
    common = ["--data_root", str(wide), "--model", str(model_t5)]
    size = ["--target_width", "96", "--target_height", "64", "--num_workers", "0"]
    assert load_script("cache/create_img_sdxl.py").main([*common, *size]) == 0
    assert load_script("cache/create_t5cache_768.py").main(common) == 0
    return [shapes, wide]


@pytest.fixture(scope="module")
def everything(folders, tmp_path_factory):
    """Flags that turn on all that only watches a run."""
    held_out = tmp_path_factory.mktemp("held_out") / "data"
    shutil.copytree(folders[1], held_out)
    return ["--val_data_dir", held_out, "--val_steps", 2, "--sample_prompt", "a red circle", "--sample_steps", 2,
            "--sampler_steps", 2, "--sample_cfgs", 4, "--save_steps", 2, "--diagnostic_steps", 2,
            "--log_groups", *range(1, 16)]  # fmt: skip


class Launcher:
    """Runs the trainer on ranks, each kind of run once."""

    def __init__(self, folders, model, root):
        self.folders, self.model, self.root, self.runs = folders, model, root, {}

    def argv(self, name, *flags, folders=None):
        argv = ["--train_data_dir", *(folders or self.folders), "--model", self.model, "--logdir", self.root / "tb"]
        argv += ["--output_dir", self.root / name, "--num_workers", 0, "--log_step", 1, "--device", "cpu"]
        return [*argv, "--precision", "fp32", *flags]

    def run(self, name, ranks, *flags):
        """Runs to the end; returns Run. One that fails fails the first test that needs it; the others are skipped."""
        if name not in self.runs:
            self.runs[name] = None
            results = Ranks(self.argv(name, *flags), ranks, self.root / f"{name}-ranks").finish()
            assert [rank.code for rank in results] == [0] * ranks, [rank.output for rank in results]
            self.runs[name] = Run(self.root / name, results)
        if self.runs[name] is None:
            pytest.skip(f"the run {name!r} has failed in an earlier test")
        return self.runs[name]

    def fail(self, name, argv, **options):
        """Runs what is to fail on two ranks; returns a list of Rank. None may hang, or end with a traceback."""
        results = Ranks(argv, 2, self.root / f"{name}-ranks", **options).finish()
        assert not any("Traceback" in rank.output for rank in results), [rank.output for rank in results]
        return results


class Run:
    """A finished run: what its ranks saw, its metrics lines and its weights."""

    def __init__(self, folder, ranks):
        self.folder, self.ranks = folder, ranks
        self.lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]

    def column(self, tag):
        return [line[tag] for line in self.lines if tag in line]

    def weights(self, step=STEPS, name="unet"):
        return load_file(self.folder / f"checkpoint-{step:06d}" / name / "diffusion_pytorch_model.safetensors")

    def seen(self, what):
        return [rank.seen[what] for rank in self.ranks]


@pytest.fixture(scope="module")
def launcher(folders, model_t5, tmp_path_factory):
    return Launcher(folders, model_t5, tmp_path_factory.mktemp("runs"))


def run_plain(launcher, ranks):
    """The run that all are compared with: the same 8 samples in each micro-batch, on 1, 2 or 4 ranks."""
    return launcher.run(f"plain{ranks}", ranks, *COMMON, "--batch_size", 8 // ranks)


def distance(weights, expected, model):
    """How far two trained UNets are apart, as a share of how far training moved them."""
    start = load_file(model / "unet" / "diffusion_pytorch_model.safetensors")
    apart = sum((weights[name] - tensor).square().sum() for name, tensor in expected.items())
    moved = sum((start[name] - tensor).square().sum() for name, tensor in expected.items())
    return (apart / moved).sqrt().item()


def checkpoint_steps(folder):
    return sorted(int(path.name.split("-")[1]) for path in folder.glob("checkpoint-*"))


# Against one process


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_equal_one_process_with_as_many_times_the_batch(launcher, model_t5, ranks):
    one, many = run_plain(launcher, 1), run_plain(launcher, ranks)
    for tag in ("loss", "loss_raw", "grad_norm", "qk_grads_av", "clipped_fraction", "images_seen"):
        assert many.column(f"01_Training/{tag}") == pytest.approx(one.column(f"01_Training/{tag}"), rel=1e-4)
    assert max(one.column("01_Training/clipped_fraction")) == 1  # clipping is part of what was compared
    assert distance(many.weights(), one.weights(), model_t5) < 1e-3
    assert distance(many.weights(name="unet_ema"), one.weights(name="unet_ema"), model_t5) < 1e-3
    for what in ("weights", "averages"):
        assert len({hashes[-1] for hashes in many.seen(what)}) == 1
    assert many.seen("weights")[0][-1] == digest(many.weights())


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_share_each_batch_of_one_process(launcher, ranks):
    (whole,), parts = run_plain(launcher, 1).seen("samples"), run_plain(launcher, ranks).seen("samples")
    assert len(whole) == 2 * STEPS and all(len(part) == len(whole) for part in parts)
    for batch, *shares in zip(whole, *parts, strict=True):
        assert len(set(batch)) == 8 and all(len(share) == 8 // ranks for share in shares)
        assert sorted(batch) == sorted(sample for share in shares for sample in share)
    assert {sample < 24 for batch in whole for sample in batch} == {True, False}  # of both sizes


@pytest.mark.parametrize("ranks", [2, 4])
def test_each_header_is_read_by_one_rank(launcher, folders, ranks):
    (everything,), parts = run_plain(launcher, 1).seen("headers"), run_plain(launcher, ranks).seen("headers")
    firsts = {f"{folder}/00000{suffix}" for folder in folders for suffix in (".img_sdxl", ".txt_t5cache")}
    rest = sorted(path for part in parts for path in part if path not in firsts)
    assert rest == sorted(path for path in everything if path not in firsts) and len(rest) == len(set(rest)) == 68


def ranks_of(target, root, *arguments, ranks=2):
    """What the ranks of a target of train_ranks saw."""
    results = Ranks(arguments, ranks, root / target.__name__, target=target).finish()
    assert [rank.code for rank in results] == [0] * ranks, [rank.output for rank in results]
    return [rank.seen for rank in results]


def test_ranks_with_an_index_file_list_what_they_list_without(folders, tmp_path):
    data = shutil.copytree(folders[0], tmp_path / "data")
    firsts = {f"{data}/00000{suffix}" for suffix in (".img_sdxl", ".txt_t5cache")}
    one, other = ranks_of(listing_rank, tmp_path, data, data)
    assert (len(one["headers"][0]), len(other["headers"][0])) == (27, 27)  # half of the pairs, and the first again
    assert set(one["headers"][1]) == set(other["headers"][1]) == firsts
    for name in ("checksums", "tokens"):
        assert one[name][0] == one[name][1] == other[name][0] == other[name][1]


def test_ranks_of_a_machine_share_one_copy_in_memory_that_ends_with_them(tmp_path):
    first, second, third = ranks_of(sharing_rank, tmp_path, "a", "a", "b", ranks=3)
    assert [seen["made"] for seen in (first, second, third)] == [[0], [], [2]]
    assert (first["total"], second["total"], third["total"]) == (0, 0, 2 * 2**20)
    assert (first["mapped"], second["mapped"], third["mapped"]) == (1, 1, 0)
    assert first["kib"] == second["kib"] == 0 and first["strings"] == second["strings"] == ["x1", "x", "x\udcff", 0]
    assert (first["first"], second["first"]) == (0, 99)  # what a rank writes is its own


def test_ranks_all_end_with_the_error_of_the_one_that_was_to_share(tmp_path):
    assert ranks_of(sharing_rank, tmp_path, "none", "none") == [{"error": "rank 0 has none"}] * 2


def test_gradients_are_exchanged_once_a_step_whatever_the_accumulation(launcher):
    flags = ["--max_steps", 2, "--batch_size", 2, "--cond_dropout", 0]
    once = launcher.run("accum1", 2, *flags).seen("exchanges")
    assert launcher.run("accum3", 2, *flags, "--gradient_accum", 3).seen("exchanges") == once
    assert once[0] == once[1] >= 2


def test_watching_a_run_of_two_ranks_never_changes_it(launcher, everything):
    plain, watched = run_plain(launcher, 2), launcher.run("watched", 2, *COMMON, "--batch_size", 4, *everything)
    assert digest(watched.weights()) == digest(plain.weights())
    assert digest(watched.weights(name="unet_ema")) == digest(plain.weights(name="unet_ema"))
    assert len(watched.column("val/loss_ema")) == 2 and list(watched.folder.glob("samples/step-000002/*.png"))


def test_one_rank_writes(launcher, everything):
    watched = launcher.run("watched", 2, *COMMON, "--batch_size", 4, *everything)
    assert watched.column("step") == [1, 2, 3, 4] and checkpoint_steps(watched.folder) == [2, 4]
    assert len(list((launcher.root / "tb" / "watched").rglob("*tfevents*"))) == 1
    assert watched.ranks[0].output.count("steps of 4 x 2 x 2 = 16") == 1 and watched.ranks[1].output == ""


# Sharded


def test_sharded_ranks_equal_whole_ones(launcher, everything, model_t5):
    whole = launcher.run("watched", 2, *COMMON, "--batch_size", 4, *everything)
    sharded = launcher.run("sharded", 2, *COMMON, "--batch_size", 4, *everything, "--fsdp")
    for tag in ("01_Training/loss", "01_Training/grad_norm", "val/loss", "val/loss_ema"):
        assert sharded.column(tag) == pytest.approx(whole.column(tag), rel=1e-4)
    for step in (2, STEPS):
        for name in ("unet", "unet_ema"):
            assert distance(sharded.weights(step, name), whole.weights(step, name), model_t5) < 1e-3
    pictures, expected = ({p.relative_to(run.folder): np.int16(Image.open(p)) for p in run.folder.glob("samples/*/*")}
                          for run in (sharded, whole))  # fmt: skip
    assert len(pictures) == 2 and pictures.keys() == expected.keys()
    assert max(np.abs(pictures[name] - expected[name]).max() for name in pictures) <= 2
    assert sharded.ranks[1].output == ""


def test_sharded_ranks_hold_their_part_and_exchange_gradients_once_a_step(launcher, everything):
    sharded = launcher.run("sharded", 2, *COMMON, "--batch_size", 4, *everything, "--fsdp")
    for rank in sharded.ranks:
        assert rank.seen["own"] == pytest.approx(rank.seen["parameters"] / 2, rel=0.01)
        assert rank.seen["exchanges"] == 6 * STEPS  # two down blocks, a mid block, two up blocks, and the rest


def test_checkpoint_of_sharded_ranks_is_a_complete_pipeline(launcher, everything, model_t5):
    sharded = launcher.run("sharded", 2, *COMMON, "--batch_size", 4, *everything, "--fsdp")
    folder = sharded.folder / f"checkpoint-{STEPS:06d}"
    pipeline = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    assert type(pipeline.unet) is UNet2DConditionModel
    assert digest(pipeline.unet.state_dict()) == sharded.seen("weights")[0][-1] == sharded.seen("weights")[1][-1]
    assert (
        pipeline.unet.state_dict().keys()
        == UNet2DConditionModel.from_pretrained(model_t5 / "unet").state_dict().keys()
    )


@pytest.mark.parametrize(
    ("precision", "optimizer"), [("bf16", "lion"), pytest.param("bf16_pure", "adamw", marks=pytest.mark.slow)]
)
def test_sharded_ranks_equal_whole_ones_in_bfloat16(launcher, model_t5, precision, optimizer):
    flags = ["--max_steps", 2, "--batch_size", 4, "--lr", 1e-4, "--cond_dropout", 0]
    flags += ["--precision", precision, "--optimizer", optimizer]
    whole, sharded = (launcher.run("-".join([precision, *kind]), 2, *flags, *kind) for kind in ([], ["--fsdp"]))
    for tag in ("01_Training/loss", "01_Training/grad_norm"):
        assert sharded.column(tag) == pytest.approx(whole.column(tag), rel=2e-3)
    weights, expected = sharded.weights(2), whole.weights(2)
    assert {t.dtype for t in weights.values()} == {t.dtype for t in expected.values()}
    assert distance(weights, expected, model_t5) < 0.25


# Saving


def test_ranks_save_when_time_has_passed_and_when_asked(launcher):
    flags = ["--max_steps", 3, "--batch_size", 2, "--cond_dropout", 0, "--save_steps", 100]
    often = launcher.run("often", 2, *flags, "--save_every_minutes", 1e-6, "--keep_last", 2)
    assert checkpoint_steps(often.folder) == [2, 3] and [len(hashes) for hashes in often.seen("weights")] == [3, 3]
    (launcher.root / "asked").mkdir()
    (launcher.root / "asked" / "trigger.checkpoint").touch()
    asked = launcher.run("asked", 2, *flags, "--save_start", 100)
    assert checkpoint_steps(asked.folder) == [1, 3] and not (asked.folder / "trigger.checkpoint").exists()
    assert not list(launcher.root.glob("*/.checkpoint*"))


# What is refused


def test_ranks_refuse_mixed_caches_and_name_both_files(launcher, folders, tmp_path):
    mixed = tmp_path / "mixed"
    shutil.copytree(folders[0], mixed)
    shutil.copy(folders[1] / "00005.img_sdxl", mixed / "00005.img_sdxl")
    ranks = launcher.fail("mixed", launcher.argv("mixed", folders=[mixed]))
    assert [rank.code for rank in ranks] == [2, 2]
    assert f"{mixed / '00000.img_sdxl'} and {mixed / '00005.img_sdxl'} differ" in ranks[1].output  # its share
    assert "rank 0: another rank has ended" in ranks[0].output


def test_ranks_that_list_different_pairs_are_refused(launcher, folders, tmp_path):
    shutil.copytree(folders[0], tmp_path / "rank0" / "data")
    shutil.copytree(folders[0], tmp_path / "rank1" / "data")
    for path in (tmp_path / "rank1" / "data").glob("00005.*"):  # as many pairs, the same first and last
        path.rename(path.with_name(f"00005b{path.suffix}"))
    cwds = [tmp_path / "rank0", tmp_path / "rank1"]
    ranks = launcher.fail("differ", launcher.argv("differ", folders=["data"]), cwds=cwds)
    assert [rank.code for rank in ranks] == [2, 2]
    assert all("different pairs: 24 pairs, the first data/00000; 24 pairs" in rank.output for rank in ranks)


def test_ranks_end_with_code_2_before_training_where_one_process_would(launcher, folders, tmp_path):
    held = tmp_path / "held"
    held.mkdir()
    (held / "args.json").write_text("of another run")
    cases = {
        "held": (["--output_dir", held], "already holds a run"),
        "flag": (["--lr", "-1"], "--lr: expected"),
        "prompts": (["--sample_prompts", tmp_path / "none.txt"], "none.txt"),
    }
    for name, (flags, message) in cases.items():
        ranks = launcher.fail(name, launcher.argv(name, *flags))
        assert [rank.code for rank in ranks] == [2, 2] and message in ranks[0].output, name
    assert [path.name for path in held.iterdir()] == ["args.json"]
    assert (held / "args.json").read_text() == "of another run"


# What dies


@pytest.mark.parametrize(("rank", "moment", "saved"), [(1, "read", []), (0, "forward", [2]), (0, "save", [])])
def test_ranks_end_when_one_is_killed_and_leave_whole_checkpoints(launcher, rank, moment, saved):
    flags = ["--max_steps", 6, "--batch_size", 2, "--cond_dropout", 0, "--save_steps", 2]
    name = f"killed-{moment}"
    ranks = launcher.fail(name, launcher.argv(name, *flags), kill=(rank, moment))
    assert ranks[rank].code == -signal.SIGKILL and ranks[1 - rank].code == 2
    assert f"rank {1 - rank}: another rank has ended" in ranks[1 - rank].output
    assert checkpoint_steps(launcher.root / name) == saved
    for step in saved:
        UNet2DConditionModel.from_pretrained(launcher.root / name / f"checkpoint-{step:06d}" / "unet")


def test_ranks_that_lose_one_in_the_middle_of_an_exchange_end_without_waiting_for_pythons_lock(launcher):
    """gloo's thread frees tensors with that lock; a main thread that holds it while waiting for gloo never ends."""
    for number in range(3):  # not every exchange that breaks off leaves such a tensor
        name = f"killed-backward-{number}"
        argv = launcher.argv(name, "--max_steps", 4, "--batch_size", 2, "--cond_dropout", 0)
        ranks = launcher.fail(name, argv, kill=(0, "backward"), target=starved_rank)
        assert [rank.code for rank in ranks] == [-signal.SIGKILL, 2]
        assert "rank 1: another rank has ended" in ranks[1].output


# torchrun

# torchrun that waits HANG_S instead of 30 s before it kills a rank that does not end after SIGTERM.
TORCHRUN = f"""
import functools
from torch.distributed.elastic.multiprocessing.api import PContext
from torch.distributed.run import main
PContext.close = functools.partialmethod(PContext.close, timeout={HANG_S})
main()
"""


def test_torchrun_trains_alike_and_ends_when_a_rank_is_killed(launcher):
    folder, last = launcher.root / "torchrun", launcher.root / "torchrun" / f"checkpoint-{STEPS:06d}"
    flags = [*COMMON, "--batch_size", 4, "--max_steps", 10_000, "--save_steps", 2]
    command = [sys.executable, "-c", TORCHRUN, "--standalone", "--nproc_per_node", 2]
    process = subprocess.Popen(
        [str(word) for word in [*command, REPO / "train_from_cached.py", *launcher.argv("torchrun", *flags)]],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    deadline_s = time.monotonic() + HANG_S
    while not last.exists() and process.poll() is None and time.monotonic() < deadline_s:
        time.sleep(0.01)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    rank_1 = [int(pid) for pid in children if b"RANK=1" in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")]
    assert last.exists() and len(rank_1) == 1
    os.kill(rank_1[0], signal.SIGKILL)
    output = process.communicate(timeout=2 * HANG_S)[0]
    assert process.returncode != 0 and "forcefully exiting" not in output, output  # torchrun killed no other rank
    assert "rank 0: another rank has ended" in output or "train_from_cached.py: terminated" in output, output
    assert digest(Run(folder, []).weights()) == digest(run_plain(launcher, 2).weights())
    for step in checkpoint_steps(folder):
        assert Run(folder, []).weights(step, "unet_ema")
