"""The trainer's flags: each with its range, its help, and what another value means for a resumed run.

`resume` says what happens if a run is resumed with another value than it was saved with:

    "same"      it would be another run: refused without --resume_anyway (the default)
    "rounding"  the same run but for rounding: listed as such
    "free"      nothing that is trained depends on it, or checkpoints.resume.settings_of compares what it amounts to
                (the learning rate in steps, say, not the flags it is made of): listed
    "silent"    says nothing about the run: not listed

Imports no torch.
"""

import argparse
import os

from cachetrain import cli
from cachetrain.data.sidecar import SUFFIXES
from cachetrain.modeling import trainable
from cachetrain.training import spellings
from cachetrain.training.lr_schedule import SCHEDULES
from cachetrain.training.optimizers import OPTIMIZERS

GROUPS = tuple(range(1, 16))  # of the logs
MEANINGS = ("same", "rounding", "free", "silent")

_PIXELS = cli.Number(int, 0, 65536)
_WINDOW = cli.Number(int, 0, 65536)
_TIMESTEP = cli.Number(int, 0, 1000)
_GAMMA = cli.Number(float, 0.01, 1000)
_RATE = cli.Number(float, 0, 10, exclude=(0,))
_DECAY = cli.Number(float, 0, 100)
_OFFSET = cli.Number(float, 0, 10)
_HUBER = cli.Number(float, 0.0001, 1)
_LOGIT, _LOGIT_STD = cli.Number(float, -10, 10), cli.Number(float, 0.01, 10)
_SHIFT = cli.Number(float, 0.01, 100)
_WEIGHT = cli.Number(float, 0, 1000, exclude=(0,))
_CYCLES = cli.Number(float, 0, 1000, exclude=(0,))
_BELOW_1 = cli.Number(float, 0, 1, exclude=(1,))
_STEPS, _STEPS_OR_0 = cli.StepCount(1), cli.StepCount(0)
_CORES = cli.cores_of_this_rank()
_TRAINED = (
    "By default the whole UNet. --unfreeze_* flags add up; parts with --reinit_* flags train in any case. A "
    "resumed run keeps its weights."
)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds all of the trainer's flags to a parser, in groups."""
    _data_flags(parser.add_argument_group("data"))
    _objective_flags(parser.add_argument_group("objective"))
    trainable.add_arguments(parser.add_argument_group("what is trained", _TRAINED))
    _optimization_flags(parser.add_argument_group("optimization"))
    _speed_flags(parser.add_argument_group("precision, memory and speed"))
    _output_flags(parser.add_argument_group("output"))
    _resume_flags(parser.add_argument_group("stopping and resuming"))
    _sample_flags(parser.add_argument_group("samples"))
    _validation_flags(parser.add_argument_group("validation"))


def resume_meanings() -> dict[str, str]:
    """{name of a setting, as in args.json: one of MEANINGS}."""
    parser = argparse.ArgumentParser(add_help=False)
    add_flags(parser)
    meanings = {action.dest: getattr(action, "resume", "same") for action in parser._actions}
    return meanings | {"dir_weights": meanings["train_data_dir"]}  # made of it by options.parse_args


def directory_and_repeats(text: str) -> tuple[str, float]:
    """("DIR", 2.5) of "DIR:2.5"; a directory that really has such a name is a directory.

    Raises:
        argparse.ArgumentTypeError: the number is out of range.
    """
    path, colon, repeats = text.rpartition(":")
    if not colon or os.path.isdir(text) or repeats.startswith("//"):
        return text, 1.0
    try:
        float(repeats)
    except ValueError:
        return text, 1.0
    return path, cli.repeats(repeats)


def source_and_weight(text: str) -> tuple[str, float]:
    """(".long.txt", 3.0) of ".long.txt:3".

    Raises:
        argparse.ArgumentTypeError: it is something else, or the number is out of range.
    """
    suffix, colon, weight = text.rpartition(":")
    if not colon or not suffix.startswith("."):
        raise argparse.ArgumentTypeError(
            f"expected the suffix of a caption file and a weight, like .txt:3, got {text}"
        )
    return suffix.lower(), _WEIGHT(weight)


