"""Selects what of a UNet is trained: all, parts, or an adapter beside it; and the parts to re-initialize. torch is
imported only inside `apply`."""

from __future__ import annotations

import re
from argparse import Namespace
from typing import TYPE_CHECKING, NamedTuple

from cachetrain import cli
from cachetrain.modeling import lora

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

# part: (regular expression searched in the parameter names of diffusers' UNet2DConditionModel, description).
# Attention means the q, k, v and output projections only: a transformer block's norms, feed-forward, proj_in and
# proj_out belong to none of the attention parts.
REINIT = {
    "unet": (r"", "the whole UNet, to train from scratch"),
    "qk": (r"\.to_[qk]\.", "to_q and to_k of all attention layers"),
    "crossattn": (r"\.attn2\.", "cross-attention"),
    "crossattnout": (r"\.attn2\.to_out\.", "the output projections of cross-attention"),
    "attention": (r"\.attn[12]\.", "self- and cross-attention"),
    "in": (r"^conv_in\.", "conv_in"),
    "out": (r"^conv_(norm_)?out\.", "conv_norm_out and conv_out"),
    "time": (r"^time_embedding\.|\.time_emb_proj\.", "the time embedding and its projections in the resnets"),
}
UNFREEZE = {
    **{part: REINIT[part] for part in ("in", "out", "time")},
    "up_blocks": (r"^up_blocks\.{}\.", "the up blocks with these numbers, from 0"),
    "down_blocks": (r"^down_blocks\.{}\.", "the down blocks with these numbers, from 0"),
    "mid_block": (r"^mid_block\.", "the middle block"),
    "norms": (r"norm\w*\.(weight|bias)$", "all group and layer norms"),
    "attention": REINIT["attention"],
    "attn2": REINIT["crossattn"],
    "text_proj": (r"^encoder_hid_proj\.", "the UNet's projection of raw T5 embeddings"),
}


_RANK = cli.Number(int, 1, 4096)
_ALPHA = cli.Number(float, 0, 10_000, exclude=(0,))
_DROPOUT = cli.Number(float, 0, 1, exclude=(1,))


class Row(NamedTuple):
    """Parameter counts of a part (a flag, a block, or the whole UNet): all, re-initialized and trained."""

    part: str
    parameters: int
    reinitialized: int
    trained: int


class Selection(NamedTuple):
    """Parameter counts: a row per flag, then per block, then for the whole UNet. `str()` formats a table."""

    rows: list[Row]

    def __str__(self):
        lines = [("part", "parameters", "re-initialized", "trained")]
        lines += [(row.part, *(f"{number:,}" for number in row[1:])) for row in self.rows]
        width = max(len(line[0]) for line in lines)
        return "\n".join(f"{a:{width}} {b:>15} {c:>15} {d:>15}" for a, b, c, d in lines)


def add_arguments(group) -> None:
    """Adds the flags --reinit_*, --unfreeze_*, --targetted_training and --lora_* to a group of an argparse parser."""
    for part, (_, text) in REINIT.items():
        group.add_argument(f"--reinit_{part}", action="store_true", help=f"re-initialize {text}")
    for part, (pattern, text) in UNFREEZE.items():
        numbered = {"type": cli.count, "nargs": "+", "metavar": "N"} if "{}" in pattern else {"action": "store_true"}
        group.add_argument(f"--unfreeze_{part}", help=f"train only {text}", **numbered)
    group.add_argument(
        "--targetted_training", action="store_true", help="train only the parts named by --reinit_* and --unfreeze_*"
    )
    _add_adapter_arguments(group)


def _add_adapter_arguments(group):
    group.add_argument(
        "--lora_rank",
        type=_RANK,
        metavar="R",
        help="train an adapter (LoRA) of this rank and keep the UNet as it is: less memory, checkpoints of "
        "megabytes; 4 to 32: common; pip install peft",
    )
    group.add_argument(
        "--lora_alpha",
        type=_ALPHA,
        metavar="A",
        help="what the adapter adds is scaled by A / R, so that another R needs no other --lr; default: R",
    )
    group.add_argument(
        "--lora_targets",
        choices=lora.TARGETS,
        help="layers with an adapter: those of attention; also of the feed-forward; all linear layers and "
        "convolutions in the blocks; default: attention",
    )
    group.add_argument(
        "--lora_dropout",
        type=_DROPOUT,
        metavar="P",
        help="share of an adapter's inputs that are set to 0 in training, against overfitting; default: 0",
    )
    group.add_argument(
        "--dora", action="store_true", help="DoRA: train the length of each row of the adapted weights, too; slower"
    )


