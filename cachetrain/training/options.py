"""The trainer's command line: what cannot be combined, and what was left open. Imports no torch."""

import os
import re
from argparse import Namespace
from collections.abc import Iterator
from importlib.util import find_spec

from cachetrain import cli
from cachetrain.training.flags import add_flags
from cachetrain.training.optimizers import OPTIMIZERS, check_optimizer, default_betas
from cachetrain.training.spellings import INSTEAD


def parse_args(doc: str, argv: list[str] | None = None) -> Namespace:
    """Parses the trainer's flags.

    Raises:
        SystemExit: a flag is wrong, or cannot apply to this run.
    """
    parser = cli.parser(doc)
    parser.instead = INSTEAD
    add_flags(parser)
    args = parser.parse_args(argv)
    for message in _conflicts(args):
        parser.error(message)
    _fill_in(args)
    try:
        check_optimizer(args.optimizer, args.learning_rate, args.betas, args.precision == "bf16_pure")
    except ValueError as error:
        parser.error(str(error))
    return args


def _conflicts(args) -> Iterator[str]:
    """Yields a message for each flag that cannot apply beside the others."""
    if args.sizes and len(args.imgcache_suffix) == 1:
        yield "--sizes needs several --imgcache_suffix"
    if len(set(args.imgcache_suffix)) < len(args.imgcache_suffix):
        yield f"--imgcache_suffix {' '.join(args.imgcache_suffix)}: expected each only once"
    if args.noise_gamma is not None and not args.use_snr:
        yield "--noise_gamma needs --use_snr"
    if args.noise_gamma is not None and args.use_snr == "debiased":
        yield "--noise_gamma does nothing with --use_snr debiased"
    if args.huber_c is not None and not args.loss:
        yield "--huber_c needs --loss huber"
    for flag in ("logit_mean", "logit_std"):
        if getattr(args, flag) is not None and args.timestep_sampling != "logit_normal":
            yield f"--{flag} needs --timestep_sampling logit_normal"
    if not args.timestep_range[0] < args.timestep_range[1]:
        yield "--timestep_range: expected FIRST below END, got {} {}".format(*args.timestep_range)
    yield from _rate_conflicts(args)
    if args.fsdp:
        yield from _fsdp_conflicts(args)
    if args.gradient_release:
        yield from _release_conflicts(args)
    yield from _adapter_conflicts(args)
    if args.wandb and getattr(find_spec("wandb"), "origin", None) is None:  # a folder of that name has none
        yield "--wandb needs Weights & Biases: pip install wandb"
    if not (args.sample_prompt or args.sample_prompts) and args.sample_cfgs is not None:
        yield "--sample_cfgs needs --sample_prompt or --sample_prompts"
    if args.val_steps is not None and not (args.val_data_dir or args.val_split):
        yield "--val_steps needs --val_data_dir or --val_split"
    if args.resume_anyway and not args.resume:
        yield "--resume_anyway needs --resume"
    if args.resume and args.overfit:
        yield "--resume cannot be combined with --overfit"
    if args.overfit and (args.val_data_dir or args.val_split):
        yield "--overfit cannot be combined with --val_data_dir or --val_split"
    if args.overfit and args.max_steps.endswith("e"):
        yield "--overfit needs --max_steps in optimizer steps: it has a handful of samples and no epochs"


def _rate_conflicts(args):
    if args.scheduler.startswith("constant") and args.lr_decay_steps is not None:
        yield f"--lr_decay_steps does nothing with --scheduler {args.scheduler}"
    if args.scheduler == "constant" and args.warmup_steps is not None and args.warmup_steps.resolve(1) > 0:
        yield "--warmup_steps: --scheduler constant has no warm-up; use constant_with_warmup"
    if not args.scheduler.endswith("_with_min_lr") and args.min_lr_rate is not None:
        yield "--min_lr_rate needs --scheduler cosine_with_min_lr or linear_with_min_lr"
    if not args.scheduler.startswith("cosine") and args.num_cycles is not None:
        yield "--num_cycles needs --scheduler cosine or cosine_with_min_lr"
    if args.betas and args.optimizer == "adafactor":
        yield "--betas does nothing with --optimizer adafactor"
    if args.scale_lr and OPTIMIZERS[args.optimizer].finds_rate:
        yield f"--scale_lr cannot be combined with --optimizer {args.optimizer}, which finds the rate itself"