class _Epochs(cli.Number):
    """A number of epochs, as cli.Steps."""

    def __call__(self, text):
        super().__call__(text)
        return cli.Steps(f"{text.strip()}e")


def _flag(group, *names, resume="same", **settings):
    """group.add_argument, with one of MEANINGS."""
    assert resume in MEANINGS, names
    group.add_argument(*names, **settings).resume = resume


# A table: names and types above, the help below.
# fmt: off


def _data_flags(group):
    _flag(group, "--train_data_dir", nargs="+", required=True, type=directory_and_repeats, metavar="DIR[:REPEATS]",
          resume="free",  # the pairs in it are compared
          help="directories with cached images and captions, subfolders included, or shard sets of "
               "cache/pack_shards.py or their freeze files, also at s3://, gs:// or az:// (see --shard_cache); each "
               "pair of DIR comes up REPEATS times in an epoch, from 0.001 to 10000; default: once")
    _flag(group, "--shard_cache", metavar="DIR", resume="free",
          help="local directory into which the shards of sets at s3://, gs:// or az:// are copied while training "
               "reads them, once for each machine")
    _flag(group, "--shard_cache_gb", type=cli.Number(float, 0, 10**6, exclude=(0,)), metavar="GB", resume="free",
          help="how much of --shard_cache shards may take, in GiB; those not needed soon are removed, which needs "
               "--shuffle_window; default: what the disk has")
    _flag(group, "--save_index", action="store_true", resume="free",
          help="for a million sidecars: save what they are and what their headers say to .cachetrain/ in each data "
               "directory; later starts use that, and only read the headers in folders in which files were added, "
               "removed or replaced since")
    _flag(group, "--model", "--pretrained_model", required=True, resume="free",
          help="pipeline directory, checkpoint or Hugging Face model id whose UNet is trained; a bare UNet without "
               "VAE and text encoder trains too, but cannot draw samples")
    _flag(group, "--is_custom", action="store_true", resume="silent",
          help="accepted from other trainers' scripts: a model's parts are loaded one by one, its code is never run")
    _flag(group, "--revision", resume="free", help="branch, tag or commit of a Hugging Face model id")
    _flag(group, "--imgcache_suffix", nargs="+", default=[SUFFIXES["img_sdxl"]], metavar="SUFFIX",
          help="file name suffix of the cached images, as the image cache script wrote them; several: each image is "
               "cached once for each, for example at several sizes")
    _flag(group, "--sizes", choices=("draw", "all"),
          help="what a visit of an image trains on, with several --imgcache_suffix: draw: one of its caches, drawn "
               "anew for each visit; all: an epoch visits each; default: draw")
    _flag(group, "--txtcache_suffix", default=SUFFIXES["txt_t5cache"],
          help="file name suffix of the cached captions, as the text cache script wrote them")
    _flag(group, "--force_txtcache", metavar="FILE",
          help="use this one cached caption for every image, for training without captions")
    _flag(group, "--caption_weights", nargs="+", type=source_and_weight, metavar="SUFFIX:WEIGHT",
          help="for captions cached from several files, how often those of each are drawn: .txt:1 .long.txt:3 draws "
               "a.long.txt three times as often as a.txt; weights are from above 0 to 1000; default: 1 each")
    _flag(group, "--force_toklen", type=cli.positive_int, metavar="N", resume="free",
          help="check that no cached caption has more than N tokens; shorter ones are padded and masked in any case")
    _flag(group, "--repeats", type=cli.repeats, default=1.0, resume="free",  # what it comes to is compared
          help="how often each pair comes up in an epoch, times REPEATS of its DIR and the number in multiply.txt; "
               "with 1.5 half of the pairs, drawn anew in each epoch, come up twice")
    _flag(group, "--kohya_repeats", action="store_true", resume="free",
          help="repeat the images of a folder like 10_subject 10 times, as if its number were in a multiply.txt")
    _flag(group, "--vae_scaling_factor", type=cli.scaling_factor, metavar="X",
          help="multiplies the latents; give it only for caches that do not record the factor of their VAE")
    _flag(group, "--text_scaling_factor", type=cli.scaling_factor, default=1.0, metavar="X",
          help="multiplies the text embeddings")
    _flag(group, "--time_ids", type=_PIXELS, nargs=6, metavar=("H", "W", "TOP", "LEFT", "HEIGHT", "WIDTH"),
          help="for SDXL, if the image caches do not record them: original height and width, crop top and left, "
               "height and width of all images, in pixels")
    _flag(group, "--cache_in_ram", action="store_true", resume="free",
          help="read all caches into memory before training, for slow disks; each rank keeps its own copy")
    _flag(group, "--shuffle_window", type=_WINDOW, default=0, metavar="W",
          help="for shard sets larger than memory: shuffle 32 x W shards at a time, so that only these need to be in "
               "the page cache; a larger W mixes better. 2048 pairs of a folder count as a shard; default: 0, the "
               "whole epoch at once")
    _flag(group, "--num_workers", type=cli.workers, default=min(8, max(0, _CORES - 1)), metavar="N", resume="free",
          help="processes that load data, for each rank; 0: load between the steps. Does not change the result")
    _flag(group, "--overfit", type=cli.positive_int, metavar="N", resume="silent",
          help="check that training works: train N pairs with fixed noise until the loss is a tenth of the first; if "
               "it does not get there, the exit code is 1")


