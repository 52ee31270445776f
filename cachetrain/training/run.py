"""Sets up a run: settings, model, optimizer, data, samples and validation."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from cachetrain.checkpoints.adapters import base_info
from cachetrain.checkpoints.info import data_info
from cachetrain.checkpoints.resume import run_state
from cachetrain.data import rng
from cachetrain.data.batching import BatchSampler
from cachetrain.data.dataset import CachedPairs, Draws
from cachetrain.data.index import PairIndex
from cachetrain.data.loader import make_loader
from cachetrain.data.pairs import null_caption_path
from cachetrain.data.ram import RamCache
from cachetrain.data.sidecar import read_sidecar
from cachetrain.data.sources import Sources
from cachetrain.data.split import open_index
from cachetrain.diffusion.noise_schedulers import make_scheduler, objective_of
from cachetrain.diffusion.objective import noise_schedule
from cachetrain.distributed import World, gradient_sync, wrap
from cachetrain.log import counted, info, warn
from cachetrain.modeling import load, lora, normalisation, trainable
from cachetrain.modeling.conditioning import Conditioning
from cachetrain.modeling.files import read_config
from cachetrain.modeling.normalisation import LatentScaling
from cachetrain.modeling.precision import autocast_for, cast_weights
from cachetrain.sampling.prompts import Prompts
from cachetrain.sampling.samples import SampleImages
from cachetrain.training.ema import Ema
from cachetrain.training.lr_schedule import lr_factor
from cachetrain.training.optim import loss_scaler, make_optimizer
from cachetrain.training.plan import Plan, make_plan, planned_coverage
from cachetrain.training.validation import Validation


@dataclass(frozen=True)
class Run:
    """Everything about a run that does not change during training.

    Attributes:
        args: the parsed command line.
        world: the ranks.
        device: torch.device of this rank.
        output_dir: of the run; its name is the run's name.
        model_dir: pipeline directory, or a bare UNet, that the run starts from.
        index: the training pairs.
        held_out: the validation pairs, or None.
        sources: where the pairs come from.
        noise_scheduler: diffusers scheduler of the objective, saved with each checkpoint.
        objective: "epsilon", "v_prediction" or "flow".
        alphas_cumprod: float32 [T] on the device, None for flow matching.
        plan: lengths in steps.
        conditioning: how captions condition the UNet.
        autocast: function that returns the autocast context of --precision.
    """

    args: Namespace
    world: World
    device: torch.device
    output_dir: Path
    model_dir: Path
    index: PairIndex
    held_out: PairIndex | None
    sources: Sources
    noise_scheduler: object
    objective: str
    alphas_cumprod: torch.Tensor | None
    plan: Plan
    conditioning: Conditioning
    autocast: Callable

    @property
    def weighted(self) -> bool:
        """Whether what is trained is another loss than the squared error, which is then logged beside it."""
        args = self.args
        return bool(args.use_snr or args.loss) or args.unmasked_weight is not None

    def learning_rate(self, step: int) -> float:
        """Returns the learning rate of optimizer step `step`, from 1."""
        plan, args = self.plan, self.args
        return plan.peak_lr * lr_factor(
            args.scheduler,
            step - 1,
            plan.warmup_steps,
            plan.decay_steps,
            min_lr_rate=args.min_lr_rate,
            peak_lr=plan.peak_lr,
            num_cycles=args.num_cycles or 0.5,
        )

    def latent_scaling(self, warn_if_different: bool = False) -> LatentScaling:
        """Returns that of --vae_scaling_factor, or of the caches; `warn_if_different`: warn if the two differ.

        Raises:
            ValueError: neither the flag nor the caches have one, or it is for another number of channels.
        """
        index, factor = self.index, self.args.vae_scaling_factor
        scaling = normalisation.of_header(index.image_header.metadata, index.image_path(0))
        if not factor and not scaling:
            raise ValueError(
                f"the image caches do not record the scaling_factor of their VAE; {normalisation.HOW_TO_SAY}"
            )
        if scaling:
            scaling.check_channels(index.shapes[0][0], index.image_path(0))
        if not factor:
            return scaling
        if scaling and warn_if_different and not scaling.has_factor(factor):
            cached = scaling.header_fields()["scaling_factor"]
            warn(
                f"--vae_scaling_factor {factor}: the VAE that made the caches has {cached:.40}, with which other "
                "programs decode the checkpoints; omit the flag to train with that"
            )
        return LatentScaling(factor, scaling.shift_factor if scaling else 0.0)

    def data_info(self) -> dict:
        """Returns the content of cachetrain.json in the run's checkpoints, except the step."""
        info = {"objective": self.objective, **data_info(self.index, self.args.text_scaling_factor)}
        info["latents"] = self.latent_scaling().as_json()
        if self.args.lora_rank:
            info["base"] = base_info(self.model_dir, self.args.model, self.args.revision)
        return info

    def describe(self, resumed) -> list[str]:
        """Returns lines that describe the run at its start. `resumed`: Resumed."""
        args, ranks = self.args, self.world.ranks
        line = f"{counted(self.plan.max_steps, 'step')} of {args.batch_size} x {args.gradient_accum} x {ranks} = "
        weights = {False: "", True: f" with Min-SNR gamma {args.noise_gamma:g}", "debiased": " with debiased weights"}
        objective = self.objective + weights[args.use_snr] + (", Huber loss" if args.loss else "")
        line += f"{counted(self.plan.effective_batch, 'sample')}; {objective}; {args.precision} on {self.device}"
        if resumed.path:
            line += f"; resumes from {resumed.path}, after step {resumed.step}"
        return [planned_coverage(self.index, self.plan, args.batch_size * ranks), line]


