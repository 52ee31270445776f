"""Flags of all scripts: no senseless number parses, help shows the range. What the trainer's mean for a resume."""

import argparse
import importlib
import re
from functools import cache

import pytest
from helpers import BENCHMARKS, REPO, SCRIPTS, load_script

from cachetrain import cli
from cachetrain.training import flags

ALL_SCRIPTS = sorted(SCRIPTS + BENCHMARKS)
# Where 0 has a meaning: off, none, all, the first, pure chance.
ZERO = {
    "cache/calculate_vae_scaling.py": {"--num_images", "--seed"},
    "cache/check_text_cache_std.py": {"--num_images", "--seed"},
    "cache/compare_tensorfiles.py": {"--tolerance"},
    "cache/create_clipl.py": {"--clip_skip", "--keep_tags", "--drop_tags", "--seed"},
    "cache/create_img_sdvae.py": {"--num_workers"},
    "cache/create_img_sdxl.py": {"--num_workers"},
    "cache/create_sdxl_text.py": {"--keep_tags", "--drop_tags", "--seed"},
    "cache/create_t5cache_768.py": {"--keep_tags", "--drop_tags", "--seed"},
    "cache/show_vae_latent.py": {"--num_images", "--seed"},
    "cache/validate_img_cache.py": {"--num_images", "--seed", "--min_psnr"},
    "cache/validate_vae.py": {"--num_images", "--seed"},
    "sample.py": {"--cfgs", "--seed"},
    "launch_tensorboard.py": {"--port"},
    "benchmarks/channels.py": {"--layer_steps"},
    "benchmarks/prompt_following.py": {"--seed"},
    "benchmarks/word_order.py": {"--seeds"},
    "dataset_scripts/check_captions.py": {"--min_length", "--top"},
    "dataset_scripts/check_images.py": {"--distance", "--top"},
    "dataset_scripts/edit_tags.py": {"--top"},
    "dataset_scripts/draw_shapes.py": {"--num_images", "--seed"},
    "dataset_scripts/score_shapes.py": {"--min_trained", "--min_held_out"},
    "models/compose_sd.py": {"--seed"},
    "models/compose_sdxl.py": {"--seed"},
    "models/compose_t5_sd.py": {"--seed"},
    "models/compose_t5_sdxl.py": {"--seed"},
    "models/train_tiny_vae.py": {"--seed"},
    "train_from_cached.py": {
        "--num_workers", "--offset_noise", "--timestep_range", "--cond_dropout", "--flip_p", "--unmasked_weight",
        "--unfreeze_up_blocks", "--unfreeze_down_blocks", "--time_ids", "--warmup_steps", "--min_lr_rate", "--betas",
        "--weight_decay", "--gradient_clip", "--ema_decay", "--seed", "--save_start", "--sample_cfgs", "--val_split",
        "--lora_dropout", "--shuffle_window",
    },
}  # fmt: skip
SIGNED = ("--logit_mean",)  # may be 0 or below
NEVER = ("nan", "inf", "-1", "many", "", "1e999", "9" * 20, "1_0", "\u0663")


@cache
def parser_of(script):
    """The parser with which a script reads its arguments."""
    made = []

    class Stop(Exception):
        pass

    def stop(parser, *_):
        made.append(parser)
        raise Stop

    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str((REPO / script).parent))
        patch.setattr(argparse.ArgumentParser, "parse_args", stop)
        with pytest.raises(Stop):
            load_script(script).main([])
    return made[0]


def takes_numbers(action):
    return isinstance(action.type, cli.Number) or action.type in (int, float) or isinstance(action.default, float)


NUMERIC = [
    (script, action.option_strings[0] if action.option_strings else action.dest)
    for script in ALL_SCRIPTS
    for action in parser_of(script)._actions
    if takes_numbers(action)
]


def action_of(script, flag):
    return next(action for action in parser_of(script)._actions if flag in (*action.option_strings, action.dest))


def refusal(parser, argv, capsys):
    """The error with which a parser refuses arguments."""
    with pytest.raises(SystemExit) as ended:
        parser.parse_args(argv)
    assert ended.value.code == 2
    return capsys.readouterr().err.splitlines()[-1].split(": error: ")[1]


def test_every_script_is_looked_at():
    assert len(ALL_SCRIPTS) > 20 and len(NUMERIC) > 60
    assert {script for script, _ in NUMERIC} >= {"sample.py", "train_from_cached.py", "cache/create_clipl.py"}


