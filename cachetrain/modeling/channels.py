"""Gives a UNet another number of latent channels: only conv_in and conv_out change."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from diffusers import UNet2DConditionModel


def change_channels(unet: UNet2DConditionModel, channels: int, way: str, seed: int = 0) -> None:
    """Replaces conv_in and conv_out, in place.

    Args:
        channels: C, of the new latents; the UNet has N.
        way:
            "repeat": channel j is a copy of channel j mod N, in conv_in divided by the number of copies. Where
                latents agree in all copies, the predictions do, too, and are those of the old UNet. With fewer
                channels than before, channel j takes in the old channels i with i mod C = j, and predicts their mean.
            "zero": the first N channels keep their weights, those of further channels are 0: the first N
                predictions are those of the old UNet, and the others are 0. With fewer channels, the last go.
            "fresh": both layers get new weights.
        seed: of "fresh".

    Raises:
        ValueError: the UNet takes or predicts something else beside latents.
    """
    import torch

    config = unet.config
    if config.in_channels != config.out_channels:
        raise ValueError(
            f"this UNet takes {config.in_channels} channels and predicts {config.out_channels}; --channels needs one "
            "that does nothing but denoise"
        )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        for name, is_output in (("conv_in", False), ("conv_out", True)):
            old = getattr(unet, name)
            new = _resized(old, channels, is_output)
            if way != "fresh":
                map_ = _repeated if way == "repeat" else _zeroed
                new.weight.copy_(map_(old.weight, channels, is_output))
                if new.bias is not None:
                    new.bias.copy_(map_(old.bias, channels, True) if is_output else old.bias)
            setattr(unet, name, new)
    unet.register_to_config(in_channels=channels, out_channels=channels)


def _resized(conv, channels, is_output):
    """A convolution like this one with initial weights and another number of output or input channels."""
    import torch

    sizes = (conv.in_channels, channels) if is_output else (channels, conv.out_channels)
    options = {"stride": conv.stride, "padding": conv.padding, "bias": conv.bias is not None}
    return torch.nn.Conv2d(*sizes, conv.kernel_size, **options).to(conv.weight)


def _repeated(old: torch.Tensor, channels: int, is_output: bool) -> torch.Tensor:
    """Weights of conv_in (channels: dimension 1), or weights or biases of conv_out (dimension 0)."""
    import torch

    old = old if is_output else old.transpose(0, 1)
    pairs = torch.arange(max(channels, len(old)), device=old.device)
    new = old.new_zeros(channels, *old.shape[1:]).index_add_(0, pairs % channels, old[pairs % len(old)])
    # Outputs are the mean over the places that a channel takes; inputs share a place evenly.
    taken = torch.bincount(pairs % (channels if is_output else len(old)))
    share = taken if is_output else taken[torch.arange(channels, device=old.device) % len(old)]
    new /= share.view(-1, *[1] * (new.ndim - 1))
    return new if is_output else new.transpose(0, 1)


def _zeroed(old: torch.Tensor, channels: int, is_output: bool) -> torch.Tensor:
    shape = (channels, *old.shape[1:]) if is_output else (old.shape[0], channels, *old.shape[2:])
    new = old.new_zeros(shape)
    kept = min(channels, old.shape[0 if is_output else 1])
    if is_output:
        new[:kept] = old[:kept]
    else:
        new[:, :kept] = old[:, :kept]
    return new