class TrainState(NamedTuple):
    """Everything that training changes.

    Attributes:
        unet: UNet2DConditionModel.
        model: the UNet or its distributed wrapper; the training loop calls it.
        trained: the trained parameters, in the optimizer's order.
        optimizer: of optim.make_optimizer.
        scaler: of optim.loss_scaler.
        ema: moving average of the weights, or None.
    """

    unet: torch.nn.Module
    model: torch.nn.Module
    trained: list[torch.nn.Parameter]
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    ema: Ema | None

    def to_save(self, run: Run, step: int, num_trained: int, settings: dict, statistics, validation) -> dict:
        """Returns what a checkpoint holds besides weights and averages.

        Args:
            step: optimizer steps done.
            num_trained: samples trained on so far.
            settings: of resume.settings_of.
            statistics: Statistics.
            validation: Validation or None.
        """
        return run_state(
            step,
            num_trained,
            settings,
            run.sources.pinned,
            unet=self.unet,
            optimizer=self.optimizer,
            scaler=self.scaler,
            statistics=statistics,
            validation=validation,
        )


def open_run(args: Namespace, world: World, saved: Mapping | None = None) -> Run:
    """Lists the data and reads the model's configuration; loads no weights. Resolves in `args` what the flags leave
    open: --use_snr auto and the precision.

    Args:
        saved: state of the checkpoint that the run resumes from, as of resume.run_state; None: a new run.

    Raises:
        ValueError, OSError: there are no pairs, or the caches or the model cannot be used.
    """
    saved_settings = (saved or {}).get("settings", {})
    index, held_out, sources = open_index(args, world, (saved or {}).get("shards"), args.save_index)
    model_dir = load.resolve_model(args.model, args.revision)
    noise_scheduler = open_noise_scheduler(model_dir, args.objective, args.zero_terminal_snr)
    if args.use_snr == "auto":
        args.use_snr = saved_settings.get("use_snr", objective_of(noise_scheduler) != "flow")
    if args.timestep_shift and objective_of(noise_scheduler) != "flow":
        raise ValueError(
            f"--timestep_shift {args.timestep_shift:g}: is for flow matching, but the objective is "
            f"{objective_of(noise_scheduler)}; omit it, or pass --objective flow"
        )
    if (args.sample_prompt or args.sample_prompts) and not (model_dir / "vae").is_dir():
        raise ValueError(
            f"{model_dir}: a UNet without a VAE cannot draw samples; pass a pipeline directory as --model, or omit "
            "--sample_prompt and --sample_prompts"
        )
    if args.precision is None:
        args.precision = _default_precision(world.device, saved_settings.get("precision"))
    dtype = torch.bfloat16 if args.precision.startswith("bf16") else torch.float32
    return Run(
        args=args,
        world=world,
        device=world.device,
        output_dir=Path(args.output_dir),
        model_dir=model_dir,
        index=index,
        held_out=held_out,
        sources=sources,
        noise_scheduler=noise_scheduler,
        objective=objective_of(noise_scheduler),
        alphas_cumprod=noise_schedule(noise_scheduler, world.device),
        plan=make_plan(args, index.samples_per_epoch, world.ranks),
        conditioning=Conditioning.for_unet(
            index.text_kind,
            read_config(load.component_dir(model_dir, "unet")),
            scale=args.text_scaling_factor,
            dtype=dtype,
            time_ids=args.time_ids and tuple(args.time_ids),
        ),
        autocast=autocast_for(world.device, args.precision),
    )


def _default_precision(device, saved):
    """That of the checkpoint, if it was a default; else bf16 on a GPU, fp32 on a CPU."""
    if saved in ("bf16", "fp32"):
        return saved
    if device.type != "cpu":
        return "bf16"
    info("precision: fp32, since bf16 is up to 3 times slower on CPUs without instructions for it (--precision bf16)")
    return "fp32"