@pytest.mark.parametrize(("script", "flag"), NUMERIC)
def test_number_flag_refuses_what_makes_no_sense_in_words(script, flag, capsys):
    action, parser = action_of(script, flag), parser_of(script)
    assert action.type not in (int, float), "a bare type has no range"
    values = [*NEVER, *([] if flag in ZERO.get(script, ()) else ["0"])]
    values = [value for value in values if value not in ("0", "-1") or flag not in SIGNED]
    values += {int: ["1.5"], float: ["1e-300", "1e-400"]}.get(getattr(action.type, "kind", None), [])
    for value in values:
        error = refusal(parser, [flag] + [value] * (action.nargs if isinstance(action.nargs, int) else 1), capsys)
        error = error.removesuffix(", which is 0 in float32")
        assert flag in error and "expected a" in error and error.endswith(f"got {value or repr(value)}"), error
        assert not re.search(r"\b_\w", error), f"a private name: {error}"


@pytest.mark.parametrize("script", ZERO)
def test_flag_for_which_zero_has_a_meaning_takes_it(script):
    for flag in ZERO[script]:
        action = action_of(script, flag)
        assert float(str(action.type("0")).removesuffix("e")) == 0, flag


@pytest.mark.parametrize(("script", "flag"), NUMERIC)
def test_help_names_the_range_of_a_number(script, flag):
    text = " ".join(parser_of(script).format_help().split())
    shown = next(iter(action_of(script, flag).option_strings))
    assert f"({action_of(script, flag).type.range}" in text[text.rindex(f" {shown} ") :]


@pytest.mark.parametrize(
    ("script", "arguments", "error"),
    [
        (
            "train_from_cached.py",
            "--save_steps 0e",
            "--save_steps: expected a whole number of steps from 1 to 1000000000, or epochs above 0 to 1000000 with "
            "an e after it, like 0.5e, got 0e",
        ),
        ("train_from_cached.py", "--ema_decay 1", "--ema_decay: expected a number from 0 to below 1, got 1"),
        ("train_from_cached.py", "--timestep_range 0 1001", "expected a whole number from 0 to 1000, got 1001"),
        ("train_from_cached.py", "--repeats 1e-7", "--repeats: expected a number from 0.001 to 10000, got 1e-7"),
        ("train_from_cached.py", "--train_data_dir /a:1e-7", "--train_data_dir: expected a number from 0.001"),
        ("train_from_cached.py", "--train_data_dir /a /b:nan", "--train_data_dir: expected a number from 0.001"),
        ("train_from_cached.py", f"--seed {2**63}", "--seed: expected a whole number from 0 to 2^63 - 1, got"),
        ("train_from_cached.py", "--log_groups 16", "--log_groups: expected a whole number from 1 to 15, got 16"),
        ("train_from_cached.py", "--lr nan", "--learning_rate/--lr: expected a number above 0 to 10, got nan"),
        ("train_from_cached.py", "--max_steps 1e308e", "or epochs above 0 to 1000000 with an e after it"),
        (
            "train_from_cached.py",
            "--max_epochs 1e308",
            "expected a number above 0 to 1000000, got 1e308",
        ),
        (
            "train_from_cached.py",
            "--noise_gamma 1e-9",
            "expected a number from 0.01 to 1000, got 1e-9",
        ),
        ("train_from_cached.py", "--text_scaling_factor 1e30", "expected a number above 0 to 1000, got 1e30"),
        ("train_from_cached.py", "--vae_scaling_factor 1e30", "expected a number above 0 to 1000, got 1e30"),
        ("train_from_cached.py", "--num_workers 9999", "--num_workers: expected a whole number from 0 to 1024"),
        ("train_from_cached.py", "--sample_cfgs 1e30", "--sample_cfgs: expected a number from 0 to 1000, got 1e30"),
        ("sample.py", "--batch_size 65537", "--batch_size: expected a whole number from 1 to 65536, got 65537"),
        ("cache/create_t5cache_768.py", "--max_length 65536", "expected a whole number from 1 to 4096, got 65536"),
        ("sample.py", "--num_inference_steps 1001", "expected a whole number from 1 to 999, got 1001"),
        ("launch_tensorboard.py", "--port 65536", "--port: expected a whole number from 0 to 65535, got 65536"),
        ("dataset_scripts/compare_imgdirs.py", "--serve 65536", "--serve: expected a whole number from 0 to 65535"),
        ("dataset_scripts/compare_imgdirs.py", "--serve -1", "--serve: expected a whole number from 0 to 65535"),
    ],
)
def test_bound_is_kept_and_named(script, arguments, error, capsys):
    assert error in refusal(parser_of(script), arguments.split(), capsys)


