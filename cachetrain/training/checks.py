"""Refuses what does not fit together before anything is trained, and says what to do where memory runs out."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel

from cachetrain.checkpoints.export import check_exportable
from cachetrain.checkpoints.save import FROZEN
from cachetrain.log import warn
from cachetrain.modeling import load, trainable
from cachetrain.modeling.conditioning import check_unet
from cachetrain.training.optimizers import OPTIMIZERS


def check_fit(index, config, args):
    """Refuses caches that do not fit a UNet of this config (dict), before it is loaded."""
    where = args.train_data_dir[0]
    for shape in index.shapes:
        if shape[0] != config["in_channels"]:
            raise ValueError(
                f"{where}: latents are {shape}, the UNet wants {config['in_channels']} channels; cache the images "
                "with this model's VAE"
            )
    check_unet(index.text_kind, index.text_widths, config, where)
    if load.has_text_projection(config) and index.text_settings.get("raw") is False:
        raise ValueError(
            f"{where}: captions were cached through a projection, the UNet has one; cache them with "
            "create_t5cache_768.py --raw"
        )
    if args.cond_dropout > 0.25:
        warn(f"--cond_dropout {args.cond_dropout}: above 0.25 the model learns little from captions")


def check_vae(index, model_dir):
    """Warns where the model would decode with another VAE than the one that made the caches."""
    recorded = index.image_header.metadata.get("encoder")
    if index.image_settings.get("custom"):
        return  # their fingerprint covers the repository's code too
    if recorded and (model_dir / "vae").is_dir() and load.fingerprint(model_dir / "vae") != recorded:
        warn(
            f"{model_dir / 'vae'} is not the VAE that made the image caches; "
            "samples and checkpoints decode with the wrong one: compose the model with that VAE, or cache again"
        )


def check_start(run, resumed):
    """Refuses what cannot run, before anything big is loaded: widths that do not fit, flags that name nothing, no
    space for a checkpoint.

    Args:
        resumed: Resumed; its checkpoint's frozen parts are linked, not copied, where they are intact.
    """
    args, plan, model_dir = run.args, run.plan, run.model_dir
    config = UNet2DConditionModel.load_config(load.component_dir(model_dir, "unet"))
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(config)
    check_fit(run.index, unet.config, args)
    trainable.apply(unet, args, args.seed, resumed=True)
    num_all = sum(parameter.numel() for parameter in unet.parameters())
    num_trained = sum(parameter.numel() for parameter in unet.parameters() if parameter.requires_grad)
    size = 2 if args.precision == "bf16_pure" else 4
    needed = num_all * (size + (4 if args.ema_decay else 0))
    needed += num_trained * OPTIMIZERS[args.optimizer].state_bytes(size)
    once = _frozen_bytes(model_dir) if resumed.frozen is None else 0
    _check_space(Path(args.output_dir), needed + once, "a checkpoint")
    if args.ckpt_dir:
        _check_space(Path(args.ckpt_dir), num_all * 4, "its single file")
    saves = -(-(plan.max_steps - resumed.step) // plan.save_steps)
    saves = min(saves, args.keep_last + 1) if args.keep_last else saves
    free = shutil.disk_usage(args.output_dir).free
    if free < saves * needed + once:
        warn(
            f"{args.output_dir}: a checkpoint takes {needed / 2**30:.1f} GiB, and {saves} are planned; "
            f"{free / 2**30:.1f} GiB are free: use --keep_last or a higher --save_steps"
        )


def _frozen_bytes(model_dir):
    return sum(path.stat().st_size for name in FROZEN for path in (model_dir / name).rglob("*") if path.is_file())


def _check_space(directory, needed, what):
    directory.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise ValueError(
            f"{directory}: {what} takes {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free; make "
            "room, or choose another directory"
        )


def check_model(run):
    """Checks that the model's VAE made the caches (a warning), and that --ckpt_dir can be written (a ValueError).

    Returns:
        list of str, what the single files of --ckpt_dir will lack.
    """
    check_vae(run.index, run.model_dir)
    if not run.args.ckpt_dir:
        return []
    return [f"--ckpt_dir: {note}" for note in check_exportable(run.model_dir, run.noise_scheduler)[0]]


def is_out_of_memory(error):
    """Whether an exception says that a device or the host had no memory left."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def memory_advice(args, error):
    """What to change after running out of memory, most effective first."""
    advice = [f"--batch_size below {args.batch_size} (and --gradient_accum up by the same factor)"]
    advice += [] if args.gradient_checkpointing else ["--gradient_checkpointing"]
    advice += [] if args.cpu_offload or args.fsdp else ["--cpu_offload"]
    if OPTIMIZERS[args.optimizer].state_tensors > OPTIMIZERS["lion"].state_tensors:
        advice.append("--optimizer lion, which keeps half the state of adamw")
    advice += [] if args.precision == "bf16_pure" else ["--precision bf16_pure"]
    return f"out of memory ({str(error).splitlines()[0]}); try " + ", ".join(advice)