def _fsdp_conflicts(args):
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield "--fsdp shards over several processes: start with torchrun --nproc_per_node"
    given = {
        "--cpu_offload": args.cpu_offload,
        "--compile": args.compile,
        "--precision fp16": args.precision == "fp16",
        f"--optimizer {args.optimizer}, which needs whole weights": not OPTIMIZERS[args.optimizer].fsdp,
    }
    for flag in (flag for flag, is_given in given.items() if is_given):
        yield f"--fsdp cannot be combined with {flag}"


def _release_conflicts(args):
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        yield "--gradient_release works on one GPU only: several average their gradients before a step; omit it"
    implementation = OPTIMIZERS[args.optimizer].for_weights(args.precision == "bf16_pure")
    if implementation is not None and not implementation.releases:
        yield (
            f"--gradient_release cannot be combined with --optimizer {args.optimizer} unless the weights are "
            "bfloat16; use --precision bf16_pure, or --optimizer lion, stableadamw, muon or adafactor"
        )
    given = {
        "--gradient_clip: the norm of all gradients is not known before the first is used": args.gradient_clip,
        "--gradient_accum: gradients are gone when the next ones come": args.gradient_accum > 1,
        "--cpu_offload, which steps with all gradients at once": args.cpu_offload,
        "--compile, whose backward pass computes all gradients at once": args.compile,
        "--precision fp16, whose steps are skipped as a whole": args.precision == "fp16",
    }
    for flag in (flag for flag, is_given in given.items() if is_given):
        yield f"--gradient_release cannot be combined with {flag}"


def _adapter_conflicts(args):
    if not args.lora_rank:
        settings = ("lora_alpha", "lora_targets", "lora_dropout", "dora")
        yield from (f"--{name} needs --lora_rank" for name in settings if getattr(args, name))
        return
    if find_spec("peft") is None:
        yield "--lora_rank needs peft: pip install peft"
    given = [name for name, value in vars(args).items() if re.match("reinit_|unfreeze_|targetted_", name) and value]
    for name in given:
        yield f"--lora_rank cannot be combined with --{name}: only the adapter is trained"
    if args.gradient_release:
        yield "--lora_rank cannot be combined with --gradient_release; the gradients of an adapter are small"
    if args.fsdp:
        yield "--lora_rank cannot be combined with --fsdp; omit it: what it would shard is small"


def _fill_in(args):
    """Resolves what was not said."""
    if args.lora_rank:
        args.lora_alpha = args.lora_alpha or float(args.lora_rank)
        args.lora_targets = args.lora_targets or "attention"
        args.lora_dropout = args.lora_dropout or 0.0
    if args.gradient_clip is None:
        args.gradient_clip = 0.0 if args.gradient_release else 1.0
    if len(args.imgcache_suffix) == 1:  # as runs record it that knew of one only
        (args.imgcache_suffix,) = args.imgcache_suffix
    else:
        args.sizes = args.sizes or "draw"
    args.dir_weights = [weight * args.repeats for _, weight in args.train_data_dir]
    args.train_data_dir = [path for path, _ in args.train_data_dir]
    args.huber_c = 0.1 if args.loss and args.huber_c is None else args.huber_c
    args.noise_gamma = 5.0 if args.noise_gamma is None else args.noise_gamma
    args.min_lr_rate = 0.1 if args.min_lr_rate is None else args.min_lr_rate
    args.sample_cfgs = args.sample_cfgs or [1.0, 4.0, 7.0]
    args.betas = tuple(args.betas or default_betas(args.optimizer, args.precision == "bf16_pure"))
    if args.cond_dropout is None:
        args.cond_dropout = 0.0 if args.force_txtcache or args.overfit else 0.04
