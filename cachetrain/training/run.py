"""A run, opened: what it trains, on what, with what."""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from cachetrain.checkpoints.info import data_info
from cachetrain.checkpoints.resume import run_state
from cachetrain.data.batching import BatchSampler
from cachetrain.data.dataset import CachedPairs, Draws, LatentScaling
from cachetrain.data.index import PairIndex, check_same_run, null_caption_path, open_index
from cachetrain.data.loader import make_loader
from cachetrain.data.ram import RamCache
from cachetrain.data.sidecar import read_sidecar
from cachetrain.diffusion.noise_schedulers import make_scheduler, objective_of
from cachetrain.diffusion.objective import noise_schedule
from cachetrain.distributed import World, wrap
from cachetrain.log import warn
from cachetrain.modeling import load, trainable
from cachetrain.modeling.conditioning import Conditioning
from cachetrain.modeling.precision import autocast_for
from cachetrain.sampling.prompts import Prompts
from cachetrain.sampling.samples import SampleImages
from cachetrain.training.ema import Ema
from cachetrain.training.lr_schedule import lr_factor
from cachetrain.training.optim import loss_scaler, make_optimizer
from cachetrain.training.plan import Plan, coverage, make_plan
from cachetrain.training.validation import Validation


@dataclass(frozen=True)
class Run:
    """What does not change while a run lasts.

    Attributes:
        args: the parsed command line.
        world: the ranks; device: this rank's.
        output_dir: of the run; its name is the run's name.
        model_dir: pipeline directory, or a bare UNet, that the run starts from.
        index: the pairs trained on; held_out: those validated on, or None.
        noise_scheduler: diffusers scheduler of the objective, saved with each checkpoint.
        objective: "epsilon", "v_prediction" or "flow".
        alphas_cumprod: float32 [T] on the device, None for flow matching.
        plan: lengths in steps.
        conditioning: how captions condition the UNet.
        autocast: function that opens the autocast context of --precision.
    """

    args: Namespace
    world: World
    device: torch.device
    output_dir: Path
    model_dir: Path
    index: PairIndex
    held_out: PairIndex | None
    noise_scheduler: object
    objective: str
    alphas_cumprod: torch.Tensor | None
    plan: Plan
    conditioning: Conditioning
    autocast: Callable

    def learning_rate(self, step: int) -> float:
        """The learning rate of an optimizer step, from 1."""
        plan, args = self.plan, self.args
        return plan.peak_lr * lr_factor(
            args.scheduler,
            step - 1,
            plan.warmup_steps,
            plan.decay_steps,
            min_lr_rate=args.min_lr_rate,
            peak_lr=plan.peak_lr,
        )

    def data_info(self) -> dict:
        """What cachetrain.json of its checkpoints says besides the step."""
        return {"objective": self.objective, **data_info(self.index, self.args.text_scaling_factor)}

    def describe(self, resumed) -> list[str]:
        """Lines on what the run is going to do. `resumed`: Resumed."""
        args, ranks = self.args, self.world.ranks
        line = f"{self.plan.max_steps} steps of {args.batch_size} x {args.gradient_accum} x {ranks} = "
        line += f"{self.plan.effective_batch}; {self.objective}; {args.precision} on {self.device}"
        if resumed.path:
            line += f"; resumes after step {resumed.step} of {resumed.path}"
        return [coverage(self.index, self.plan, args.batch_size * ranks), line]


class TrainState(NamedTuple):
    """What training changes.

    Attributes:
        unet: the module itself; model: what the loop calls, the UNet or its distributed wrapper.
        trained: the parameters that are trained, in the optimizer's order.
        ema: Ema, or None.
    """

    unet: torch.nn.Module
    model: torch.nn.Module
    trained: list[torch.nn.Parameter]
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    ema: Ema | None

    def to_save(self, step: int, num_trained: int, settings: dict, statistics, validation) -> dict:
        """What a checkpoint holds besides weights and averages.

        Args:
            step: optimizer steps done; num_trained: samples trained on until then.
            settings: of resume.settings_of.
            statistics, validation: of the run; validation may be None.
        """
        return run_state(
            step,
            num_trained,
            settings,
            unet=self.unet,
            optimizer=self.optimizer,
            scaler=self.scaler,
            statistics=statistics,
            validation=validation,
        )


def open_run(args: Namespace, world: World) -> Run:
    """Lists the data and reads the model's settings; loads no weights.

    Raises:
        ValueError, OSError: there are no pairs, or caches or model cannot be used.
    """
    index, held_out = open_index(args, world)
    model_dir = load.resolve_model(args.model, args.revision)
    noise_scheduler = open_noise_scheduler(model_dir, args.objective, args.zero_terminal_snr)
    dtype = torch.bfloat16 if args.precision.startswith("bf16") else torch.float32
    return Run(
        args=args,
        world=world,
        device=world.device,
        output_dir=Path(args.output_dir),
        model_dir=model_dir,
        index=index,
        held_out=held_out,
        noise_scheduler=noise_scheduler,
        objective=objective_of(noise_scheduler),
        alphas_cumprod=noise_schedule(noise_scheduler, world.device),
        plan=make_plan(args, index.samples_per_epoch, world.ranks),
        conditioning=Conditioning(index.text_kind, args.text_scaling_factor, dtype),
        autocast=autocast_for(world.device, args.precision),
    )


def open_noise_scheduler(model_dir, objective, zero_terminal_snr=False):
    """The model's noise scheduler, or that of --objective; a bare UNet has none and gets Stable Diffusion's."""
    of_model = load.load_scheduler(model_dir / "scheduler") if (model_dir / "scheduler").is_dir() else None
    if of_model is not None and not objective and not zero_terminal_snr:
        return of_model
    objective = objective or (objective_of(of_model) if of_model else "epsilon")
    return make_scheduler(objective, of_model, zero_terminal_snr)