# The trainer's flags

NEEDED = ["--train_data_dir", "/data", "--model", "m", "--output_dir", "out"]


def trainer(*arguments):
    return load_script("train_from_cached.py").parse_args([*NEEDED, *" ".join(arguments).split()])


def test_old_spellings_are_accepted():
    for new, old in (("--sample_every 7", "--sample_steps 7"), ("--num_inference_steps 9", "--sampler_steps 9")):
        assert vars(trainer(new)) == vars(trainer(old)) != vars(trainer())
    assert (trainer("--sample_every 7").sample_steps, trainer("--num_inference_steps 9").sampler_steps) == (7, 9)
    draw = ["--model", "m", "--prompt", "a star", "--out", "o"]
    parse = importlib.import_module("cachetrain.sampling.command").parse_args
    assert parse([*draw, "--num_inference_steps", "3"]) == parse([*draw, "--sampler_steps", "3"])


def test_weight_of_a_directory_is_read_and_a_colon_in_its_name_kept(tmp_path):
    (odd := tmp_path / "a:2").mkdir()
    args = load_script("train_from_cached.py").parse_args(
        ["--train_data_dir", "/a:2.5", "/b", "/c:d", str(odd), "--repeats", "2", *NEEDED[2:]]
    )
    assert args.train_data_dir == ["/a", "/b", "/c:d", str(odd)] and args.dir_weights == [5.0, 2.0, 2.0, 2.0]


def test_constant_rate_takes_a_warm_up_of_zero_only(capsys):
    for nothing in ("0", "0e", "0.0e"):
        assert trainer("--scheduler constant --warmup_steps", nothing).warmup_steps == nothing
    with pytest.raises(SystemExit):
        trainer("--scheduler constant --warmup_steps 1")
    assert "use constant_with_warmup" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ("--timestep_range 500 500", "--timestep_range: expected FIRST below END, got 500 500"),
        ("--optimizer prodigy --lr 1 --scale_lr", "--scale_lr cannot be combined with --optimizer prodigy"),
        ("--fsdp --optimizer adamw8", "--fsdp cannot be combined with --optimizer adamw8"),
        ("--optimizer adafactor --betas 0.9 0.99", "--betas does nothing with --optimizer adafactor"),
        ("--fsdp --optimizer muon", "--fsdp cannot be combined with --optimizer muon, which needs whole weights"),
        ("--fsdp --precision fp16", "--fsdp cannot be combined with --precision fp16"),
        ("--fsdp --cpu_offload", "--fsdp cannot be combined with --cpu_offload"),
        ("--resume latest --overfit 8 --max_steps 9", "--resume cannot be combined with --overfit"),
    ],
)
def test_flags_that_cannot_be_combined_are_refused(arguments, error, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit):
        trainer(arguments)
    assert error in capsys.readouterr().err


def test_every_flag_has_a_meaning_for_a_resume():
    meanings = flags.resume_meanings()
    assert meanings.keys() == vars(trainer()).keys()
    kinds = {kind: {name for name in meanings if meanings[name] == kind} for kind in flags.MEANINGS}
    assert set().union(*kinds.values()) == meanings.keys()
    assert kinds["silent"] == {"resume", "resume_anyway", "copy_config", "overfit", "is_custom"}
    assert kinds["rounding"] == {
        "device", "compile", "fsdp", "cpu_offload", "gradient_checkpointing", "allow_tf32",
    }  # fmt: skip
    # Whatever the values of tensors depend on, and nothing else compares.
    assert {name for name in kinds["same"] if not name.startswith(("reinit_", "unfreeze_"))} == {
        "sizes", "unmasked_weight", "shuffle_window",
        "imgcache_suffix", "txtcache_suffix", "force_txtcache", "vae_scaling_factor", "text_scaling_factor",
        "caption_weights", "time_ids", "use_snr", "noise_gamma", "loss", "huber_c", "offset_noise",
        "timestep_sampling", "logit_mean", "logit_std", "timestep_shift", "timestep_range", "cond_dropout", "flip_p",
        "targetted_training", "gradient_accum", "scheduler", "min_lr_rate", "num_cycles", "optimizer",
        "betas", "weight_decay", "gradient_clip", "gradient_release", "ema_decay", "seed", "precision",
        "lora_rank", "lora_alpha", "lora_targets", "lora_dropout", "dora",
    }  # fmt: skip
