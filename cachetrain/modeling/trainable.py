"""Which parts of a UNet are initialised anew and which are trained. Imports no torch before `apply`."""

import re
from typing import NamedTuple

from cachetrain import cli

# part: (pattern that is searched in the names of diffusers' UNet2DConditionModel, what it is). Attention is its own
# projections: a transformer block's norms, feed-forward, proj_in and proj_out belong to none of the attention parts.
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
    "up_blocks": (r"^up_blocks\.{}\.", "the up blocks of these numbers"),
    "down_blocks": (r"^down_blocks\.{}\.", "the down blocks of these numbers"),
    "mid_block": (r"^mid_block\.", "the middle block"),
    "norms": (r"norm\w*\.(weight|bias)$", "all group and layer norms"),
    "attention": REINIT["attention"],
    "attn2": REINIT["crossattn"],
    "text_proj": (r"^encoder_hid_proj\.", "the UNet's own projection of raw T5 embeddings"),
}


class Row(NamedTuple):
    """How many parameters a part has (of a flag, a block, all), and how many of them are new and are trained."""

    part: str
    parameters: int
    reinitialised: int
    trained: int


class Selection(NamedTuple):
    """What was chosen: a row per flag, then one per block, then the whole UNet. `str()` of it is a table."""

    rows: list[Row]

    def __str__(self):
        lines = [("part", "parameters", "re-initialised", "trained")]
        lines += [(row.part, *(f"{number:,}" for number in row[1:])) for row in self.rows]
        width = max(len(line[0]) for line in lines)
        return "\n".join(f"{a:{width}} {b:>15} {c:>15} {d:>15}" for a, b, c, d in lines)


def add_arguments(group) -> None:
    """Adds the flags --reinit_*, --unfreeze_* and --targetted_training to a group of an argparse parser."""
    for part, (_, text) in REINIT.items():
        group.add_argument(f"--reinit_{part}", action="store_true", help=f"give fresh initial values to {text}")
    for part, (pattern, text) in UNFREEZE.items():
        numbered = {"type": cli.count, "nargs": "+", "metavar": "N"} if "{}" in pattern else {"action": "store_true"}
        group.add_argument(f"--unfreeze_{part}", help=f"train only {text}", **numbered)
    group.add_argument(
        "--targetted_training", action="store_true", help="train only what --reinit_* and --unfreeze_* name"
    )


def apply(unet, args, seed, resumed=False):
    """Initialises parts of a UNet anew and freezes what is not to be trained. Call it before the UNet is wrapped.

    Without --unfreeze_* and --targetted_training everything trains. With either, only what the flags name trains;
    what was initialised anew always does, for a frozen random layer would never become a useful one.

    Args:
        unet: UNet2DConditionModel, any float dtype, on any device; changed in place.
        args: namespace with the flags of `add_arguments`.
        seed: of the new values, which are those of a fresh UNet of this seed (`load.fresh_unet`).
        resumed: the weights have been trained already: only freeze.

    Returns:
        Selection.

    Raises:
        ValueError: a flag names nothing of this UNet, or there is nothing to train.
    """
    reinit, unfreeze = _chosen(unet, args, "reinit", REINIT), _chosen(unet, args, "unfreeze", UNFREEZE)
    if args.targetted_training and not reinit and not unfreeze:
        raise ValueError("--targetted_training: nothing is named to train; add --reinit_* or --unfreeze_* flags")
    reinitialised = set().union(*reinit.values())
    if reinitialised and not resumed:
        _reinitialise(unet, reinitialised, seed)
    if unfreeze or args.targetted_training:
        trained = reinitialised.union(*unfreeze.values())
        for name, parameter in unet.named_parameters():
            parameter.requires_grad_(parameter.requires_grad and name in trained)
    return _selection(unet, reinit | unfreeze, reinitialised)


def _chosen(unet, args, verb, parts):
    """Returns {flag as it was given: set of parameter names}."""
    names = [name for name, _ in unet.named_parameters()]
    chosen = {}
    for part, (pattern, _) in parts.items():
        value = getattr(args, f"{verb}_{part}")
        numbers = [] if not value else [""] if value is True else value
        for number in numbers:
            flag = f"--{verb}_{part} {number}".strip()
            chosen[flag] = {name for name in names if re.search(pattern.format(number), name)}
            if not chosen[flag]:
                blocks = ", ".join(dict.fromkeys(map(_block, names)))
                raise ValueError(f"{flag}: this UNet has no such parameters; it has {blocks}")
    return chosen


def _reinitialise(unet, names, seed):
    """Copies tensors of a fresh UNet: every special initialisation, zeros included, is right by construction."""
    import torch

    from cachetrain.modeling import load

    fresh = load.fresh_unet(unet.config, seed).get_parameter
    with torch.no_grad():
        for name in names:
            unet.get_parameter(name).copy_(fresh(name))


def _selection(unet, flags, reinitialised):
    """Counts parameters: by flag, by block, and all."""
    parameters = dict(unet.named_parameters())
    blocks = {}
    for name in parameters:
        blocks.setdefault(_block(name), set()).add(name)
    rows = []
    for part, names in [*flags.items(), *blocks.items(), ("UNet", set(parameters))]:
        trained = {name for name in names if parameters[name].requires_grad}
        counted = (names, names & reinitialised, trained)
        rows.append(Row(part, *(sum(parameters[name].numel() for name in subset) for subset in counted)))
    return Selection(rows)


def _block(name):
    """conv_in, time_embedding, down_blocks.0, ...: the first parts of a parameter's name."""
    return re.match(r"\w+(\.\d+)?", name)[0]
