"""A run that was interrupted and resumed is the run that was not: weights, moments and averages bit for bit, its
samples in their order, and its logs."""

import os
import shutil

import numpy as np
import pytest
import torch
from helpers import WIDE, distance, run_script, weights_of
from runs import BRIEF, RESUME, Runs, content, events, metrics

from cachetrain.checkpoints.resume import Resumed
from cachetrain.checkpoints.save import checkpoint_path, checkpoints
from cachetrain.data.batching import BatchSampler
from cachetrain.data.sidecar import read_sidecar, write_sidecar
from cachetrain.training.flags import MEANINGS, resume_meanings

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def runs(shapes, model_t5, tmp_path_factory):
    return Runs(shapes, model_t5, tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def saved(runs):
    """A run of 4 steps with checkpoints at 2 and 4, to be interrupted."""
    runs.train(run := runs.new(), *BRIEF)
    return run


# The order


class Pairs:
    """An index of 17 pairs, of one latent shape or of three."""

    choices = 1  # samples of a pair, of which a visit draws one

    def __init__(self, mixed, weighted):
        self.shape_ids = np.arange(17, dtype=np.uint16) % 7 // 3 if mixed else np.zeros(17, np.uint16)
        self.repeats = np.where(np.arange(17) % 3, 1, 1.7 if weighted else 1).astype(np.float32)

    def __len__(self):
        return 17


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("batch_size", "ranks"), [(1, 1), (4, 1), (2, 2), (2, 3), (25, 1)])
def test_batches_from_any_number_on_are_the_tail_of_all(mixed, weighted, batch_size, ranks):
    index, number = Pairs(mixed, weighted), 4 * 17 // (batch_size * ranks) + 3  # of batches: some epochs and a bit
    for rank in range(ranks):

        def batches(first, rank=rank):
            return BatchSampler(index, batch_size, 3, number, strata=2, rank=rank, ranks=ranks, first=first)

        whole = batches(0)
        expected = list(whole)
        assert len(expected) == len(whole) == number and expected[-1][0].epoch >= 2
        for first in range(number):
            tail = batches(first)
            assert list(tail) == expected[first:]
            assert len(tail) == number - first
            assert tail.waiting == whole.waiting and (tail.trained == whole.trained).all()


# Bit for bit


@pytest.mark.parametrize(
    ("accum", "steps", "flags", "workers"),
    [(1, 6, ["--batch_size", 9], (0, 2)), (3, 4, ["--batch_size", 5, "--gradient_accum", 3], (2, 0))],
)
def test_interrupted_run_resumes_bit_exact_at_every_step(runs, accum, steps, flags, workers):
    whole, flags = runs.new(), [*flags, "--max_steps", steps]  # over 2 epochs of 24 pairs
    samples = runs.train(whole, *flags, "--save_steps", 1, "--num_workers", workers[0])
    assert len(samples) == accum * steps and len({i for batch in samples for i in batch}) == 24
    expected = content(whole, steps)
    for step in range(1, steps):
        run = runs.interrupted(whole, step)
        resumed = runs.train(run, *flags, *RESUME, "--num_workers", workers[step % 2])
        assert resumed == samples[step * accum :]
        assert content(run, steps) == expected


def test_resume_in_a_fresh_process_is_bit_exact(runs, saved):
    run = runs.interrupted(saved, 2)
    (rank,) = runs.launch(run, 1, *BRIEF, *RESUME)
    assert rank.code == 0, rank.output
    assert f"resumes from {checkpoint_path(run, 2)}, after step 2" in rank.output
    assert content(run, 4) == content(saved, 4)
    assert metrics(run) == metrics(saved)


@pytest.fixture(scope="module")
def two_sizes(shapes, model_t5, tmp_path_factory):
    """Flags of two directories with latents of different sizes, one of which is visited 1.5 times an epoch."""
    wide = tmp_path_factory.mktemp("wide") / "wide"
    assert run_script("dataset_scripts/draw_shapes.py", "--out", wide, "--num_images", 12) == 0
    for script, size in (("cache/create_img_sdxl.py", WIDE), ("cache/create_t5cache_768.py", ())):
        assert run_script(script, "--data_root", wide, "--model", model_t5, *size) == 0
    return ["--train_data_dir", shapes, f"{wide}:1.5"]


