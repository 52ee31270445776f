"""Checks before training that caches, model and disk fit the run, and advice for when memory runs out."""

from __future__ import annotations

import shutil
import traceback
from argparse import Namespace
from pathlib import Path

import torch

from cachetrain.atomic import claim
from cachetrain.checkpoints.adapters import check_base
from cachetrain.checkpoints.export import check_exportable
from cachetrain.checkpoints.export_adapter import check_adapter_exportable
from cachetrain.checkpoints.save import frozen_files
from cachetrain.data.loader import is_worker_death, worker_death
from cachetrain.data.sidecar import settings_of
from cachetrain.log import counted, describe, first_line, info, warn
from cachetrain.modeling import load, trainable
from cachetrain.modeling.conditioning import cache_command, check_unet, text_kind
from cachetrain.modeling.files import component_files
from cachetrain.training import memory
from cachetrain.training.optimizers import OPTIMIZERS


def check_fit(index, config: dict, args: Namespace) -> None:
    """Checks that the caches fit the UNet, before its weights are loaded.

    Args:
        index: PairIndex.
        config: config of the UNet2DConditionModel.
        args: parsed command line.

    Raises:
        ValueError: the caches do not fit.
    """
    where = args.train_data_dir[0]
    for shape in index.shapes:
        if shape[0] != config["in_channels"]:
            raise ValueError(
                f"{where}: latents are {shape}, the UNet expects {config['in_channels']} channels; cache the images "
                "with the VAE of this model"
            )
    check_unet(index.text_kind, index.text_widths, config, args.model, where, index.text_suffix)
    if load.has_text_projection(config) and index.text_settings.get("raw") is False:
        raise ValueError(
            f"{where}: captions were cached with a projection, but the UNet has a projection itself; cache the "
            "captions with create_t5cache_768.py --raw"
        )
    longest = index.max_tokens
    if args.force_toklen and longest > args.force_toklen:
        raise ValueError(
            f"--force_toklen {args.force_toklen}: the longest caption in {where} has {longest} tokens; cache the "
            f"captions again with create_t5cache_768.py --max_length {args.force_toklen}"
        )
    if args.cond_dropout > 0.25:
        warn(f"--cond_dropout {args.cond_dropout}: above 0.25 the model learns little from captions; default: 0.04")


def check_encoders(index, model_dir: Path) -> None:
    """Warns if the caches were made with another VAE or text encoder than the model's.

    Args:
        index: PairIndex.
        model_dir: of the model; a bare UNet has neither.

    Raises:
        ValueError: the text encoder is of another kind than that of the caches, the model lacks the projection that
            they were made with, takes another null than theirs, or lacks a text encoder; a component is incomplete.
    """
    for name in load.missing_text_encoders(model_dir):
        raise ValueError(f"{model_dir}: has no {name}/, which its model_index.json names; get the model again")
    if (vae := model_dir / "vae").is_dir():
        files = component_files(vae, "vae")
        if _made_with_others(index.image_header, index.image_settings, files):
            warn(
                f"{vae} is not the VAE that made the image caches; samples and checkpoints would decode wrongly: "
                "compose the model with the VAE of the caches, or cache the images again"
            )
    if (encoder := model_dir / "text_encoder").is_dir():
        architecture, expected = load.text_family(model_dir), text_kind(index.text_kind).encoder
        if architecture != expected:
            raise ValueError(
                f"{encoder}: the text encoder is {architecture.upper()}, but the captions were cached with "
                f"{expected.upper()}; pass the model that the captions were cached with, or run "
                + cache_command(architecture, model_dir, index.directories[0], index.text_kind, index.text_suffix)
            )
        if index.text_settings.get("raw") is False and not (model_dir / "projection").is_dir():
            raise ValueError(
                f"{model_dir}: has no projection, but the captions were cached with one; pass the model they were "
                "cached with, or cache the captions for this model with create_t5cache_768.py --raw"
            )
        zeros = index.text_settings.get("force_zeros_for_empty_prompt")
        if zeros is not None and zeros != load.zeros_for_empty_prompt(model_dir):
            raise ValueError(
                f"{model_dir}: its model_index.json and the text caches differ in force_zeros_for_empty_prompt, so "
                "that pictures would be drawn with another null than the trained one; run "
                + cache_command(architecture, model_dir, index.directories[0], index.text_kind, index.text_suffix)
            )
        made_by = index.text_kind, index.text_settings
        if _made_with_others(index.text_header, index.text_settings, load.text_files(model_dir, *made_by)):
            warn(
                f"{', '.join(load.text_components(*made_by))} in {model_dir} are not those that made the "
                "text caches; prompts would be encoded differently from the captions: pass the model that the "
                "captions were cached with, or cache them again"
            )