def _objective_flags(group):
    _flag(group, "--objective", choices=("epsilon", "v_prediction", "flow"),
          resume="free",  # the noise schedule is compared
          help="what the UNet predicts: the noise, the velocity v, or the direction from image to noise (flow "
               "matching); default: what the model was trained for, epsilon for a bare UNet")
    _flag(group, "--use_snr", nargs="?", const=True, default=False, choices=("auto", "debiased"),
          metavar="auto|debiased",
          help="Min-SNR loss weights: timesteps with little noise count less; the plain loss is logged too. auto: "
               "not for flow matching, which learns worse with them; a resumed run keeps what it had. debiased: "
               "weights of debiased estimation instead, 1 / sqrt(SNR) for epsilon")
    _flag(group, "--noise_gamma", type=_GAMMA, metavar="GAMMA",
          help="gamma of --use_snr: weights are cut where the signal-to-noise ratio is above it; default: 5")
    # Flags that later versions add have a default of None or 0, so that runs saved before can be resumed.
    _flag(group, "--loss", choices=("huber",),
          help="huber: grows only linearly where the error is large, above all at much noise, so that a few bad "
               "images or captions count less; default: the squared error")
    _flag(group, "--huber_c", type=_HUBER, metavar="C",
          help="for --loss huber: the error from which on it grows linearly is C at timestep 1000, and 1 at 0; "
               "default: 0.1")
    _flag(group, "--zero_terminal_snr", action="store_true", resume="free",  # the schedule is compared
          help="rescale the noise schedule so that the last timestep is pure noise; for v_prediction only")
    _flag(group, "--offset_noise", type=_OFFSET, default=0.0, metavar="STD",
          help="add noise of this standard deviation that is the same in all pixels of a channel, to learn very dark "
               "and very bright images; 0: off, 0.1: common")
    _flag(group, "--timestep_sampling", choices=("uniform", "logit_normal", "stratified"), default="uniform",
          help="uniform: all timesteps equally often; logit_normal: those in the middle more often; stratified: as "
               "uniform, but spread evenly within each optimizer step")
    _flag(group, "--logit_mean", type=_LOGIT, metavar="M",
          help="for --timestep_sampling logit_normal: mean of the normal number; above 0: more noise; default: 0")
    _flag(group, "--logit_std", type=_LOGIT_STD, metavar="S",
          help="for --timestep_sampling logit_normal: its standard deviation; default: 1")
    _flag(group, "--timestep_shift", type=_SHIFT, metavar="S",
          help="for flow matching: move timesteps towards noise, t to S t / (1 + (S - 1) t); 3: common at 1024x1024; "
               "default: 1, not moved")
    _flag(group, "--timestep_range", type=_TIMESTEP, nargs=2, default=(0, 1000), metavar=("FIRST", "END"),
          help="train only timesteps from FIRST to below END; the higher the timestep, the more noise")
    _flag(group, "--cond_dropout", type=cli.share, metavar="SHARE",
          help="share of captions replaced by the empty one, which guidance needs when sampling; default: 0.04, or 0 "
               "with --force_txtcache or --overfit")
    _flag(group, "--unmasked_weight", type=cli.share, metavar="WEIGHT",
          help="use the masks of caches made with --mask: the loss counts this much where a mask is black, in full "
               "where it is white; 0: not at all, 0.1: common; default: masks are not used")
    _flag(group, "--flip_p", type=cli.share, default=0.0, metavar="SHARE",
          help="share of images mirrored, for caches made with --flip; not for captions that say left or right")


