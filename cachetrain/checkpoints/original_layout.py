"""The original key layouts of Stable Diffusion and SDXL: names of tensors and settings, converted from diffusers'.

diffusers itself converts only in the other direction. Each name is checked with that conversion, which must return
the diffusers name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from cachetrain.diffusion.noise_schedulers import objective_of

if TYPE_CHECKING:
    import torch

# Prefixes of the components; SDXL's are those of its first and second text encoder.
UNET = "model.diffusion_model."
VAE = "first_stage_model."
TEXT = "cond_stage_model.transformer.text_model."
SDXL_TEXT = ("conditioner.embedders.0.transformer.text_model.", "conditioner.embedders.1.model.")

_UNET_PART = re.compile(
    r"(?:down_blocks|up_blocks|mid_block)(?:\.(\d+))?\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)"
)
_UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_VAE_PART = re.compile(
    r"(encoder|decoder)\.(down|mid|up)_blocks?(?:\.(\d+))?\."
    r"(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)"
)
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
# Names of the VAE's attention in diffusers until 2023, which the repositories of Stable Diffusion still use.
_VAE_DEPRECATED = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def unet_names(shapes: dict[str, tuple], config: dict) -> dict[str, str]:
    """Returns {diffusers name: original name without prefix} of a UNet's tensors.

    Args:
        shapes: {diffusers name: shape}; encoder_hid_proj, which has no original name, is left out.
        config: config of the UNet2DConditionModel.

    Raises:
        ValueError: a tensor has no place in the layout.
    """
    from diffusers.loaders.single_file_utils import DIFFUSERS_TO_LDM_MAPPING, convert_ldm_unet_checkpoint

    known, layers = DIFFUSERS_TO_LDM_MAPPING["unet"]["layers"], config["layers_per_block"]
    if config.get("addition_embed_type") == "text_time":
        known = known | DIFFUSERS_TO_LDM_MAPPING["unet"]["addition_embed_type"]
    shapes = {key: shape for key, shape in shapes.items() if not key.startswith("encoder_hid_proj.")}
    names = {key: known.get(key) or _unet_name(key, layers, shapes) for key in shapes}
    _check_inverse("unet", names, shapes, UNET, lambda file: convert_ldm_unet_checkpoint(file, config))
    return names


def vae_names(shapes: dict[str, tuple], config: dict) -> dict[str, str]:
    """Returns {diffusers name: original name without prefix} of an AutoencoderKL's tensors; see `unet_names`."""
    from diffusers.loaders.single_file_utils import DIFFUSERS_TO_LDM_MAPPING, convert_ldm_vae_checkpoint

    known, blocks = DIFFUSERS_TO_LDM_MAPPING["vae"], len(config["block_out_channels"])
    current = {key: _current_vae_name(key) for key in shapes}
    names = {key: known.get(name) or _vae_name(name, blocks) for key, name in current.items()}
    _check_inverse(
        "vae",
        {current[key]: name for key, name in names.items()},
        {current[key]: vae_shape(names[key], shape) for key, shape in shapes.items()},
        VAE,
        lambda file: convert_ldm_vae_checkpoint(file, config),
    )
    return names


def text_names(keys: Iterable[str]) -> dict[str, str]:
    """Returns {transformers name: original name without prefix} of CLIP's text tower; other tensors are left out."""
    # Versions of transformers 5 differ in whether they save the text tower with the prefix "text_model.".
    names = {key: key.removeprefix("text_model.") for key in keys if "position_ids" not in key}
    tower = ("embeddings.", "encoder.", "final_layer_norm.")
    return {key: name for key, name in names.items() if name.startswith(tower)}