ADAMW8 = pytest.param("--optimizer adamw8", marks=pytest.mark.slow)
SETTINGS = [
    *(f"--optimizer {name} --precision bf16_pure" for name in ("adamw", "lion", "stableadamw", "muon", "adafactor")),
    "--optimizer lion --precision bf16", "--optimizer stableadamw --use_snr --objective v_prediction",
    "--optimizer adafactor --scheduler cosine --warmup_steps 3",
    "--optimizer prodigy --lr 1 --betas 0.9 0.5", "--optimizer prodigy --lr 1 --precision bf16", ADAMW8,
    "--precision fp16", "--cpu_offload --gradient_checkpointing",
    "--cpu_offload --optimizer stableadamw --precision bf16_pure", "--val_split 0.3 --val_steps 1",
    "--timestep_sampling stratified --gradient_accum 2 --batch_size 4 --gradient_clip 0.01",
    "--lora_rank 2 --lora_dropout 0.3 --dora --precision bf16", "--lora_rank 2 --optimizer muon",
    "--unfreeze_attn2", "--reinit_crossattn", "--reinit_out --targetted_training", "TWO SIZES",
]  # fmt: skip


@pytest.mark.parametrize("settings", SETTINGS)
def test_resume_is_bit_exact_with(runs, two_sizes, settings):
    if "adamw8" in settings:
        pytest.importorskip("bitsandbytes")
    flags = [*BRIEF, *(two_sizes if settings == "TWO SIZES" else settings.split())]
    whole = runs.new()
    samples = runs.train(whole, *flags)
    run = runs.interrupted(whole, 2)
    assert runs.train(run, *flags, *RESUME) == samples[len(samples) // 2 :]
    assert content(run, 4) == content(whole, 4)
    assert metrics(run) == metrics(whole)


def test_resume_that_was_planned_longer_equals_the_longer_run(runs):
    flags = ["--batch_size", 7, "--scheduler", "cosine", "--warmup_steps", 1, "--lr_decay_steps", 9]
    whole, run = runs.new(), runs.new()
    samples = runs.train(whole, *flags, "--max_steps", 6)
    first = runs.train(run, *flags, "--max_steps", 3)
    assert first + runs.train(run, *flags, *RESUME, "--max_steps", 6) == samples
    assert content(run, 6) == content(whole, 6)


# Several ranks


@pytest.mark.parametrize("flags", [[], ["--fsdp"]], ids=["ddp", "fsdp"])
def test_ranks_resume_bit_exact(runs, flags):
    whole, flags = runs.new(), [*flags, "--batch_size", 4, "--max_steps", 4, "--save_steps", 2]
    before = launched(runs, whole, 2, *flags)
    run = runs.interrupted(whole, 2)
    assert launched(runs, run, 2, *flags, *RESUME) == [samples[2:] for samples in before]
    assert content(run, 4) == content(whole, 4)
    assert metrics(run) == metrics(whole)


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1)])
def test_resume_on_other_ranks_trains_the_same_samples_equal_to_rounding(runs, before, after, model_t5):
    def flags(ranks):
        return ["--batch_size", 4 // ranks, "--max_steps", 6, "--save_steps", 3]

    whole = runs.new()
    (samples,) = launched(runs, whole, 1, *flags(1))
    cut = whole
    if before == 2:
        launched(runs, cut := runs.new(), 2, *flags(2))
    run = runs.interrupted(cut, 3)
    results = runs.launch(run, after, *flags(after), *RESUME)
    assert [rank.code for rank in results] == [0] * after, [rank.output for rank in results]
    assert f"ranks: {before} then, {after} now (the same run up to rounding)" in results[0].output
    parts = zip(*(rank.seen for rank in results), strict=True)
    # Rank r of n takes every n-th sample of a batch, from r on.
    assert [[i for together in zip(*part, strict=True) for i in together] for part in parts] == samples[3:]
    start = weights_of(model_t5 / "unet")
    for part in ("unet", "unet_ema"):
        assert distance(*(weights_of(checkpoint_path(path, 6) / part) for path in (run, whole)), start) < 1e-3


def launched(runs, out, ranks, *flags):
    """Runs ranks to their end; returns the samples of each."""
    results = runs.launch(out, ranks, *flags)
    assert [rank.code for rank in results] == [0] * ranks, [rank.output for rank in results]
    return [rank.seen for rank in results]


# Other settings


def error_of(runs, out, *flags):
    """The one line with which a run ends that cannot go on."""
    with pytest.raises(ValueError) as error:
        runs.train(out, *BRIEF, *flags)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("flags", "difference"),
    [
        ("--lr 2e-3", "peak rate, warm-up and decay steps: [0.001, 0, None] then, [0.002, 0, None] now"),
        ("--scheduler cosine --warmup_steps 1", "scheduler: constant then, cosine now"),
        ("--seed 1", "seed: 0 then, 1 now"),
        ("--batch_size 6", "samples a backward pass, all ranks: 7 then, 6 now"),
        ("--gradient_accum 2", "gradient_accum: 1 then, 2 now"),
        ("--optimizer lion", "optimizer: adamw then, lion now"),
        ("--precision bf16", "precision: fp32 then, bf16 now"),
        ("--weight_decay 0.1", "weight_decay: 0.025 then, 0.1 now"),
        ("--gradient_clip 0.5", "gradient_clip: 1.0 then, 0.5 now"),
        ("--ema_decay 0", "ema_decay: 0.9 then, 0.0 now"),
        ("--cond_dropout 0.1", "cond_dropout: 0.2 then, 0.1 now"),
        ("--use_snr", "use_snr: False then, True now"),
        ("--unfreeze_attn2", "unfreeze_attn2: False then, True now"),
        ("--objective flow", "noise schedule: epsilon "),
        ("--val_split 0.3", "pairs: 24 "),
    ],
)
def test_resume_of_another_run_is_refused_with_both_values(runs, saved, flags, difference):
    run = runs.interrupted(saved, 2)
    error = error_of(runs, run, *RESUME, *flags.split())
    assert str(checkpoint_path(run, 2)) in error and difference in error and "--resume_anyway" in error


