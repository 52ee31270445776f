"""Opens what a run needs, and refuses what does not fit together before anything is trained."""

import math
import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from diffusers import UNet2DConditionModel

from cachetrain.checkpoints.export import check_exportable
from cachetrain.checkpoints.info import data_info
from cachetrain.checkpoints.save import FROZEN
from cachetrain.data.batching import Batches
from cachetrain.data.dataset import CachedPairs
from cachetrain.data.index import check_same_run, null_caption_path
from cachetrain.data.loader import make_loader
from cachetrain.data.ram import RamCache
from cachetrain.data.sidecar import read_sidecar
from cachetrain.diffusion.noise_schedulers import make_scheduler, objective_of
from cachetrain.log import warn
from cachetrain.modeling import load, trainable
from cachetrain.sampling.prompts import Prompts
from cachetrain.sampling.samples import Samples
from cachetrain.training.optim import state_bytes
from cachetrain.training.validation import Validation


def check_fit(index, config, args):
    """Refuses caches that do not fit a UNet of this config (dict), before it is loaded."""
    channels, width = config["in_channels"], load.text_width(config)
    for shape in index.shapes:
        if shape[0] != channels:
            raise ValueError(f"{args.train_data_dir[0]}: latents are {shape}, the UNet wants {channels} channels; "
                             "cache the images with this model's VAE")  # fmt: skip
    if index.text_width != width:
        raise ValueError(f"{args.train_data_dir[0]}: embeddings are {index.text_width} wide, the UNet wants "
                         f"{width}; cache the captions with this model")  # fmt: skip
    if load.has_text_projection(config) and index.text_settings.get("raw") is False:
        raise ValueError(f"{args.train_data_dir[0]}: captions were cached through a projection, the UNet has one; "
                         "cache them with create_t5cache_768.py --raw")  # fmt: skip
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


class Plan(NamedTuple):
    """Lengths in optimizer steps; steps_per_epoch and validation_steps are floats. peak_lr is the peak rate."""

    effective_batch: int
    steps_per_epoch: float
    max_steps: int
    warmup_steps: int
    decay_steps: int
    save_steps: int
    save_start: int
    validation_steps: float
    peak_lr: float

    def ends_epoch(self, step):
        """Whether the samples of an epoch came to their end within this step."""
        return int(step / self.steps_per_epoch) > int((step - 1) / self.steps_per_epoch)


def make_plan(args, num_visits, ranks):
    """Resolves epochs into steps, and what was not said into its default."""
    effective_batch = args.batch_size * args.gradient_accum * ranks
    per_epoch = num_visits / effective_batch
    max_steps = max(1, args.max_steps.resolve(per_epoch))
    # "Slightly longer" than the run, so that the rate ends above zero.
    decay_steps = args.lr_decay_steps.resolve(per_epoch) if args.lr_decay_steps else round(1.1 * max_steps)
    warmup_steps = args.warmup_steps.resolve(per_epoch) if args.warmup_steps else round(0.02 * decay_steps)
    return Plan(
        effective_batch, per_epoch, max_steps, 0 if args.scheduler == "constant" else warmup_steps, decay_steps,
        max(1, args.save_steps.resolve(per_epoch)), args.save_start.resolve(per_epoch),
        max(1, args.val_steps.resolve(per_epoch)) if args.val_steps else max(1.0, per_epoch),
        args.learning_rate * (math.sqrt(effective_batch) if args.scale_lr else 1.0),
    )  # fmt: skip


