"""The trainer's command line. Imports no torch."""

import argparse
import os
from importlib.util import find_spec

from cachetrain import cli
from cachetrain.data.sidecar import SUFFIXES
from cachetrain.modeling import trainable
from cachetrain.training.lr_schedule import OPTIMIZERS, SCHEDULES, check_optimizer, default_betas

GROUPS = tuple(range(1, 16))  # of the logs


def parse_args(doc, argv=None):
    """Parses the trainer's flags.

    Raises:
        SystemExit: a flag is wrong, or cannot apply to this run.
    """
    parser = cli.parser(doc)
    _data_arguments(parser.add_argument_group("data"))
    _objective_arguments(parser.add_argument_group("objective"))
    trainable.add_arguments(parser.add_argument_group("what is trained (default: all of the UNet)"))
    _optimization_arguments(parser.add_argument_group("optimisation"))
    _speed_arguments(parser.add_argument_group("precision, memory and speed"))
    _output_arguments(parser.add_argument_group("output"))
    _sample_arguments(parser.add_argument_group("samples and validation"))
    args = parser.parse_args(argv)
    for message in _conflicts(args):
        parser.error(message)
    _fill_in(args)
    try:
        check_optimizer(args.optimizer, args.learning_rate, args.betas, args.precision == "bf16_pure")
    except ValueError as error:
        parser.error(str(error))
    return args


def _conflicts(args):
    """Yields a message for each flag that cannot apply beside the others."""
    if args.noise_gamma is not None and not args.use_snr:
        yield "--noise_gamma needs --use_snr"
    if args.scheduler.startswith("constant") and args.lr_decay_steps is not None:
        yield f"--lr_decay_steps does nothing with --scheduler {args.scheduler}"
    if args.scheduler == "constant" and args.warmup_steps is not None:
        yield "--scheduler constant has no warm-up; use constant_with_warmup"
    if args.scheduler != "cosine_with_min_lr" and args.min_lr_rate is not None:
        yield "--min_lr_rate needs --scheduler cosine_with_min_lr"
    if args.scale_lr and args.optimizer == "prodigy":
        yield "--scale_lr: prodigy finds the rate itself"
    if not (args.sample_prompt or args.sample_prompts) and args.sample_cfgs is not None:
        yield "--sample_cfgs needs --sample_prompt or --sample_prompts"
    if not 0 <= args.timestep_range[0] < args.timestep_range[1] <= 1000:
        yield f"--timestep_range {args.timestep_range}: expected 0 <= FIRST < END <= 1000"
    if args.val_steps is not None and not (args.val_data_dir or args.val_split):
        yield "--val_steps needs --val_data_dir or --val_split"
    if args.fsdp:
        if int(os.environ.get("WORLD_SIZE", 1)) == 1:
            yield "--fsdp shards over several processes: start with torchrun --nproc_per_node"
        if args.cpu_offload or args.optimizer in ("adamw8", "prodigy") or args.precision == "fp16":
            yield "--fsdp does not go with --cpu_offload, --optimizer adamw8 or prodigy, or --precision fp16"
        if args.compile:
            yield "--fsdp does not go with --compile"
    if args.wandb and getattr(find_spec("wandb"), "origin", None) is None:  # a folder of that name has none
        yield "--wandb needs Weights & Biases: pip install wandb"
    if args.resume_anyway and not args.resume:
        yield "--resume_anyway needs --resume"
    if args.resume and args.overfit:
        yield "--resume does not go with --overfit, which is a run of minutes"
    if args.overfit and (args.val_data_dir or args.val_split or args.max_steps.endswith("e")):
        yield "--overfit takes --max_steps, and no validation: it has a handful of samples and no epochs"


def _fill_in(args):
    """Resolves what was not said."""
    pairs = [_directory_and_weight(text) for text in args.train_data_dir]
    args.train_data_dir, args.dir_weights = (
        [path for path, _ in pairs],
        [weight * args.repeats for _, weight in pairs],
    )
    args.noise_gamma = 5.0 if args.noise_gamma is None else args.noise_gamma
    args.min_lr_rate = 0.1 if args.min_lr_rate is None else args.min_lr_rate
    args.sample_cfgs = args.sample_cfgs or [1.0, 4.0, 7.0]
    args.betas = tuple(args.betas or default_betas(args.optimizer, args.precision == "bf16_pure"))
    if args.cond_dropout is None:
        args.cond_dropout = 0.0 if args.force_txtcache or args.overfit else 0.04


def _directory_and_weight(text):
    """("DIR", 2.5) of "DIR:2.5"; a directory whose own name looks like that is a directory."""
    path, colon, weight = text.rpartition(":")
    try:
        return (text, 1.0) if not colon or os.path.isdir(text) else (path, _weight(weight))
    except ValueError:
        return text, 1.0