def open_noise_scheduler(model_dir: Path, objective: str | None, zero_terminal_snr: bool = False):
    """Makes the noise scheduler, a diffusers scheduler: the model's, changed as far as the flags ask for.

    A bare UNet has no scheduler and gets Stable Diffusion's.
    """
    model_scheduler = load.load_scheduler(model_dir / "scheduler") if (model_dir / "scheduler").is_dir() else None
    objective = objective or (objective_of(model_scheduler) if model_scheduler else "epsilon")
    return make_scheduler(objective, model_scheduler, zero_terminal_snr)


def open_train_state(run: Run, resumed):
    """Loads the UNet, makes its optimizer, loss scaler and EMA, and restores them from the checkpoint, if any.

    Args:
        run: Run.
        resumed: Resumed.

    Returns:
        (TrainState, table of the trained parts).
    """
    args = run.args
    unet, trained_table = open_unet(run, resumed.path)
    model = wrap(unet, run.world, args.fsdp)
    named = {name: parameter for name, parameter in unet.named_parameters() if parameter.requires_grad}
    trained = list(named.values())
    optimizer = make_optimizer(
        args.optimizer,
        trained,
        run.plan.peak_lr,
        args.betas,
        args.weight_decay,
        cpu_offload=args.cpu_offload,
        gradient_release=args.gradient_release,
        names=list(named),
    )
    ema = None
    if args.ema_decay:
        offload = {"device": "cpu", "sources": optimizer.cpu_parameters} if args.cpu_offload else {}
        ema = Ema(trained, args.ema_decay, **offload)
    scaler = loss_scaler(run.device, args.precision)
    resumed.restore(unet, trained, optimizer, ema, scaler)
    return TrainState(unet, model, trained, optimizer, scaler, ema), trained_table


@contextmanager
def micro_step(run: Run, model: torch.nn.Module, step: int, number: int) -> Iterator[None]:
    """Around a forward and backward pass: reduces the gradients over the ranks in the last one of a step, and seeds
    torch's global generators, from which only --lora_dropout draws.

    Args:
        run: Run.
        model: the UNet or its distributed wrapper.
        step: optimizer step, from 1.
        number: of the pass in the step, from 1.
    """
    if run.args.lora_dropout:
        generator = rng.generator(run.args.seed, step, run.world.rank, rng.ADAPTER_DROPOUT, number)
        torch.manual_seed(int(generator.integers(2**63)))
    with gradient_sync(model, enabled=number == run.args.gradient_accum):
        yield


def restore_logs(resumed, statistics, validation) -> None:
    """Restores the counters of logs and validation from the checkpoint, if any."""
    if not resumed.path:
        return
    statistics.load_state_dict(resumed.state["statistics"])
    if validation and resumed.state["validation"]:
        validation.load_state_dict(resumed.state["validation"])


def open_unet(run: Run, checkpoint: Path | None = None):
    """Loads the UNet, re-initializes and freezes its parts or adds an adapter, as the flags say, and moves it to the
    device.

    Args:
        run: Run.
        checkpoint: to load the weights from, for a resumed run; default: the model of the run.

    Returns:
        (UNet, table of the trained parts).
    """
    args, device = run.args, run.device
    dtype = torch.bfloat16 if args.precision == "bf16_pure" and not args.lora_rank else torch.float32
    from_checkpoint = checkpoint and not args.lora_rank
    directory = checkpoint / "unet" if from_checkpoint else load.component_dir(run.model_dir, "unet")
    if args.reinit_unet and not checkpoint:  # needs no weights
        unet = load.fresh_unet(read_config(directory), args.seed).to(dtype)
    else:
        unet = load.load_unet(directory, dtype)
    trained_table = trainable.apply(unet, args, args.seed, resumed=checkpoint is not None)
    if args.lora_rank:
        cast_weights(unet, args.precision)
        if checkpoint:
            lora.load(unet, checkpoint / lora.FILE)
    if args.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    torch.backends.cudnn.allow_tf32 = args.allow_tf32  # torch's default for convolutions is True
    torch.set_float32_matmul_precision("high" if args.allow_tf32 else "highest")
    if args.allow_tf32 and device.type != "cuda":
        warn("--allow_tf32 does nothing without CUDA")
    unet.to(device, memory_format=torch.channels_last if device.type == "cuda" else torch.preserve_format)
    if args.compile:
        # One graph per latent size: inductor's symbolic shapes fail in the backward pass of masked attention.
        torch._dynamo.config.recompile_limit = max(8, 2 * len(run.index.shapes))
        unet.compile(fullgraph=True, dynamic=False)  # in place: parameter names do not change
    return unet, trained_table