def open_clip_tensors(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Returns the tensors of a CLIPTextModelWithProjection under open_clip's names, in its shapes.

    open_clip keeps queries, keys and values in one tensor, and the projection transposed: [in, out]. logit_scale,
    which encoding does not use and transformers does not keep, is CLIP's upper limit, ln 100: strict loaders expect
    the key.
    """
    import torch
    from diffusers.loaders.single_file_utils import DIFFUSERS_TO_LDM_MAPPING

    mapping = DIFFUSERS_TO_LDM_MAPPING["openclip"]
    result = {"logit_scale": torch.tensor(math.log(100))}
    for key, tensor in tensors.items():
        if key in mapping["layers"]:
            result[mapping["layers"][key]] = tensor.T if key == "text_projection.weight" else tensor
        elif match := re.fullmatch(r"(.+\.self_attn)\.q_proj\.(weight|bias)", key):
            attention, kind = match.groups()
            joined = torch.cat([tensors[f"{attention}.{part}_proj.{kind}"] for part in "qkv"])
            result[_open_clip_name(attention, mapping) + f".in_proj_{kind}"] = joined
        elif not re.search(r"\.[kv]_proj\.|position_ids$", key):
            result[_open_clip_name(key, mapping)] = tensor
    return result


def _open_clip_name(key, mapping):
    for ours, theirs in mapping["transformer"].items():
        key = key.replace(ours, theirs)
    return f"transformer.{key}"


def original_config(unet: dict, vae: dict, scheduler, scale_factor: float) -> dict:
    """Returns the config of the original repository (as v1-inference.yaml).

    Args:
        unet, vae: complete diffusers configs.
        scheduler: diffusers scheduler.
        scale_factor: of the latents.
    """
    width, size, heads = unet["block_out_channels"], vae["block_out_channels"], unet["attention_head_dim"]
    if not isinstance(heads, int) and len(set(heads)) == 1:
        heads = heads[0]
    unet_config = {
        "image_size": unet["sample_size"], "in_channels": unet["in_channels"], "out_channels": unet["out_channels"],
        "model_channels": width[0], "channel_mult": [channels // width[0] for channels in width],
        "attention_resolutions": [2**i for i, kind in enumerate(unet["down_block_types"]) if "CrossAttn" in kind],
        "num_res_blocks": unet["layers_per_block"], "use_spatial_transformer": True,
        "transformer_depth": unet["transformer_layers_per_block"],
        # diffusers calls the number of heads attention_head_dim.
        **({"num_heads": heads} if isinstance(heads, int) else {"num_head_channels": width[0] // heads[0]}),
        "use_linear_in_transformer": unet["use_linear_projection"],
        "context_dim": unet["cross_attention_dim"], "use_checkpoint": False, "legacy": False,
    }  # fmt: skip
    vae_config = {
        "double_z": True, "z_channels": vae["latent_channels"], "resolution": vae["sample_size"],
        "in_channels": vae["in_channels"], "out_ch": vae["out_channels"], "ch": size[0],
        "ch_mult": [channels // size[0] for channels in size], "num_res_blocks": vae["layers_per_block"],
        "attn_resolutions": [], "dropout": 0.0,
        **({} if vae["mid_block_add_attention"] else {"attn_type": "none"}),
    }  # fmt: skip
    params = {
        "parameterization": "v" if objective_of(scheduler) == "v_prediction" else "eps",
        "linear_start": scheduler.config.beta_start, "linear_end": scheduler.config.beta_end,
        "timesteps": scheduler.config.num_train_timesteps, "num_timesteps_cond": 1, "log_every_t": 200,
        "first_stage_key": "jpg", "cond_stage_key": "txt", "image_size": unet["sample_size"],
        "channels": unet["in_channels"], "cond_stage_trainable": False, "conditioning_key": "crossattn",
        "scale_factor": scale_factor, "use_ema": False,
        "unet_config": {"target": "ldm.modules.diffusionmodules.openaimodel.UNetModel", "params": unet_config},
        "first_stage_config": {
            "target": "ldm.models.autoencoder.AutoencoderKL",
            "params": {"embed_dim": vae["latent_channels"], "ddconfig": vae_config,
                       "lossconfig": {"target": "torch.nn.Identity"}},
        },
        "cond_stage_config": {"target": "ldm.modules.encoders.modules.FrozenCLIPEmbedder"},
    }  # fmt: skip
    return {"model": {"target": "ldm.models.diffusion.ddpm.LatentDiffusion", "params": params}}


def _check_inverse(part, names, shapes, prefix, read_original):
    """Checks that diffusers converts each original name back to the diffusers name.

    Args:
        part: "unet" or "vae".
        names: {diffusers name: original name, or None if there is none}.
        shapes: {diffusers name: shape in the original file}.
        prefix: prefix of the original names.
        read_original: diffusers' conversion, function of {name: tensor} that returns {name: tensor}.

    Raises:
        ValueError: a tensor has no original name, or is not converted back.
    """
    import torch

    lost = [key for key, name in names.items() if name is None]
    if not lost:
        # Each tensor is filled with its number; expand() needs no memory.
        file = {
            prefix + name: torch.tensor(float(n)).expand(shapes[key]) for n, (key, name) in enumerate(names.items())
        }
        numbers = {key: tensor[(0,) * tensor.ndim] for key, tensor in read_original(file).items()}
        lost = [key for n, key in enumerate(names) if key not in numbers or numbers[key] != n]
    if lost:
        raise ValueError(
            f"{part}: no place in the original Stable Diffusion layout for {lost[0]} "
            f"({len(lost)} of {len(names)} tensors)"
        )


def _unet_name(key, layers, keys):
    match = _UNET_PART.fullmatch(key)
    if match is None:
        return None
    block, part, index, rest = int(match[1] or 0), match[2], int(match[3]), match[4]
    if part == "resnets":
        module, _, tail = rest.partition(".")
        rest = f"{_UNET_RESNET.get(module, module)}.{tail}"
    if key.startswith("mid_block"):
        return f"middle_block.{2 * index + (part == 'attentions')}.{rest}"
    if part == "downsamplers":  # a separate input block after the resnets; input block 0 is conv_in
        return f"input_blocks.{(block + 1) * (layers + 1)}.0.op.{rest.removeprefix('conv.')}"
    if part == "upsamplers":  # the last module of the last output block, after the attention if there is one
        has_attention = any(other.startswith(f"up_blocks.{block}.attentions.") for other in keys)
        return f"output_blocks.{block * (layers + 1) + layers}.{2 if has_attention else 1}.{rest}"
    number = block * (layers + 1) + index
    side = f"input_blocks.{1 + number}" if key.startswith("down") else f"output_blocks.{number}"
    return f"{side}.{1 if part == 'attentions' else 0}.{rest}"


def _vae_name(key, blocks):
    match = _VAE_PART.fullmatch(key)
    if match is None:
        return None
    half, side, block, part, index, rest = match.groups()
    if part == "attentions":
        module, _, tail = rest.rpartition(".")
        return f"{half}.mid.attn_{int(index) + 1}.{_VAE_ATTENTION.get(module, module)}.{tail}"
    rest = rest.replace("conv_shortcut", "nin_shortcut")
    if side == "mid":
        return f"{half}.mid.block_{int(index) + 1}.{rest}"
    # The original numbers the blocks of encoder and decoder from full resolution to low resolution.
    where = f"{half}.{side}.{blocks - 1 - int(block) if side == 'up' else block}"
    return f"{where}.block.{index}.{rest}" if part == "resnets" else f"{where}.{side}sample.{rest}"


def _current_vae_name(key):
    """Replaces a deprecated name of the VAE's attention by the current one."""
    head, _, module = key.rpartition("attentions.0.")
    name, _, tail = module.rpartition(".")
    return f"{head}attentions.0.{_VAE_DEPRECATED[name]}.{tail}" if head and name in _VAE_DEPRECATED else key


def vae_shape(name: str | None, shape: tuple) -> tuple:
    """Returns the original shape of a VAE tensor: projections in attention are 1x1 convolutions there."""
    return (*shape, 1, 1) if name and ".attn_" in name and len(shape) == 2 else tuple(shape)