def _optimization_flags(group):
    _flag(group, "--batch_size", type=cli.batch_size, default=64, metavar="N",
          resume="free",  # samples of a backward pass on all ranks are compared
          help="samples in one backward pass of each rank; lower it first when memory runs out")
    _flag(group, "--gradient_accum", "--grad_accum", type=cli.batch_size, default=1, metavar="N",
          help="backward passes in one optimizer step, to train with a larger batch than memory holds")
    _flag(group, "--max_steps", type=_STEPS, default=cli.Steps("10000"), metavar="N|Ne", resume="free",
          help="length of the run: optimizer steps, or epochs like 2e")
    _flag(group, "--max_epochs", type=_Epochs(float, 0, cli.MAX_EPOCHS, exclude=(0,)), dest="max_steps", metavar="N",
          default=argparse.SUPPRESS, resume="free",
          help="length of the run in epochs, like 2 or 0.5; of --max_steps and --max_epochs the last one counts")
    # Of the rate, the peak, the warm-up and the decay in steps are compared.
    _flag(group, "--learning_rate", "--lr", type=_RATE, default=1e-5, metavar="LR", resume="free",
          help="peak learning rate; lion needs 3 to 10 times less than adamw, prodigy needs 1")
    _flag(group, "--scale_lr", action="store_true", resume="free",
          help="multiply the learning rate by sqrt(batch_size x gradient_accum x ranks)")
    _flag(group, "--scheduler", "--lr_scheduler", choices=SCHEDULES, default="constant",
          help="how the learning rate changes during the run; all but constant begin with a warm-up")
    _flag(group, "--warmup_steps", "--lr_warmup_steps", type=_STEPS_OR_0, metavar="N|Ne", resume="free",
          help="length of the warm-up, in which the learning rate rises from 0: optimizer steps, or epochs like "
               "0.1e; default: 2%% of the decay steps")
    _flag(group, "--lr_decay_steps", type=_STEPS, metavar="N|Ne", resume="free",
          help="when the learning rate reaches its last value, counted from the start of the run: optimizer steps, "
               "or epochs like 2e; default: 1.1 x max_steps, so that the run ends before the rate is 0")
    _flag(group, "--min_lr_rate", "--min_lr_ratio", type=cli.share, metavar="SHARE",
          help="last learning rate of cosine_with_min_lr and linear_with_min_lr, as a share of the peak; "
               "default: 0.1")
    _flag(group, "--num_cycles", type=_CYCLES, metavar="X",
          help="waves of cosine and cosine_with_min_lr: 0.5 falls once, 1 falls and rises again; default: 0.5")
    _flag(group, "--optimizer", type=spellings.optimizer, choices=OPTIMIZERS, default="adamw",
          help="adamw: torch's, fused; lion: half of its state; stableadamw: AdamW that takes smaller steps after a "
               "jump of the gradients; muon: orthogonalizes the updates of matrices and convolutions, with half of "
               "adamw's state; adafactor: almost no state, learning rate relative to the weights; adamw8: state in 8 "
               "bits, pip install bitsandbytes; prodigy: finds the learning rate itself, pip install prodigyopt")
    _flag(group, "--betas", type=_BELOW_1, nargs=2, metavar=("BETA1", "BETA2"),
          help="decay of the optimizer's running averages, of gradients and of their squares; default: 0.9 0.999, or "
               "0.9 0.99 for lion, stableadamw and bf16_pure; of muon, the first is 0.95; adafactor "
               "has none")
    _flag(group, "--weight_decay", type=_DECAY, default=0.01, metavar="X",
          help="decoupled weight decay: a weight loses X x learning rate of itself in each step")
    _flag(group, "--gradient_clip", "--clip_grad_norm", type=cli.not_negative, metavar="NORM",
          help="scale gradients down where the norm of all of them together is larger; 0: off; default: 1, or 0 with "
               "--gradient_release")
    _flag(group, "--ema_decay", type=_BELOW_1, default=0.0, metavar="DECAY",
          help="decay of a moving average of the weights, which is saved beside them and used for samples; 0: off, "
               "0.9999: common for long runs")
    _flag(group, "--seed", type=cli.seed, default=0, metavar="N",
          help="random seed of data order, noise, timesteps, dropout and fresh weights")