def _data_arguments(group):
    group.add_argument("--train_data_dir", nargs="+", required=True, metavar="DIR[:WEIGHT]",
                       help="directories with sidecars; an epoch visits each pair of DIR WEIGHT times")  # fmt: skip
    group.add_argument(
        "--model", required=True, help="pipeline directory or hub id; a bare UNet trains without samples"
    )
    group.add_argument("--revision", help="of a hub id")
    group.add_argument("--imgcache_suffix", default=SUFFIXES["img_sdxl"], help="of the image sidecars")
    group.add_argument("--txtcache_suffix", default=SUFFIXES["txt_t5cache"], help="of the text sidecars")
    group.add_argument("--force_txtcache", metavar="FILE", help="one text sidecar for all images (unsupervised)")
    group.add_argument("--repeats", type=_weight, default=1.0,
                       help="times WEIGHT and multiply.txt: visits of an epoch to each sample; may be 1.5"
                       )  # fmt: skip
    group.add_argument("--vae_scaling_factor", type=float, help="default: from the caches")
    group.add_argument("--text_scaling_factor", type=float, default=1.0, help="multiplies every text embedding")
    group.add_argument("--cache_in_ram", action="store_true",
                       help="read all sidecars once, into memory (each rank its own copy)")  # fmt: skip
    group.add_argument("--num_workers", type=_count, default=min(8, max(0, cli.cores_of_this_rank() - 1)),
                       help="loader processes; 0: none. Never changes the run")  # fmt: skip
    group.add_argument("--overfit", type=_positive, metavar="N",
                       help="sanity run: N samples, fixed noise, until the loss is a tenth of the first")  # fmt: skip


def _objective_arguments(group):
    group.add_argument("--objective", choices=("epsilon", "v_prediction", "flow"), help="default: the model's own")
    group.add_argument("--use_snr", action="store_true", help="Min-SNR loss weights; the raw loss is logged beside")
    group.add_argument("--noise_gamma", type=float, help="gamma of --use_snr (5)")
    group.add_argument("--zero_terminal_snr", action="store_true",
                       help="rescale the noise schedule to end in pure noise (v_prediction only)")  # fmt: skip
    group.add_argument("--offset_noise", type=_not_negative, default=0.0, metavar="STD",
                       help="noise alike in all pixels of a channel, to learn dark and bright images")  # fmt: skip
    group.add_argument("--timestep_sampling", choices=("uniform", "logit_normal", "stratified"),
                       default="uniform", help="middle ones more often; or spread evenly in each step")  # fmt: skip
    group.add_argument("--timestep_range", type=int, nargs=2, default=(0, 1000), metavar=("FIRST", "END"),
                       help="train only these of the 1000 timesteps")  # fmt: skip
    group.add_argument("--cond_dropout", type=_probability,
                       help='share of captions dropped (0.04; 0 with --force_txtcache, --overfit)')  # fmt: skip
    group.add_argument(
        "--flip_p", type=_probability, default=0.0, help="share of images mirrored (needs latent_flip)"
    )


def _optimization_arguments(group):
    group.add_argument("--batch_size", type=_positive, default=64, help="samples in one backward pass")
    group.add_argument("--gradient_accum", "--grad_accum", type=_positive, default=1, help="backward passes a step")
    group.add_argument(
        "--max_steps", type=cli.Steps, default=cli.Steps("10000"), help="optimizer steps, or epochs like 2e"
    )
    group.add_argument("--max_epochs", type=_epochs, dest="max_steps", metavar="N", default=argparse.SUPPRESS,
                       help="--max_steps in epochs; the last of both flags counts")  # fmt: skip
    group.add_argument("--learning_rate", "--lr", type=_not_negative, default=1e-5, help="peak rate")
    group.add_argument("--scale_lr", action="store_true", help="times sqrt(batch_size x gradient_accum x ranks)")
    group.add_argument("--scheduler", "--lr_scheduler", choices=SCHEDULES, default="constant", help="of the rate")
    group.add_argument("--warmup_steps", "--lr_warmup_steps", type=cli.Steps,
                       help="steps, or epochs like 0.1e; default: 2%% of the decay steps")  # fmt: skip
    group.add_argument("--lr_decay_steps", type=cli.Steps, help="default: 1.1 x max_steps, so the rate ends above 0")
    group.add_argument("--min_lr_rate", type=_probability, help="end of cosine_with_min_lr over its peak (0.1)")
    group.add_argument("--optimizer", choices=OPTIMIZERS, default="adamw", help="adamw is torch's, fused")
    group.add_argument("--betas", type=float, nargs=2, help="default: the optimizer's own")
    group.add_argument("--weight_decay", type=_not_negative, default=0.01, help="decoupled")
    group.add_argument("--gradient_clip", "--clip_grad_norm", type=_not_negative, default=1.0,
                       help="global norm; 0: off")  # fmt: skip
    group.add_argument("--ema_decay", type=_probability, default=0.0, help="EMA of the weights; 0: off")
    group.add_argument("--seed", type=_count, default=0, help="of order, noise, timesteps and dropout")