def apply(unet: UNet2DConditionModel, args: Namespace, seed: int, resumed: bool = False) -> Selection:
    """Re-initializes parts of a UNet and freezes the parts not to be trained. Call this before wrapping the UNet.

    Without --unfreeze_* and --targetted_training everything is trained. With either, only the parts named by flags
    are trained. Re-initialized parts are always trained, because a frozen random layer would be useless. With
    --lora_rank an adapter is added, and nothing else is trained.

    Args:
        unet: any float dtype, on any device; modified in place.
        args: namespace with the flags of `add_arguments`.
        seed: seed of the new values, which equal those of `load.fresh_unet` with this seed.
        resumed: the weights have already been trained: freeze parts, but do not re-initialize any.

    Raises:
        ValueError: a flag matches no parameter of this UNet, or there is nothing to train.
    """
    if args.lora_rank:
        lora.add(
            unet,
            args.lora_rank,
            args.lora_alpha,
            args.lora_targets,
            dropout=args.lora_dropout,
            dora=args.dora,
            seed=seed,
        )
        return _selection(unet, {f"--lora_rank {args.lora_rank}": set(lora.trained_state(unet))}, set())
    reinit, unfreeze = _match_flags(unet, args, "reinit", REINIT), _match_flags(unet, args, "unfreeze", UNFREEZE)
    if args.targetted_training and not reinit and not unfreeze:
        raise ValueError("--targetted_training: there is nothing to train; add --reinit_* or --unfreeze_* flags")
    reinitialized = set().union(*reinit.values())
    if reinitialized and not resumed:
        _reinitialize(unet, reinitialized, seed)
    if unfreeze or args.targetted_training:
        trained = reinitialized.union(*unfreeze.values())
        for name, parameter in unet.named_parameters():
            parameter.requires_grad_(parameter.requires_grad and name in trained)
    return _selection(unet, reinit | unfreeze, reinitialized)


def _match_flags(unet, args, verb, parts):
    """Returns {flag as given: names of the matching parameters}."""
    names = [name for name, _ in unet.named_parameters()]
    matches = {}
    for part, (pattern, _) in parts.items():
        value = getattr(args, f"{verb}_{part}")
        numbers = [] if not value else [""] if value is True else value
        for number in numbers:
            flag = f"--{verb}_{part} {number}".strip()
            matches[flag] = {name for name in names if re.search(pattern.format(number), name)}
            if not matches[flag]:
                blocks = ", ".join(dict.fromkeys(map(_block, names)))
                raise ValueError(f"{flag}: matches no parameters of this UNet, whose blocks are {blocks}")
    return matches


def _reinitialize(unet, names, seed):
    """Copies the parameters from a fresh UNet, so that special initializations, such as zeros, are kept."""
    import torch

    from cachetrain.modeling import load

    fresh = load.fresh_unet(unet.config, seed).get_parameter
    with torch.no_grad():
        for name in names:
            unet.get_parameter(name).copy_(fresh(name))


def _selection(unet, flags, reinitialized):
    """Counts parameters by flag, by block, and in total."""
    parameters = dict(unet.named_parameters())
    blocks = {}
    for name in parameters:
        blocks.setdefault(_block(name), set()).add(name)
    rows = []
    for part, names in [*flags.items(), *blocks.items(), ("UNet", set(parameters))]:
        trained = {name for name in names if parameters[name].requires_grad}
        subsets = (names, names & reinitialized, trained)
        rows.append(Row(part, *(sum(parameters[name].numel() for name in subset) for subset in subsets)))
    return Selection(rows)


def _block(name):
    """Returns the block that a parameter belongs to: conv_in, time_embedding, down_blocks.0, ..."""
    return re.match(r"\w+(\.\d+)?", name)[0]