def test_each_setting_is_listed_accepted_or_refused_as_its_flag_promises(saved):
    path, meanings = checkpoint_path(saved, 2), resume_meanings()
    resumed = Resumed(path, True)
    settings = resumed.state["settings"]
    expected = meanings | {"ranks": "rounding", "torch": "rounding"}
    assert set(expected.values()) == set(MEANINGS) and expected.keys() < settings.keys()
    for name in settings:
        changed, meaning = settings | {name: "another"}, expected.get(name, "same")
        line = f"{name}: {settings[name]} then, another now"
        if name == "lora_rank":  # the checkpoint holds a UNet where it should hold an adapter: no flag helps
            with pytest.raises(ValueError, match="restore --lora_rank"):
                resumed.check(changed, True, meanings)
            continue
        if meaning == "same":
            with pytest.raises(ValueError, match="--resume_anyway") as error:
                resumed.check(changed, False, meanings)
            assert line in str(error.value)
        listed = resumed.check(changed, meaning == "same", meanings)
        note = " (the same run up to rounding)" if meaning == "rounding" else ""
        assert listed == ([] if meaning == "silent" else [line + note]), name


@pytest.mark.parametrize("name", ["adamw", "lion"])
def test_optimizer_of_a_resumed_run_has_the_settings_of_its_command_line(runs, name):
    flags = [*BRIEF, "--optimizer", name]
    runs.train(whole := runs.new(), *flags, "--betas", 0.9, 0.99)
    run = runs.interrupted(whole, 2)
    runs.train(run, *flags, *RESUME, "--resume_anyway", "--betas", 0.8, 0.7, "--weight_decay", 0.5)
    (group,) = content(run, 4)["optimizer"]["param_groups"]
    assert group["weight_decay"] == 0.5
    assert (group.get("betas") or [group["beta1"], group["beta2"]]) == [0.8, 0.7]


@pytest.mark.parametrize("change", ["added", "removed", "renamed", "encoded"])
def test_resume_on_other_data_is_refused(runs, saved, shapes, tmp_path, change):
    data = shutil.copytree(shapes, tmp_path / "data")
    for suffix in (".img_sdxl", ".txt_t5cache"):
        first = data / f"00000{suffix}"
        if change == "added":
            shutil.copy(first, data / f"one_more{suffix}")
        elif change == "removed":
            first.unlink()
        elif change == "renamed":
            first.rename(data / f"a{suffix}")  # the same pairs, in the same order
    for path in data.glob("*.txt_t5cache") if change == "encoded" else ():
        tensors, header = read_sidecar(path)
        write_sidecar(path, tensors, header.metadata | {"encoder": "another"})
    now = {"added": 25, "removed": 23}.get(change, 24)
    error = error_of(runs, runs.interrupted(saved, 2), *RESUME, "--train_data_dir", data)
    assert "pairs: 24 (" in error and f"then, {now} (" in error


def test_resume_anyway_goes_on_and_says_what_differs(runs, saved, capsys):
    run = runs.interrupted(saved, 2)
    runs.train(run, *BRIEF, *RESUME, "--resume_anyway", "--lr", 2e-3, "--ema_decay", 0.5)
    said = capsys.readouterr().out
    assert "ema_decay: 0.9 then, 0.5 now" in said and "learning_rate: 0.001 then, 0.002 now" in said
    assert content(run, 4)["visits"] == 28 and content(run, 4) != content(saved, 4)