def _made_with_others(header, settings, files):
    """Whether caches were made with other files than these; False if that cannot be known."""
    cached_with = header.metadata.get("encoder")
    if settings.get("custom"):
        return False  # the fingerprint includes the repository's code, so it cannot be compared
    return bool(cached_with) and load.fingerprint(files) != cached_with


def check_start(run, resumed) -> None:
    """Checks, before weights are loaded, that the caches fit the UNet, that the --unfreeze_* flags name existing
    parts, that the disk has room for a checkpoint, and, with a warning only, that memory has room for a step.

    Args:
        run: Run.
        resumed: Resumed; if the frozen parts of its checkpoint are intact, they are linked, not copied.

    Raises:
        ValueError: one of these is not so, another run of this name has its files in --ckpt_dir, or the adapter of
            the checkpoint belongs to another base model.
    """
    args, plan, model_dir = run.args, run.plan, run.model_dir
    unet = load.empty_unet(load.component_dir(model_dir, "unet"))
    check_fit(run.index, unet.config, args)
    if args.lora_rank and resumed.path:
        check_base(resumed.path, model_dir)
    _check_time_ids(run)
    _check_masks(run)
    trainable.apply(unet, args, args.seed, resumed=True)
    num_trained = sum(parameter.numel() for parameter in unet.parameters() if parameter.requires_grad)
    # An adapter's checkpoint holds neither the UNet nor the frozen parts.
    num_saved = num_trained if args.lora_rank else sum(parameter.numel() for parameter in unet.parameters())
    size = 2 if args.precision == "bf16_pure" else 4
    needed = num_saved * (size + (4 if args.ema_decay else 0))
    needed += num_trained * OPTIMIZERS[args.optimizer].state_bytes(size)
    copied = resumed.frozen is None and not args.lora_rank
    frozen = _frozen_bytes(model_dir) if copied else 0  # stored once for all checkpoints
    _check_space(Path(args.output_dir), needed + frozen, "a checkpoint")
    if args.ckpt_dir:
        _check_space(Path(args.ckpt_dir), num_saved * 4, "a single-file checkpoint")
        if run.world.main:
            name = run.output_dir.resolve().name  # as Saving names the files
            claim(Path(args.ckpt_dir) / f".{name}.run", run.output_dir, f"--ckpt_dir {args.ckpt_dir}")
    num_saves = -(-(plan.max_steps - resumed.step) // plan.save_steps)
    num_saves = min(num_saves, args.keep_last + 1) if args.keep_last else num_saves
    free = shutil.disk_usage(args.output_dir).free
    if free < num_saves * needed + frozen:
        warn(
            f"{args.output_dir}: a checkpoint takes {needed / 2**30:.1f} GiB, and {num_saves} are planned, but only "
            f"{free / 2**30:.1f} GiB are free: use --keep_last or a higher --save_steps"
        )
    memory.report(run, unet)


def _check_time_ids(run):
    """Checks that SDXL's UNet gets the size and crop of each image, and that --time_ids has an effect."""
    given = run.args.time_ids is not None
    if given and not run.conditioning.takes_time_ids:
        raise ValueError(f"--time_ids: the UNet of {run.args.model} takes none; omit the flag")
    for index in filter(None, (run.index, run.held_out)):
        try:
            run.conditioning.of_image(index.image_header.metadata)
        except ValueError as error:
            raise ValueError(f"{index.image_path(0)}: {error}") from error
        if given and "crop_box" in index.image_header.metadata:
            warn("--time_ids does nothing: the image caches record the size and crop of each image")


def _check_masks(run):
    """Checks that --unmasked_weight finds masks; says how many there are, also if they are not used."""
    index, weight = run.index, run.args.unmasked_weight
    if weight is not None and not index.num_masked:
        raise ValueError(
            f"--unmasked_weight {weight:g}: no image cache in {', '.join(index.directories)} holds a mask; cache the "
            "images again with --mask files or --mask alpha, or omit the flag"
        )
    if not index.num_masked:
        return
    if weight is not None:
        _check_masks_of_sizes(index)
    masked = counted(index.num_masked, "mask")
    if weight is None:
        info(f"{masked} in the image caches not used: pass --unmasked_weight to train on what masks leave in")
    else:
        info(f"--unmasked_weight {weight:g}: {masked} in the image caches; images without one are trained as a whole")
    if weight is not None and run.held_out is not None and not run.held_out.num_masked:
        info("the validation images have no masks: val/loss counts all of each image")


def _check_masks_of_sizes(index):
    """Checks that the caches of an image are all made with masks, or all without."""
    headers = list(index.image_headers.items())  # of each directory, that of each size
    for start in range(0, len(headers), index.sizes):
        of_directory = headers[start : start + index.sizes]
        masks = {path: settings_of(path, header).get("mask") for path, header in of_directory}
        if len(set(masks.values())) > 1:
            made = (f"{path} {f'with --mask {mask}' if mask else 'without --mask'}" for path, mask in masks.items())
            raise ValueError(
                f"--unmasked_weight: what one size of an image leaves out would be trained at another: "
                f"{'; '.join(made)}; cache all sizes with the same --mask"
            )


def _frozen_bytes(model_dir):
    return sum(path.stat().st_size for path in frozen_files(model_dir).values())


def _check_space(directory, needed, what):
    directory.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise ValueError(
            f"{directory}: {what} takes {needed / 2**30:.1f} GiB, but only {free / 2**30:.1f} GiB are free; make "
            "room, or choose another directory"
        )


def check_model(run) -> list[str]:
    """Checks the model's VAE and text encoder, and whether the model can be exported where --ckpt_dir is given.

    Args:
        run: Run.

    Returns:
        notes for the user.

    Raises:
        ValueError: of `check_encoders`; the model cannot be exported as a single file.
    """
    check_encoders(run.index, run.model_dir)
    notes = ["--is_custom: not needed here, the model's code is not run"] if run.args.is_custom else []
    if run.args.ckpt_dir:
        if run.args.lora_rank:
            of_file = check_adapter_exportable(run.model_dir, run.noise_scheduler)
        else:
            of_file = check_exportable(run.model_dir, run.noise_scheduler, run.latent_scaling())[0]
        notes += [f"--ckpt_dir: {note}" for note in of_file]
    return notes


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception was raised because the device or the host ran out of memory."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def memory_advice(args: Namespace, error: BaseException) -> str:
    """The error message for running out of memory: flags to change, most effective first."""
    advice = [f"--batch_size below {args.batch_size} (and --gradient_accum up by the same factor)"]
    advice += [] if args.gradient_checkpointing else ["--gradient_checkpointing"]
    advice += [] if args.cpu_offload or args.fsdp else ["--cpu_offload"]
    if OPTIMIZERS[args.optimizer].state_tensors > OPTIMIZERS["lion"].state_tensors:
        advice.append("--optimizer lion (half the state of adamw)")
    advice += [] if args.precision == "bf16_pure" else ["--precision bf16_pure"]
    alone = args.gradient_accum == 1 and not (
        args.gradient_release or args.cpu_offload or args.fsdp or args.lora_rank
    )
    advice += ["--gradient_release with --precision bf16_pure"] if alone else []
    return f"out of memory ({first_line(error)}); try " + ", ".join(advice)


def explained(error: Exception, newest: Path | None, args: Namespace, world) -> ValueError:
    """Returns the exception that ends a run after `error`, whose message is one line.

    Args:
        error: what ended the run.
        newest: the run's newest checkpoint, or None.
        args: parsed command line.
        world: World.
    """
    if is_out_of_memory(error):
        reason = memory_advice(args, error)
    elif is_worker_death(error):
        reason = worker_death(error)
    elif world.is_peer_failure(error):
        reason = f"rank {world.rank}: another rank has ended; see the output of that rank"
    elif "Original Traceback" in str(error):  # of a worker process of the loader
        reason = str(error).rstrip().splitlines()[-1]
    elif isinstance(error, ValueError | OSError):
        reason = describe(error)
    else:  # not foreseen: where it was raised helps to find out why
        frames = traceback.extract_tb(error.__traceback__)
        reason = f"{describe(error)} ({frames[-1].filename}:{frames[-1].lineno})"
        if any("unet_2d_condition" in frame.filename for frame in frames):
            reason += f"; check unet/config.json of {args.model}"
    if newest is not None and str(newest) in reason:
        return ValueError(reason)
    return ValueError(f"{reason}; last checkpoint: {newest or 'none yet'}")