def check_start(args, index, model_dir, plan, start_step=0, frozen=False):
    """Refuses what cannot run, before anything big is loaded: widths that do not fit, flags that name nothing, no
    space for a checkpoint.

    Args:
        start_step: of a resumed run, after which it goes on.
        frozen: the run has a checkpoint whose frozen parts later ones link.
    """
    config = UNet2DConditionModel.load_config(load.component_dir(model_dir, "unet"))
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(config)
    check_fit(index, unet.config, args)
    trainable.apply(unet, args, args.seed, resumed=True)
    total, trained = 0, 0
    for parameter in unet.parameters():
        total, trained = total + parameter.numel(), trained + parameter.numel() * parameter.requires_grad
    size = 2 if args.precision == "bf16_pure" else 4
    needed = total * (size + (4 if args.ema_decay else 0)) + trained * state_bytes(args.optimizer, size)
    once = 0 if frozen else _frozen_bytes(model_dir)
    _check_space(Path(args.output_dir), needed + once, "a checkpoint")
    if args.ckpt_dir:
        _check_space(Path(args.ckpt_dir), total * 4, "its single file")
    saves = -(-(plan.max_steps - start_step) // plan.save_steps)
    saves = min(saves, args.keep_last + 1) if args.keep_last else saves
    free = shutil.disk_usage(args.output_dir).free
    if free < saves * needed + once:
        warn(f"{args.output_dir}: a checkpoint takes {needed / 2**30:.1f} GiB, and {saves} are planned; "
             f"{free / 2**30:.1f} GiB are free: --keep_last, or a higher --save_steps")  # fmt: skip


def _frozen_bytes(model_dir):
    return sum(path.stat().st_size for name in FROZEN for path in (model_dir / name).rglob("*") if path.is_file())


def _check_space(directory, needed, what):
    directory.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise ValueError(f"{directory}: {what} takes {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free; make "
                         "room, or choose another directory")  # fmt: skip


def open_unet(args, model_dir, num_shapes, device, checkpoint=None):
    """Loads the UNet, re-initialises and freezes what the flags say.

    Args:
        num_shapes: of different latents, each of which is a graph when compiling.
        checkpoint: to take the weights from, already trained; default: the model's.

    Returns:
        (UNet, table of what is trained).
    """
    dtype = torch.bfloat16 if args.precision == "bf16_pure" else torch.float32
    directory = checkpoint / "unet" if checkpoint else load.component_dir(model_dir, "unet")
    unet = load.load_unet(directory, dtype, args.seed)
    chosen = trainable.apply(unet, args, args.seed, resumed=checkpoint is not None)
    if args.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    torch.backends.cudnn.allow_tf32 = args.allow_tf32  # torch allows it in convolutions unless told otherwise
    torch.set_float32_matmul_precision("high" if args.allow_tf32 else "highest")
    if args.allow_tf32 and device.type != "cuda":
        warn("--allow_tf32 does nothing without CUDA")
    unet.to(device, memory_format=torch.channels_last if device.type == "cuda" else torch.preserve_format)
    if args.compile:
        # A graph for each latent size: inductor's symbolic shapes fail in the backward pass of masked attention.
        torch._dynamo.config.recompile_limit = max(8, 2 * num_shapes)
        unet.compile(fullgraph=True, dynamic=False)  # in place: names, saving and wrappers see the same module
    return unet, chosen


def open_scheduler(model_dir, objective, zero_terminal_snr=False):
    """The model's noise schedule, or that of --objective; a bare UNet has none and gets Stable Diffusion's."""
    own = load.load_scheduler(model_dir / "scheduler") if (model_dir / "scheduler").is_dir() else None
    if own is not None and not objective and not zero_terminal_snr:
        return own
    return make_scheduler(objective or (objective_of(own) if own else "epsilon"), own, zero_terminal_snr)


def check_export(args, model_dir, scheduler):
    """Refuses --ckpt_dir for a model that has no single-file form; returns lines on what such a file will lack."""
    return [f"--ckpt_dir: {note}" for note in check_exportable(model_dir, scheduler)[0]] if args.ckpt_dir else []


def open_pairs(args, index, objective, validates=False):
    """CachedPairs of an index: scaling factors from the caches, the null embedding from the data root.

    Args:
        validates: without dropout and flips, and with draws that are the same in runs of any seed.
    """
    metadata = index.image_header.metadata
    own = float(metadata.get("scaling_factor") or 0)
    scaling = args.vae_scaling_factor or own
    if own and not math.isclose(scaling, own, rel_tol=0.01) and not validates:
        warn(f"--vae_scaling_factor {scaling}: the VAE that made the caches has {own}; samples and checkpoints are "
             "decoded with that")  # fmt: skip
    if not scaling:
        raise ValueError("the image caches do not say their VAE's scaling_factor; pass --vae_scaling_factor")
    store = RamCache(index) if args.cache_in_ram else None
    bf16 = args.precision.startswith("bf16")
    return CachedPairs(
        index, 0 if validates else args.seed, None if validates else _null_embedding(args, index), scaling,
        float(metadata.get("shift_factor") or 0), args.text_scaling_factor, 0.0 if validates else args.cond_dropout,
        0.0 if validates else args.flip_p, objective == "flow", args.timestep_sampling, args.timestep_range,
        args.offset_noise, torch.bfloat16 if bf16 else torch.float32, bool(args.overfit), store,
    )  # fmt: skip


def _null_embedding(args, index):
    if not args.cond_dropout:
        return None
    path = null_caption_path(args.train_data_dir, args.txtcache_suffix)
    if path is None:
        raise ValueError(f"no _null_caption{args.txtcache_suffix} in {', '.join(args.train_data_dir)}; "
                         "run the text cache script, or pass --cond_dropout 0")  # fmt: skip
    tensors, header = read_sidecar(path)
    check_same_run(index.text_header, header, index.text_path(0), path)
    return tensors["emb"]


def open_loader(args, pairs, device, plan, world, start_step=0, visits=0):
    """Returns (DataLoader of finished batches, the Batches it follows).

    Args:
        start_step: of a resumed run, after which it goes on; visits: to samples until then.
    """
    strata = args.gradient_accum if args.timestep_sampling == "stratified" else 0
    first = -(-visits // (args.batch_size * world.ranks))
    end = first + (plan.max_steps - start_step) * args.gradient_accum
    batches = Batches(pairs.index, args.batch_size, args.seed, end, strata, world.rank, world.ranks, first)
    # A compiled UNet sees one text length, the longest: each other length would be another graph.
    multiple = -(-int(pairs.index.tokens.max()) // 8) * 8 if args.compile else 8
    loader = make_loader(pairs, batches, pairs.index.masked, args.num_workers, device.type == "cuda", multiple)
    return loader, batches


def coverage(index, plan, args, world):
    """One line on how often the run visits the samples, and which sizes are too rare to fill a batch in it."""
    visits = plan.max_steps * plan.effective_batch
    lines = [f"{visits / index.num_visits:.2f} epochs of {index.num_visits:,.0f} visits to {len(index):,} pairs"]
    for number, shape in enumerate(index.shapes):
        share = float(index.weights[index.shape_ids == number].sum(dtype=np.float64)) / index.num_visits
        fills = share * visits >= args.batch_size * world.ranks
        lines.append(f"{'x'.join(map(str, shape))}: {share:.1%}" + ("" if fills else ", NEVER FILLS A BATCH"))
    return "; ".join(lines)


def leftover(index, batches):
    """One line on what was not trained, at the end of a run."""
    waiting = ", ".join(f"{count} of {'x'.join(map(str, index.shapes[shape]))}"
                        for shape, count in sorted(batches.waiting.items()))  # fmt: skip
    never = int((~batches.seen & (index.weights > 0)).sum())
    return (f"coverage: {len(index) - never:,} of {len(index):,} pairs trained"
            + (f"; waiting for a full batch: {waiting}" if waiting else ""))  # fmt: skip


def open_samples(args, model_dir, scheduler, index, device):
    """Encodes the sample prompts, or returns None without any."""
    if not (source := args.sample_prompts or args.sample_prompt):
        return None
    defaults = Prompts(cfgs=tuple(args.sample_cfgs), num_inference_steps=args.sampler_steps,
                       generate_samples_every_n_steps=args.sample_steps)  # fmt: skip
    return Samples(model_dir, source, defaults, scheduler, data_info(index, args.text_scaling_factor), lambda: index,
                   device)  # fmt: skip


def open_validation(args, held_out, objective, plan, device, world):
    """What measures `val/loss`, or None without pairs to validate on."""
    if held_out is None:
        return None
    pairs = open_pairs(args, held_out, objective, validates=True)
    return Validation(pairs, args.batch_size, plan.validation_steps, args.use_snr, device, world, args.num_workers)


def is_out_of_memory(error):
    """Whether an exception says that a device or the host had no memory left."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def memory_advice(args, error):
    """What to change after running out of memory, most effective first."""
    advice = [f"--batch_size below {args.batch_size} (and --gradient_accum up by the same factor)"]
    advice += [] if args.gradient_checkpointing else ["--gradient_checkpointing"]
    advice += [] if args.cpu_offload or args.fsdp else ["--cpu_offload"]
    advice += ["--optimizer lion, with one state in place of two"] if args.optimizer != "lion" else []
    advice += [] if args.precision == "bf16_pure" else ["--precision bf16_pure"]
    return f"out of memory ({str(error).splitlines()[0]}); try " + ", ".join(advice)
