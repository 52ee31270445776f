"""The loop's own promises: sanity runs, selections, precisions, memory, saves."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from helpers import CLIP, TINY, digest, json_lines, load_script, refused, run_script, train, trainer_argv, weights_of
from PIL import Image
from safetensors.torch import load_file

from cachetrain.checkpoints import save
from cachetrain.checkpoints.save import checkpoints
from cachetrain.training import checks

trainer = load_script("train_from_cached.py")
FLOW = ["--objective", "flow"]


def test_overfit_learns_a_handful_by_heart_and_says_so(shapes, model_t5, tmp_path, capsys):
    flags = ["--overfit", 4, "--batch_size", 4, "--max_steps", 400, "--lr", 2e-3, *FLOW, "--log_step", 10]
    assert overfit(shapes, model_t5, tmp_path / "run", flags) == 0
    out = capsys.readouterr().out
    said = re.search(
        r"overfit succeeded: the loss on fixed noise went from ([\d.]+) to ([\d.]+) in (\d+) steps;", out
    )
    first, last, steps = map(float, said.groups())
    assert last < 0.1 * first and steps < 400
    # What was learned is there: the weights predict these samples, with this noise, as well as it says.
    last_line = json_lines(tmp_path / "run" / "metrics.jsonl")[-1]
    assert last_line["01_Training/loss_raw"] == pytest.approx(last, abs=1e-4)
    named = [line.strip() for line in out.splitlines() if line.startswith(f"  {shapes}")]
    assert len(named) == 4 and all(Path(f"{stem}.img_sdxl").exists() for stem in named)
    # Three pictures a pair: itself, with noise, and what the UNet makes of that, which is the pair again.
    with Image.open(tmp_path / "run" / "overfit.png") as sheet:
        pixels = np.asarray(sheet.convert("RGB"), np.float32)
    (height, width), band = (side // parts for side, parts in zip(pixels.shape, (4, 3), strict=False)), 100
    rows = [[pixels[y * height + height - band : (y + 1) * height, x * width + 8 : (x + 1) * width - 8]
             for x in range(3)] for y in range(4)]  # fmt: skip
    for pair, noisy, guess in rows:
        assert np.abs(guess - pair).mean() < 0.5 * np.abs(noisy - pair).mean() + 2


@pytest.mark.parametrize("broken", [["--lr", 1e-7], ["--lr", 2e-3, "--unfreeze_norms"]])
def test_overfit_that_cannot_learn_fails(broken, shapes, model_t5, tmp_path, capsys):
    flags = ["--overfit", 4, "--batch_size", 4, "--max_steps", 40, *FLOW, *broken]
    assert overfit(shapes, model_t5, tmp_path / "run", flags) == 1
    assert "not below a tenth" in capsys.readouterr().out


def test_overfit_notices_targets_that_have_nothing_to_do_with_the_input(
    shapes, model_t5, tmp_path, capsys, monkeypatch
):
    from cachetrain.diffusion import objective

    monkeypatch.setattr(objective, "target_of", lambda _, latents, *__: torch.randn_like(latents))
    flags = ["--overfit", 4, "--batch_size", 4, "--max_steps", 80, "--lr", 2e-3, *FLOW]
    assert overfit(shapes, model_t5, tmp_path / "run", flags) == 1


def overfit(data, model, out, flags):
    argv = trainer_argv(data, model, out, "--log_step", 25, *flags)
    return run_script("train_from_cached.py", *argv)


def test_training_cross_attention_changes_only_its_weights(shapes, model_t5, tmp_path):
    flags = ["--max_steps", 4, "--batch_size", 4, "--lr", 1e-2, "--unfreeze_attn2", "--ema_decay", 0.9]
    start = UNet2DConditionModel.from_pretrained(model_t5 / "unet").state_dict()
    lines, weights = train(shapes, model_t5, tmp_path / "run", *flags)
    rest = {name: tensor for name, tensor in weights.items() if ".attn2." not in name}
    assert digest(rest) == digest({name: start[name] for name in rest})
    assert all(not torch.equal(weights[name], start[name]) for name in weights.keys() - rest.keys())
    ema = weights_of(tmp_path / "run/checkpoint-000004/unet_ema")
    assert digest({name: ema[name] for name in rest}) == digest(rest)
    assert "11_Gradient_Stats/norm/conv_in" not in lines[-1]


def test_reinitialized_unet_learns_like_a_fresh_one(shapes, model_t5, tmp_path):
    """From a trained checkpoint, --reinit_unet must start where a fresh UNet starts, and fall as fast."""
    common = ["--batch_size", 8, "--lr", 2e-3, "--max_steps", 24, "--log_groups", 1, *FLOW]
    fresh, _ = train(shapes, model_t5, tmp_path / "fresh", *common)
    trained = tmp_path / "fresh" / "checkpoint-000024"
    goes_on, _ = train(shapes, trained, tmp_path / "on", *common)
    again, _ = train(shapes, trained, tmp_path / "again", *common, "--reinit_unet")

    def curve(lines):
        return np.array([line["01_Training/loss_raw"] for line in lines]).reshape(3, 8).mean(1)

    assert curve(again) == pytest.approx(curve(fresh), rel=0.1)
    assert curve(goes_on)[0] < 0.85 * curve(fresh)[0]  # what was not re-initialized remembers


@pytest.mark.parametrize(
    ("precision", "optimizer", "dtype"),
    [("bf16", "lion", torch.float32), ("bf16_pure", "adamw", torch.bfloat16),
     pytest.param("bf16_pure", "lion", torch.bfloat16, marks=pytest.mark.slow),
     ("bf16_pure", "stableadamw", torch.bfloat16), ("fp16", "adamw", torch.float32),
     pytest.param("fp32", "stableadamw", torch.float32, marks=pytest.mark.slow)],
)  # fmt: skip
def test_each_precision_and_optimizer_learns_and_saves_its_dtype(
    precision, optimizer, dtype, shapes, model_t5, tmp_path
):
    rate = 3e-4 if optimizer == "lion" else 2e-3
    steps = 12 if precision == "fp16" else 20  # a CPU takes half a second for one in float16
    flags = ["--max_steps", steps, "--batch_size", 8, "--lr", rate, "--precision", precision]
    flags += ["--optimizer", optimizer, "--log_groups", 1, 14]
    lines, weights = train(shapes, model_t5, tmp_path / "run", *flags, *FLOW, "--ema_decay", 0.9)
    assert {tensor.dtype for tensor in weights.values()} == {dtype}
    losses = [line["01_Training/loss_raw"] for line in lines]
    assert np.mean(losses[-steps // 4 :]) < (0.9 if steps == 20 else 0.95) * np.mean(losses[:3])
    if precision == "fp16":
        assert lines[-1]["14_System/grad_scale"] == 65536


def test_checkpoint_of_bfloat16_weights_and_its_average_draw(shapes, model_t5, tmp_path):
    flags = ["--max_steps", 2, "--batch_size", 4, "--precision", "bf16_pure", "--ema_decay", 0.9]
    flags += ["--sample_prompt", "a star", "--sampler_steps", 1, "--sample_cfgs", 1, "--val_split", 0.3]
    train(shapes, model_t5, tmp_path / "run", *flags, "--diagnostic_steps", 2)
    path = tmp_path / "run" / "checkpoint-000002"
    pipe = DiffusionPipeline.from_pretrained(path, custom_pipeline=str(path), trust_remote_code=True)
    assert pipe("a star", num_inference_steps=1).images[0].size == (64, 64)
    script = ["--model", path, "--prompt", "a star", "--out", tmp_path / "drawn", "--sampler_steps", 1]
    assert run_script("sample.py", *script) == 0


def test_offloaded_and_checkpointed_runs_train_the_same_weights(shapes, model_t5, tmp_path):
    flags = ["--max_steps", 4, "--batch_size", 4, "--lr", 1e-3, "--ema_decay", 0.9]
    _, plain = train(shapes, model_t5, tmp_path / "plain", *flags)
    _, offloaded = train(shapes, model_t5, tmp_path / "offloaded", *flags, "--cpu_offload")
    _, checkpointed = train(shapes, model_t5, tmp_path / "checkpointed", *flags, "--gradient_checkpointing")
    assert digest(plain) == digest(offloaded) == digest(checkpointed)
    averages = [weights_of(tmp_path / name / "checkpoint-000004/unet_ema") for name in ("plain", "offloaded")]
    assert digest(averages[0]) == digest(averages[1])


def test_scale_lr_and_the_schedule_are_what_is_logged(shapes, model_t5, tmp_path):
    flags = ["--max_steps", 6, "--batch_size", 4, "--grad_accum", 4, "--lr", 1e-3, "--scale_lr"]
    lines, _ = train(shapes, model_t5, tmp_path / "run", *flags, "--scheduler", "linear", "--warmup_steps", 2,
                   "--lr_decay_steps", 12)  # fmt: skip
    rates = [line["01_Training/learning_rate"] for line in lines]
    assert rates == pytest.approx([0, 2e-3, 4e-3, 3.6e-3, 3.2e-3, 2.8e-3])  # 1e-3 x sqrt(16) at the peak


def test_running_out_of_memory_says_what_to_lower_and_saves_the_last_step(shapes, model_t5, tmp_path, monkeypatch):
    calls = []

    def forward(*args, **kwargs):
        calls.append(1)
        if len(calls) > 3:
            torch.empty(2**55)  # a real refusal of the allocator
        return real(*args, **kwargs)

    real = trainer.forward_pass
    monkeypatch.setattr(trainer, "forward_pass", forward)
    message = refused(shapes, model_t5, tmp_path / "run", "--max_steps", 9, "--save_steps", 2)
    assert "out of memory" in message and "--batch_size below 2" in message and "--gradient_checkpointing" in message
    assert str(tmp_path / "run" / "checkpoint-000003") in message  # the last complete step, saved for that
    UNet2DConditionModel.from_pretrained(tmp_path / "run" / "checkpoint-000003" / "unet")
    assert not checks.is_out_of_memory(RuntimeError("shapes cannot be multiplied"))


def test_saves_by_epoch_by_time_and_on_request_and_keeps_the_last(shapes, model_t5, tmp_path, monkeypatch):
    flags = ["--max_steps", 9, "--batch_size", 8, "--save_on_epoch", "--save_start", 4]  # an epoch is 3 steps
    train(shapes, model_t5, tmp_path / "epochs", *flags)
    assert steps_saved(tmp_path / "epochs") == [6, 9]
    train(shapes, model_t5, tmp_path / "last", *flags, "--save_steps", 1, "--keep_last", 2)
    assert steps_saved(tmp_path / "last") == [8, 9] and not list((tmp_path / "last").glob(".checkpoint*"))

    real = trainer.forward_pass

    def forward(*args, **kwargs):
        (tmp_path / "asked" / "trigger.checkpoint").touch()
        return real(*args, **kwargs)

    monkeypatch.setattr(trainer, "forward_pass", forward)
    train(shapes, model_t5, tmp_path / "asked", "--max_steps", 2, "--batch_size", 8)
    assert steps_saved(tmp_path / "asked") == [1, 2] and not (tmp_path / "asked" / "trigger.checkpoint").exists()

    clock = SimpleNamespace(now_s=1000.0)

    def forward_of_25_seconds(*args, **kwargs):
        clock.now_s += 25
        return real(*args, **kwargs)

    monkeypatch.setattr(save, "time", SimpleNamespace(monotonic=lambda: clock.now_s))
    monkeypatch.setattr(trainer, "forward_pass", forward_of_25_seconds)
    train(shapes, model_t5, tmp_path / "timed", "--max_steps", 7, "--batch_size", 8, "--save_every_minutes", 1)
    assert steps_saved(tmp_path / "timed") == [3, 6, 7]


def steps_saved(output_dir):
    return [int(path.name.split("-")[1]) for path in checkpoints(output_dir)]


def test_a_bare_unet_trains_and_a_sd2_style_unet_fits(shapes, tmp_path):
    config = UNet2DConditionModel.load_config(TINY / "unet")
    config |= {"attention_head_dim": [2, 4], "use_linear_projection": True, "upcast_attention": True}
    UNet2DConditionModel.from_config(config).save_pretrained(tmp_path / "sd2")
    _, weights = train(
        shapes, tmp_path / "sd2", tmp_path / "run", "--max_steps", 2, "--batch_size", 4, "--objective",
        "v_prediction", suffixes=CLIP,
    )  # fmt: skip
    assert weights["down_blocks.0.attentions.0.proj_in.weight"].ndim == 2  # linear, as in SD2
    saved = UNet2DConditionModel.from_pretrained(tmp_path / "run" / "checkpoint-000002" / "unet")
    assert digest(saved.state_dict()) == digest(weights) and saved.config.attention_head_dim == [2, 4]
    assert not (tmp_path / "run" / "checkpoint-000002" / "model_index.json").exists()


def test_a_unet_with_its_own_projection_trains_it_on_raw_t5_caches(shapes, tmp_path):
    model, data = tmp_path / "model", tmp_path / "data"
    parts = [
        "--unet",
        TINY / "unet",
        "--vae",
        TINY / "vae",
        "--t5",
        TINY / "t5",
        "--out",
        model,
        "--train_projection",
    ]
    assert run_script("models/compose_t5_sd.py", *parts) == 0
    data.mkdir()
    for path in [*shapes.glob("[0-9]*.img_sdxl"), *shapes.glob("[0-9]*.txt"), *shapes.glob("[0-9]*.png")]:
        (data / path.name).write_bytes(path.read_bytes())
    assert run_script("cache/create_t5cache_768.py", "--data_root", data, "--model", model, "--raw") == 0
    start = UNet2DConditionModel.from_pretrained(model / "unet").state_dict()
    flags = ["--max_steps", 3, "--batch_size", 4, "--lr", 1e-3, "--sample_prompt", "a star", "--sampler_steps", 1]
    _, weights = train(data, model, tmp_path / "run", *flags)
    assert not torch.equal(weights["encoder_hid_proj.weight"], start["encoder_hid_proj.weight"])
    assert "--raw" in refused(shapes, model, tmp_path / "refused")  # those captions went through a projection


@pytest.mark.parametrize(
    "flags",
    [["--min_lr_rate", "0.2"], ["--val_steps", "5"], ["--fsdp"], ["--targetted_training"], ["--repeats", "0"],
     ["--log_groups", "16"], ["--optimizer", "prodigy"], ["--precision", "bf16_pure", "--optimizer", "adamw8"],
     ["--overfit", "4", "--max_steps", "2e"], ["--betas", "0.9", "1.5"], ["--lr", "-1"]],
)  # fmt: skip
def test_flags_that_do_not_go_together_are_errors(flags, shapes, model_t5, tmp_path, capsys):
    with pytest.raises((SystemExit, ValueError)) as stop:
        run_script("train_from_cached.py", *trainer_argv(shapes, model_t5, tmp_path / "x", *flags))
    told = capsys.readouterr().err + str(stop.value)
    assert any(flag in told for flag in flags if flag.startswith("--"))


def test_sample_script_draws_what_the_run_drew_scaled_text_included(shapes, model_t5, tmp_path):
    flags = ["--max_steps", 3, "--batch_size", 4, "--lr", 1e-2, "--text_scaling_factor", 0.25, "--ema_decay", 0.5]
    flags += ["--sample_prompt", "a small red star", "--sample_cfgs", 3, "--sampler_steps", 4]
    train(shapes, model_t5, tmp_path / "run", *flags)
    script = ["--model", tmp_path / "run" / "checkpoint-000003", "--prompt", "a small red star", "--cfgs", 3]
    script += ["--sampler_steps", 4, "--out", tmp_path / "drawn"]
    assert run_script("sample.py", *script) == 0
    (drawn,) = (tmp_path / "drawn").glob("*.png")
    own = np.asarray(Image.open(tmp_path / "run" / "samples" / "step-000003" / drawn.name)).astype(int)
    assert np.abs(np.asarray(Image.open(drawn)).astype(int) - own).max() <= 1
    settings = tmp_path / "run" / "checkpoint-000003" / "cachetrain.json"
    info = json.loads(settings.read_text())
    info["text"]["scaling_factor"] = 1.0
    settings.write_text(json.dumps(info))
    assert run_script("sample.py", *script) == 0
    assert np.abs(np.asarray(Image.open(drawn)).astype(int) - own).max() > 1


def test_checkpoint_can_be_read_by_whoever_may_read_its_folder(shapes, model_t5, tmp_path):
    train(shapes, model_t5, tmp_path / "run", "--max_steps", 1, "--batch_size", 2)
    checkpoint = tmp_path / "run" / "checkpoint-000001"
    mode = checkpoint.stat().st_mode & 0o666
    assert {path.stat().st_mode & 0o777 for path in checkpoint.rglob("*") if path.is_file()} == {mode}


def test_ckpt_dir_holds_each_checkpoint_as_one_file_with_its_averaged_weights(shapes, model_sd, tmp_path, capsys):
    flags = ["--max_steps", 2, "--save_steps", 1, "--batch_size", 2, "--lr", 1e-2, "--ema_decay", 0.5]
    train(shapes, model_sd, tmp_path / "run", *flags, "--ckpt_dir", tmp_path / "web", suffixes=CLIP)
    files = sorted((tmp_path / "web").glob("*.safetensors"))
    assert [path.name for path in files] == ["run-000001.safetensors", "run-000002.safetensors"]
    ema = weights_of(tmp_path / "run/checkpoint-000002/unet_ema")
    exported = load_file(files[1])["model.diffusion_model.input_blocks.0.0.weight"]
    assert torch.equal(exported, ema["conv_in.weight"])
    assert "--ckpt_dir: " in capsys.readouterr().out  # what web UIs cannot do with the tiny default
    bare = tmp_path / "bare"
    UNet2DConditionModel.from_pretrained(model_sd / "unet").save_pretrained(bare)
    message = refused(shapes, bare, tmp_path / "refused", "--ckpt_dir", tmp_path / "web", suffixes=CLIP)
    assert str(bare) in message
