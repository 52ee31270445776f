"""The trainer's command line. Imports no torch."""

import os

from cachetrain import cli
from cachetrain.sidecar import SUFFIXES

SCHEDULES = ("constant", "constant_with_warmup", "linear", "cosine")


def parse_args(doc, argv=None):
    """Parses the trainer's flags.

    Raises:
        SystemExit: a flag is wrong, or cannot apply to this run.
    """
    parser = cli.parser(doc)
    _data_arguments(parser.add_argument_group("data"))
    _objective_arguments(parser.add_argument_group("objective"))
    _optimization_arguments(parser.add_argument_group("optimisation"))
    _output_arguments(parser.add_argument_group("output"))
    _sample_arguments(parser.add_argument_group("samples"))
    args = parser.parse_args(argv)
    if args.noise_gamma is not None and not args.use_snr:
        parser.error("--noise_gamma needs --use_snr")
    if args.lr_decay_steps is not None and args.scheduler.startswith("constant"):
        parser.error(f"--lr_decay_steps does nothing with --scheduler {args.scheduler}")
    if args.warmup_steps is not None and args.scheduler == "constant":
        parser.error("--scheduler constant has no warm-up; use constant_with_warmup")
    if not (args.sample_prompt or args.sample_prompts) and args.sample_cfgs is not None:
        parser.error("--sample_cfgs needs --sample_prompt or --sample_prompts")
    if not 0 <= args.timestep_range[0] < args.timestep_range[1] <= 1000:
        parser.error(f"--timestep_range {args.timestep_range}: expected 0 <= FIRST < END <= 1000")
    args.noise_gamma = 5.0 if args.noise_gamma is None else args.noise_gamma
    args.sample_cfgs = args.sample_cfgs or [1.0, 4.0, 7.0]
    args.betas = tuple(args.betas or {"adamw": (0.9, 0.999), "lion": (0.9, 0.99)}[args.optimizer])
    return args


def _data_arguments(group):
    group.add_argument("--train_data_dir", nargs="+", required=True, metavar="DIR", help="directories with sidecars")
    group.add_argument(
        "--model", required=True, help="pipeline directory or hub id; a bare UNet trains without samples"
    )
    group.add_argument("--revision", help="of a hub id")
    group.add_argument("--imgcache_suffix", default=SUFFIXES["img_sdxl"], help="of the image sidecars")
    group.add_argument("--txtcache_suffix", default=SUFFIXES["txt_t5cache"], help="of the text sidecars")
    group.add_argument("--vae_scaling_factor", type=float, help="default: from the caches")
    group.add_argument("--text_scaling_factor", type=float, default=1.0, help="multiplies every text embedding")
    group.add_argument("--num_workers", type=int, default=min(8, max(0, (os.cpu_count() or 1) - 1)),
                       help="loader processes; 0: none. Never changes the run")  # fmt: skip


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
    group.add_argument("--cond_dropout", type=_probability, default=0.04, help='share of captions replaced by ""')
    group.add_argument(
        "--flip_p", type=_probability, default=0.0, help="share of images mirrored (needs latent_flip)"
    )


def _optimization_arguments(group):
    group.add_argument("--batch_size", type=_positive, default=64, help="samples in one backward pass")
    group.add_argument("--gradient_accum", "--grad_accum", type=_positive, default=1, help="backward passes a step")
    length = group.add_mutually_exclusive_group()
    length.add_argument(
        "--max_steps", type=cli.Steps, default=cli.Steps("10000"), help="optimizer steps, or epochs like 2e"
    )
    length.add_argument("--max_epochs", type=float, help="visits to every sample")
    group.add_argument("--learning_rate", "--lr", type=float, default=1e-5, help="peak rate")
    group.add_argument("--scheduler", "--lr_scheduler", choices=SCHEDULES, default="constant", help="of the rate")
    group.add_argument("--warmup_steps", "--lr_warmup_steps", type=cli.Steps,
                       help="steps, or epochs like 0.1e; default: 2%% of the decay steps")  # fmt: skip
    group.add_argument("--lr_decay_steps", type=cli.Steps, help="default: 1.1 x max_steps, so the rate ends above 0")
    group.add_argument("--optimizer", choices=("adamw", "lion"), default="adamw", help="fused AdamW, or Lion")
    group.add_argument("--betas", type=float, nargs=2, help="default: .9 .999 (adamw), .9 .99 (lion)")
    group.add_argument("--weight_decay", type=float, default=0.01, help="decoupled")
    group.add_argument("--gradient_clip", "--clip_grad_norm", type=float, default=1.0, help="global norm; 0: off")
    group.add_argument("--ema_decay", type=_probability, default=0.0, help="EMA of the weights; 0: off")
    group.add_argument("--precision", choices=("bf16", "fp32"), default="bf16",
                       help="bf16: float32 weights, bfloat16 autocast")  # fmt: skip
    group.add_argument("--seed", type=int, default=0, help="of order, noise, timesteps and dropout")
    group.add_argument("--device", help="default: cuda if there is one, else cpu")


def _output_arguments(group):
    group.add_argument("--output_dir", required=True, help="of this run; its name is the run's name")
    group.add_argument("--logdir", default="tensorboard", help="TensorBoard events go to <logdir>/<run name>")
    group.add_argument("--log_step", type=_positive, default=25, help="optimizer steps between scalars")
    group.add_argument("--save_steps", type=cli.Steps, default=cli.Steps("1000"),
                       help="steps, or epochs like 1e, between checkpoints; the last step always saves")  # fmt: skip
    group.add_argument("--copy_config", metavar="FILE", help="archive FILE (the wrapper script) in the output_dir")


def _sample_arguments(group):
    prompts = group.add_mutually_exclusive_group()
    prompts.add_argument("--sample_prompt", nargs="+", metavar="PROMPT", help="draw these while training")
    prompts.add_argument("--sample_prompts", metavar="FILE", help="the same, one prompt a line")
    group.add_argument("--sample_steps", type=_positive, default=250, help="optimizer steps between samples")
    group.add_argument("--sampler_steps", type=_positive, default=30, help="denoising steps of a sample")
    group.add_argument("--sample_cfgs", type=float, nargs="+", help="guidance scales (1 4 7)")


def _positive(text):
    value = int(text)
    if value < 1:
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
