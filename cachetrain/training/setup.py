"""Opens what a run needs, and refuses what does not fit together before anything is trained."""

import sys
from typing import NamedTuple

import torch

from cachetrain.cli import Steps
from cachetrain.modeling import load
from cachetrain.modeling.schedulers import make_scheduler, objective_of
from cachetrain.sidecar import read_sidecar
from cachetrain.training.data import Batches, CachedPairs, make_loader
from cachetrain.training.index import PairIndex, check_same_run, null_caption_path
from cachetrain.training.samples import Samples, read_prompts


def open_index(args):
    """Lists the pairs and says what cannot be verified or is left out."""
    index = PairIndex(args.train_data_dir, args.imgcache_suffix, args.txtcache_suffix)
    if index.num_foreign:
        warn(f"{index.num_foreign} of {len(index)} pairs have caches without a header: they cannot be verified")
    if index.unpaired:
        warn(f"{index.unpaired} sidecars have no partner ({args.imgcache_suffix} + {args.txtcache_suffix}): not used")
    return index


def check_fit(index, unet, args):
    """Refuses caches that do not fit the UNet, before anything is trained."""
    channels = unet.config.in_channels
    for shape in index.shapes:
        if shape[0] != channels:
            raise ValueError(f"{args.train_data_dir[0]}: latents are {shape}, the UNet wants {channels} channels; "
                             "cache the images with this model's VAE")  # fmt: skip
    if index.text_width != unet.config.cross_attention_dim:
        raise ValueError(f"{args.train_data_dir[0]}: embeddings are {index.text_width} wide, the UNet wants "
                         f"{unet.config.cross_attention_dim}; cache the captions with this model")  # fmt: skip
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
    """Lengths in optimizer steps; steps_per_epoch is a float."""

    steps_per_epoch: float
    max_steps: int
    warmup_steps: int
    decay_steps: int
    save_steps: int


def make_plan(args, num_samples):
    """Resolves epochs into steps, and what was not said into its default."""
    per_epoch = num_samples / (args.batch_size * args.gradient_accum)
    max_steps = Steps(f"{args.max_epochs}e" if args.max_epochs else args.max_steps).resolve(per_epoch)
    # "Slightly longer" than the run, so that the rate ends above zero.
    decay_steps = args.lr_decay_steps.resolve(per_epoch) if args.lr_decay_steps else round(1.1 * max_steps)
    warmup_steps = args.warmup_steps.resolve(per_epoch) if args.warmup_steps else round(0.02 * decay_steps)
    return Plan(per_epoch, max_steps, warmup_steps, decay_steps, max(1, args.save_steps.resolve(per_epoch)))


def open_scheduler(model_dir, objective, zero_terminal_snr=False):
    """The model's noise schedule, or that of --objective; a bare UNet has none and gets Stable Diffusion's."""
    own = load.load_scheduler(model_dir / "scheduler") if (model_dir / "scheduler").is_dir() else None
    if own is not None and not objective and not zero_terminal_snr:
        return own
    return make_scheduler(objective or (objective_of(own) if own else "epsilon"), own, zero_terminal_snr)


def open_loader(args, index, device, objective, max_steps):
    """The loader of finished batches: scaling factors from the caches, the null embedding from the data root."""
    metadata = index.image_header.metadata
    scaling = args.vae_scaling_factor or float(metadata.get("scaling_factor") or 0)
    if not scaling:
        raise ValueError("the image caches do not say their VAE's scaling_factor; pass --vae_scaling_factor")
    null_path = null_caption_path(args.train_data_dir, args.txtcache_suffix)
    if null_path is None and args.cond_dropout:
        raise ValueError(f"no _null_caption{args.txtcache_suffix} in {args.train_data_dir}; "
                         "run the text cache script, or pass --cond_dropout 0")  # fmt: skip
    null = None
    if null_path:
        tensors, header = read_sidecar(null_path)
        check_same_run(index.text_header, header, index.text_path(0), null_path)
        null = tensors["emb"].float()
    dataset = CachedPairs(
        index, args.seed, null, scaling, float(metadata.get("shift_factor") or 0), args.text_scaling_factor,
        args.cond_dropout, args.flip_p, objective == "flow", args.timestep_sampling, args.timestep_range,
        args.offset_noise,
    )  # fmt: skip
    strata = args.gradient_accum if args.timestep_sampling == "stratified" else 0
    batches = Batches(index, args.batch_size, args.seed, max_steps * args.gradient_accum, strata)
    return make_loader(dataset, batches, index.masked, args.num_workers, device.type == "cuda")


def open_samples(args, model_dir, scheduler, index, device):
    """Encodes the sample prompts, or returns None without any."""
    prompts = read_prompts(args.sample_prompts) if args.sample_prompts else args.sample_prompt
    if not prompts:
        return None
    return Samples(
        model_dir, prompts, args.sample_cfgs, scheduler, index, args.text_scaling_factor, args.sampler_steps, device
    )


def autocast_for(device, precision):
    """Returns a function that opens the autocast context of a precision."""
    return lambda: torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def warn(message):
    print(f"warning: {message}", file=sys.stderr)