def _speed_flags(group):
    _flag(group, "--precision", choices=("bf16", "bf16_pure", "fp32", "fp16"),
          help="bf16: float32 weights, computed in bfloat16; bf16_pure: bfloat16 weights too, half the memory, with "
               "Kahan-compensated updates; fp32: all in float32; fp16: with loss scaling, for GPUs without bfloat16; "
               "default: bf16 on a GPU, fp32 on a CPU, and what it was saved with for a resumed run")
    _flag(group, "--fp32", action="store_const", const="fp32", dest="precision", default=argparse.SUPPRESS,
          help="the same as --precision fp32")
    _flag(group, "--allow_tf32", action="store_true", resume="rounding",
          help="compute in TensorFloat-32 in place of float32: faster, less exact; CUDA only")
    _flag(group, "--gradient_checkpointing", action="store_true", resume="rounding",
          help="compute activations again in the backward pass: less memory, a third more computation")
    _flag(group, "--gradient_release", action="store_true",
          help="update each weight and free its gradient during the backward pass: saves the gradients' memory, but "
               "they can be neither clipped nor accumulated; with --precision bf16_pure, or lion, stableadamw, muon "
               "and adafactor")
    _flag(group, "--cpu_offload", action="store_true", resume="rounding",
          help="keep the optimizer's state and the EMA in CPU memory: less GPU memory, slower steps")
    _flag(group, "--compile", action="store_true", resume="rounding",
          help="compile the UNet with torch.compile: takes minutes at the start, then steps are faster")
    _flag(group, "--fsdp", action="store_true", resume="rounding",
          help="shard weights, gradients and optimizer state over the ranks that torchrun started, for a UNet that "
               "does not fit on one GPU")
    _flag(group, "--device", resume="rounding",
          help="torch device, like cuda:1 or cpu; default: cuda if there is one, else cpu")