def _speed_arguments(group):
    group.add_argument("--precision", choices=("bf16", "bf16_pure", "fp32", "fp16"), default="bf16",
                       help="bf16: float32 weights, bfloat16 autocast. bf16_pure: bfloat16 weights, "
                       "Kahan-compensated updates. fp16: loss scaling, for GPUs without bfloat16")  # fmt: skip
    group.add_argument("--allow_tf32", action="store_true", help="TensorFloat-32 where float32 is computed (CUDA)")
    group.add_argument("--gradient_checkpointing", action="store_true", help="less memory, a third more work")
    group.add_argument("--cpu_offload", action="store_true", help="optimizer state and EMA in CPU memory; slower")
    group.add_argument("--compile", action="store_true", help="compile the UNet: minutes at the start, then faster")
    group.add_argument("--fsdp", action="store_true", help="shard weights and states over the ranks of torchrun")
    group.add_argument("--device", help="default: cuda if there is one, else cpu")


def _output_arguments(group):
    group.add_argument("--output_dir", required=True, help="of this run; its name is the run's name")
    group.add_argument("--logdir", default="tensorboard", help="TensorBoard events go to <logdir>/<run name>")
    group.add_argument("--wandb", action="store_true", help="mirror it to Weights & Biases (pip install wandb)")
    group.add_argument("--log_step", type=_positive, default=25, help="optimizer steps between scalars")
    group.add_argument("--diagnostic_steps", type=_positive, default=500, help="steps between groups 09, 10, 13")
    group.add_argument("--log_groups", type=int, nargs="*", choices=GROUPS, metavar="N",
                       default=[group for group in GROUPS if group != 10],
                       help="groups of tags to log (docs/logging.md); the others cost nothing")  # fmt: skip
    group.add_argument("--save_steps", type=cli.Steps, default=cli.Steps("1000"),
                       help="steps, or epochs like 1e, between checkpoints; the last step always saves")  # fmt: skip
    group.add_argument("--save_on_epoch", action="store_true", help="also save at the end of each epoch")
    group.add_argument("--save_every_minutes", type=_weight, metavar="M", help="also save when M minutes have passed")
    group.add_argument("--save_start", type=cli.Steps, default=cli.Steps("0"), help="no checkpoint before this step")
    group.add_argument("--resume", metavar="latest|PATH",
                       help="go on from the output_dir's newest intact checkpoint, or this one")  # fmt: skip
    group.add_argument("--resume_anyway", action="store_true", help="also with settings that make it another run")
    group.add_argument("--max_nonfinite", type=_positive, default=10, metavar="N",
                       help="save and end after N steps in a row whose loss or gradients are not finite")  # fmt: skip
    group.add_argument("--ckpt_dir", metavar="DIR",
                       help="also write each checkpoint there as one .safetensors for web UIs")  # fmt: skip
    group.add_argument("--keep_last", type=_positive, metavar="N", help="remove all but the last N checkpoints")
    group.add_argument("--copy_config", metavar="FILE", help="archive FILE (the wrapper script) in the output_dir")


def _sample_arguments(group):
    prompts = group.add_mutually_exclusive_group()
    prompts.add_argument("--sample_prompt", nargs="+", metavar="PROMPT", help="draw these while training")
    prompts.add_argument("--sample_prompts", metavar="FILE", help="the same: .txt, one prompt a line, or .json")
    group.add_argument("--sample_steps", type=_positive, default=250, help="optimizer steps between samples")
    group.add_argument("--sampler_steps", type=_positive, default=30, help="denoising steps of a sample")
    group.add_argument("--sample_cfgs", type=float, nargs="+", help="guidance scales (1 4 7)")
    held_out = group.add_mutually_exclusive_group()
    held_out.add_argument("--val_data_dir", nargs="+", metavar="DIR", help="directories with sidecars to validate on")
    held_out.add_argument("--val_split", type=_probability, default=0.0, metavar="SHARE",
                          help="hold out this share of the pairs, by a hash of their names")  # fmt: skip
    group.add_argument("--val_steps", type=cli.Steps, help="between validations; default: once an epoch")


def _epochs(text):
    return cli.Steps(f"{text}e")


def _positive(text):
    value = int(text)
    if value < 1:
        raise ValueError
    return value


def _count(text):
    value = int(text)
    if value < 0:
        raise ValueError
    return value


def _weight(text):
    value = float(text)
    if not 0 < value < float("inf"):
        raise ValueError
    return value


def _not_negative(text):
    value = float(text)
    if not 0 <= value < float("inf"):
        raise ValueError
    return value


def _probability(text):
    value = float(text)
    if not 0 <= value <= 1:
        raise ValueError
    return value