@pytest.mark.parametrize(
    "flags", ["--optimizer lion", "--optimizer prodigy --lr 1", "--precision bf16_pure", "--unfreeze_attn2"]
)
def test_resume_anyway_with_another_optimizer_starts_it_anew_and_says_so(runs, saved, capsys, flags):
    run = runs.interrupted(saved, 2)
    runs.train(run, *BRIEF, *RESUME, "--resume_anyway", *flags.split())
    assert capsys.readouterr().err.count("starts from scratch") == 1
    steps = [values.get("step") for values in content(run, 4)["optimizer"]["state"].values()]
    assert "prodigy" not in flags or steps == [2] * len(steps)


def test_resume_with_what_changes_nothing_is_bit_exact_and_lists_it(runs, saved, shapes, tmp_path, capsys):
    data = shutil.copytree(shapes, tmp_path / "elsewhere")
    run = runs.interrupted(saved, 2)
    changed = {"train_data_dir": data, "save_steps": 3, "log_step": 2, "num_workers": 1, "keep_last": 2}
    runs.train(run, *BRIEF, *RESUME, "--cache_in_ram", *(f"--{key}={value}" for key, value in changed.items()))
    said = capsys.readouterr().out
    assert all(f"\n{key}: " in said for key in (*changed, "cache_in_ram", "output_dir")) and "rounding" not in said
    changed_too = {"statistics"}  # sums of an epoch by log steps
    assert {key: value for key, value in content(run, 4).items() if key not in changed_too} == {
        key: value for key, value in content(saved, 4).items() if key not in changed_too
    }


# What there is to resume


def test_resume_where_no_run_is_is_refused(runs, tmp_path):
    assert f"{tmp_path / 'none'}: holds no run to resume" in error_of(runs, tmp_path / "none", *RESUME)
    assert "not a checkpoint; expected a directory like" in error_of(runs, tmp_path / "b", "--resume", tmp_path)


def test_resume_of_a_run_without_a_checkpoint_begins_again(runs, saved, capsys):
    run = runs.interrupted(saved, 2)
    shutil.rmtree(checkpoint_path(run, 2))
    samples = runs.train(run, *BRIEF, *RESUME)
    assert "has no checkpoint yet; the run starts from the beginning" in capsys.readouterr().err
    assert len(samples) == 4 and content(run, 4) == content(saved, 4)
    assert metrics(run) == metrics(saved) and events(runs, run) == events(runs, saved)


def test_resume_of_a_complete_run_says_so_and_changes_nothing(runs, saved, capsys):
    run = runs.interrupted(saved, 4)
    before = content(run, 4), metrics(run), [path.name for path in checkpoints(run)]
    assert runs.train(run, *BRIEF, *RESUME) == []
    assert f"{checkpoint_path(run, 4)}: the run is complete" in capsys.readouterr().out
    assert (content(run, 4), metrics(run), [path.name for path in checkpoints(run)]) == before


def test_resume_of_an_older_checkpoint_is_refused_where_it_would_mix_two_runs(runs, saved):
    path = checkpoint_path(saved, 2)
    assert "holds later checkpoints (checkpoint-000004)" in error_of(runs, saved, "--resume", path)
    other = runs.interrupted(saved, 2)
    assert "already holds another run" in error_of(runs, other, "--resume", path)
    assert "already holds a run" in error_of(runs, other)


def test_resume_of_a_path_goes_on_in_a_new_directory(runs, saved):
    run = runs.new()
    runs.train(run, *BRIEF, "--resume", checkpoint_path(saved, 2))
    assert content(run, 4) == content(saved, 4)
    assert [line["step"] for line in metrics(run)] == [3, 4]
    assert not os.path.samefile(checkpoint_path(run, 4) / "unet", checkpoint_path(saved, 4) / "unet")


# The logs


def test_logs_of_a_resumed_run_neither_double_nor_miss_a_step(runs):
    flags = ["--batch_size", 5, "--max_steps", 10, "--save_steps", 4, "--log_step", 2, "--val_split", 0.3]
    flags += ["--val_steps", 3, "--diagnostic_steps", 3, "--use_snr"]
    whole = runs.new()
    runs.train(whole, *flags)
    run = runs.interrupted(whole, 4)  # its logs know all 10 steps
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 11, "01_Tr')  # and a line that was not finished
    runs.train(run, *flags, *RESUME)
    assert [line["step"] for line in metrics(run)] == [1, 2, 3, 4, 6, 8, 9, 10]
    assert metrics(run) == metrics(whole)
    assert events(runs, run) == events(runs, whole)
    summaries = [line for line in metrics(run) if "03_Epoch_Summary/loss" in line]
    assert len(summaries) == 3 and "03_Epoch_Summary/optimizer_steps" in summaries[1]
    assert sum("val/loss_ema" in line for line in metrics(run)) == 4