def open_pairs(run: Run) -> CachedPairs:
    """Opens the training samples; the latents' scaling factor is read from the caches, unless a flag gives it."""
    args, index = run.args, run.index
    draws = Draws(
        seed=args.seed,
        cond_dropout=args.cond_dropout,
        flip_p=args.flip_p,
        continuous=run.objective == "flow",
        timestep_sampling=args.timestep_sampling,
        logit_mean=args.logit_mean or 0.0,
        logit_std=args.logit_std or 1.0,
        timestep_shift=args.timestep_shift or 1.0,
        timestep_range=args.timestep_range,
        offset_noise=args.offset_noise,
        fixed=bool(args.overfit),
        caption_weights=_caption_weights(args, index),
    )
    for path, header in index.image_headers.items():
        if args.flip_p and "latent_flip" not in header.shapes:
            raise ValueError(f"{path}: has no latent_flip, which --flip_p needs; cache the images with --flip")
    return CachedPairs(
        index,
        run.latent_scaling(warn_if_different=True),
        run.conditioning,
        draws,
        _null_condition(run),
        RamCache(index) if args.cache_in_ram else None,
        masked=args.unmasked_weight is not None,
    )


def _caption_weights(args, index):
    """{source: weight} of --caption_weights."""
    weights = dict(args.caption_weights or ())
    unknown = sorted(weights.keys() - set(index.caption_sources))
    if unknown and index.caption_sources:
        raise ValueError(
            f"--caption_weights {unknown[0]}: variants of captions come from {', '.join(index.caption_sources)}; use "
            "these suffixes, or cache the captions with --captions files"
        )
    if unknown:
        raise ValueError(
            "--caption_weights: no caption has variants; cache the captions with --captions files, or omit the flag"
        )
    return weights


def _null_condition(run):
    args, index = run.args, run.index
    if not args.cond_dropout:
        return None
    path = null_caption_path(run.sources.null_directories(), args.txtcache_suffix)
    if path is None:
        raise ValueError(
            f"no _null_caption{args.txtcache_suffix} in {', '.join(args.train_data_dir)}; run the text cache script, "
            "or pass --cond_dropout 0"
        )
    tensors, header = read_sidecar(path)
    index.check_null(path, header)
    return run.conditioning.of_caption(tensors)


def open_loader(run: Run, pairs: CachedPairs, start_step: int = 0, num_seen: int = 0):
    """Opens the loader of training batches.

    Args:
        run: Run.
        pairs: of `open_pairs`.
        start_step: optimizer steps done, in a resumed run.
        num_seen: samples trained on so far, in a resumed run.

    Returns:
        (DataLoader, its BatchSampler).
    """
    args, world = run.args, run.world
    first = -(-num_seen // (args.batch_size * world.ranks))
    batch_sampler = BatchSampler(
        run.index,
        args.batch_size,
        args.seed,
        first + (run.plan.max_steps - start_step) * args.gradient_accum,
        strata=args.gradient_accum if args.timestep_sampling == "stratified" else 0,
        rank=world.rank,
        ranks=world.ranks,
        first=first,
        window=args.shuffle_window,
        fetcher=run.sources.fetcher,
    )
    # With --compile, texts are padded to the longest: each other length would compile another graph.
    multiple = -(-run.index.max_tokens // 8) * 8 if args.compile else 8
    return make_loader(pairs, batch_sampler, args.num_workers, run.device.type == "cuda", multiple), batch_sampler


def open_samples(run: Run) -> SampleImages | None:
    """Encodes the sample prompts; returns None if there are none."""
    args = run.args
    if not (source := args.sample_prompts or args.sample_prompt):
        return None
    defaults = Prompts(
        cfgs=tuple(args.sample_cfgs),
        num_inference_steps=args.sampler_steps,
        generate_samples_every_n_steps=args.sample_steps,
    )
    return SampleImages(
        run.model_dir,
        source,
        defaults,
        run.noise_scheduler,
        run.data_info(),
        device=run.device,
        open_index=lambda: run.index,
    )


def open_validation(run: Run) -> Validation | None:
    """Opens the validation: all timesteps, plain noise that training never draws, no dropout and no flips, the first
    crop, all sizes, and of captions in variants the first, which is the caption as written.

    No flag that only says how to train changes what is measured, except the weights of the loss.

    Returns:
        None if there are no validation pairs.
    """
    if run.held_out is None:
        return None
    args, index = run.args, run.held_out
    draws = Draws(continuous=run.objective == "flow", crop=False, noise_purpose=rng.VALIDATION, variants=False)
    sidecars = RamCache(index) if args.cache_in_ram else None
    scaling = run.latent_scaling()
    masked = args.unmasked_weight is not None
    pairs = CachedPairs(index, scaling, run.conditioning, draws, sidecars=sidecars, masked=masked)
    return Validation(run, pairs)