def _output_flags(group):
    _flag(group, "--output_dir", required=True, resume="free",
          help="directory of this run: checkpoints, samples, metrics; its name is the run's name")
    _flag(group, "--logdir", default="tensorboard", resume="free",
          help="TensorBoard files are written to LOGDIR/<run name>")
    _flag(group, "--wandb", action="store_true", resume="free",
          help="also send the logs to Weights & Biases (pip install wandb)")
    _flag(group, "--log_step", type=cli.positive_int, default=25, metavar="N", resume="free",
          help="optimizer steps between two rows of scalars")
    _flag(group, "--diagnostic_steps", type=cli.positive_int, default=500, metavar="N", resume="free",
          help="optimizer steps between two rows of the costlier log groups 9, 10 and 13")
    _flag(group, "--log_groups", type=cli.Number(int, GROUPS[0], GROUPS[-1]), nargs="*", metavar="N", resume="free",
          default=[group for group in GROUPS if group != 10],
          help="numbers of the groups to log, see docs/logging.md; the others cost nothing; default: all but 10")
    _flag(group, "--save_steps", type=_STEPS, default=cli.Steps("1000"), metavar="N|Ne", resume="free",
          help="how often to write a checkpoint: every N optimizer steps, or epochs like 1e; the last step always "
               "writes one")
    _flag(group, "--save_on_epoch", action="store_true", resume="free",
          help="also write a checkpoint at the end of each epoch")
    _flag(group, "--save_every_minutes", type=cli.positive_float, metavar="M", resume="free",
          help="also write a checkpoint when the last one is M minutes old")
    _flag(group, "--save_start", type=_STEPS_OR_0, default=cli.Steps("0"), metavar="N|Ne", resume="free",
          help="write no scheduled checkpoint before this optimizer step, or epoch like 1e")
    _flag(group, "--keep_last", type=cli.positive_int, metavar="N", resume="free",
          help="keep the newest N checkpoints and remove older ones; default: keep all")
    _flag(group, "--ckpt_dir", metavar="DIR", resume="free",
          help="also write each checkpoint to DIR as one .safetensors file, for web UIs")
    _flag(group, "--copy_config", metavar="FILE", resume="silent",
          help="copy FILE into --output_dir, for example the script that started the run")


def _resume_flags(group):
    _flag(group, "--resume", metavar="latest|PATH", resume="silent",
          help="latest: continue the run in --output_dir from its newest intact checkpoint; PATH: continue from this "
               "checkpoint")
    _flag(group, "--resume_anyway", action="store_true", resume="silent",
          help="resume even with settings or data that make it another run")
    _flag(group, "--max_nonfinite", type=cli.positive_int, default=10, metavar="N", resume="free",
          help="stop after N optimizer steps in a row with a loss or gradients that are NaN or infinite; such steps "
               "are skipped")


def _sample_flags(group):
    prompts = group.add_mutually_exclusive_group()
    _flag(prompts, "--sample_prompt", nargs="+", metavar="PROMPT", resume="free",
          help="draw these prompts during training")
    _flag(prompts, "--sample_prompts", metavar="FILE", resume="free",
          help="draw the prompts in this file: .txt, one on each line, or .json; it may be edited during the run")
    _flag(group, "--sample_every", "--sample_steps", dest="sample_steps", type=cli.positive_int, default=250,
          metavar="N", resume="free",
          help="how often to draw: every N optimizer steps, unless a .json file of prompts says otherwise")
    _flag(group, "--num_inference_steps", "--sampler_steps", dest="sampler_steps", type=cli.denoising_steps,
          default=30, metavar="N", resume="free",
          help="denoising steps of each sample: more are slower, too few leave it unfinished")
    _flag(group, "--sample_cfgs", type=cli.guidance, nargs="+", metavar="SCALE", resume="free",
          help="guidance scales at which each prompt is drawn; 1: no guidance; default: 1 4 7")


def _validation_flags(group):
    held_out = group.add_mutually_exclusive_group()
    _flag(held_out, "--val_data_dir", nargs="+", metavar="DIR", resume="free",
          help="directories with cached images and captions to measure val/loss on")
    _flag(held_out, "--val_split", type=_BELOW_1, default=0.0, metavar="SHARE",
          resume="free",  # the pairs that are left are compared
          help="measure val/loss on this share of the training pairs, which are then not trained; a hash of its name "
               "decides for each pair; 0: off")
    _flag(group, "--val_steps", type=_STEPS, metavar="N|Ne", resume="free",
          help="how often to measure val/loss: every N optimizer steps, or epochs like 0.5e; default: once an epoch")