def open_train_state(run: Run, resumed):
    """Loads the UNet and what trains it, and puts back what a checkpoint holds of both.

    Args:
        resumed: Resumed.

    Returns:
        (TrainState, table of what is trained).
    """
    args = run.args
    unet, chosen = open_unet(run, resumed.path)
    model = wrap(unet, run.world, args.fsdp)
    trained = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    optimizer = make_optimizer(
        args.optimizer, trained, run.plan.peak_lr, args.betas, args.weight_decay, cpu_offload=args.cpu_offload
    )
    ema = None
    if args.ema_decay:
        offloaded = ("cpu", optimizer.cpu_parameters) if args.cpu_offload else ()
        ema = Ema(trained, args.ema_decay, *offloaded)
    scaler = loss_scaler(run.device, args.precision)
    resumed.restore(unet, trained, optimizer, ema, scaler)
    return TrainState(unet, model, trained, optimizer, scaler, ema), chosen


def restore_logs(resumed, statistics, validation) -> None:
    """Puts back what logs and validation had counted when the checkpoint was saved, if there is one."""
    if not resumed.path:
        return
    statistics.load_state_dict(resumed.state["statistics"])
    if validation and resumed.state["validation"]:
        validation.load_state_dict(resumed.state["validation"])


def open_unet(run: Run, checkpoint: Path | None = None):
    """Loads the UNet, re-initialises and freezes what the flags say.

    Args:
        checkpoint: to take the weights from, already trained; default: the model's.

    Returns:
        (UNet, table of what is trained).
    """
    args, device = run.args, run.device
    dtype = torch.bfloat16 if args.precision == "bf16_pure" else torch.float32
    directory = checkpoint / "unet" if checkpoint else load.component_dir(run.model_dir, "unet")
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
        torch._dynamo.config.recompile_limit = max(8, 2 * len(run.index.shapes))
        unet.compile(fullgraph=True, dynamic=False)  # in place: names, saving and wrappers see the same module
    return unet, chosen


def open_pairs(run: Run) -> CachedPairs:
    """The samples that are trained on: scaling factors from the caches, the null condition from the data root."""
    args, index = run.args, run.index
    draws = Draws(
        seed=args.seed,
        cond_dropout=args.cond_dropout,
        flip_p=args.flip_p,
        continuous=run.objective == "flow",
        timestep_sampling=args.timestep_sampling,
        timestep_range=args.timestep_range,
        offset_noise=args.offset_noise,
        fixed=bool(args.overfit),
    )
    sidecars = RamCache(index) if args.cache_in_ram else None
    return CachedPairs(
        index, _latent_scaling(run, warns=True), run.conditioning, draws, _null_condition(run), sidecars
    )


def _latent_scaling(run, warns):
    """Of the caches' VAE, or of the flag. `warns`: where the two differ."""
    metadata = run.index.image_header.metadata
    of_caches = float(metadata.get("scaling_factor") or 0)
    scaling = run.args.vae_scaling_factor or of_caches
    if warns and of_caches and not math.isclose(scaling, of_caches, rel_tol=0.01):
        warn(
            f"--vae_scaling_factor {scaling}: the VAE that made the caches has {of_caches}; samples and checkpoints "
            "are decoded with that"
        )
    if not scaling:
        raise ValueError("the image caches do not say their VAE's scaling_factor; pass --vae_scaling_factor")
    return LatentScaling(scaling, float(metadata.get("shift_factor") or 0))


def _null_condition(run):
    args, index = run.args, run.index
    if not args.cond_dropout:
        return None
    path = null_caption_path(args.train_data_dir, args.txtcache_suffix)
    if path is None:
        raise ValueError(
            f"no _null_caption{args.txtcache_suffix} in {', '.join(args.train_data_dir)}; run the text cache script, "
            "or pass --cond_dropout 0"
        )
    tensors, header = read_sidecar(path)
    check_same_run(index.text_header, header, index.text_path(0), path)
    return run.conditioning.of_caption(tensors)


def open_loader(run: Run, pairs: CachedPairs, start_step: int = 0, num_seen: int = 0):
    """Opens the loader of finished batches.

    Args:
        start_step: optimizer step that a resumed run starts after.
        num_seen: samples trained on until then.

    Returns:
        (DataLoader, the BatchSampler it follows).
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
    )
    # A compiled UNet sees one text length, the longest: each other length would be another graph.
    multiple = -(-int(run.index.tokens.max()) // 8) * 8 if args.compile else 8
    return make_loader(pairs, batch_sampler, args.num_workers, run.device.type == "cuda", multiple), batch_sampler


def open_samples(run: Run) -> SampleImages | None:
    """Encodes the sample prompts, or returns None without any."""
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
    """What measures `val/loss`, or None without pairs to validate on: no dropout, no flips, noise that is the same in
    runs of any seed."""
    if run.held_out is None:
        return None
    args, index = run.args, run.held_out
    draws = Draws(
        continuous=run.objective == "flow",
        timestep_sampling=args.timestep_sampling,
        timestep_range=args.timestep_range,
        offset_noise=args.offset_noise,
        fixed=bool(args.overfit),
    )
    sidecars = RamCache(index) if args.cache_in_ram else None
    pairs = CachedPairs(index, _latent_scaling(run, warns=False), run.conditioning, draws, sidecars=sidecars)
    return Validation(run, pairs)
