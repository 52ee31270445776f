"""Makes the projection from T5's width to the UNet's, as a frozen component or as a layer of the UNet."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cachetrain.log import counted
from cachetrain.modeling import load

if TYPE_CHECKING:
    import torch

    from cachetrain.modeling.t5_projection import T5Projection

HERE = Path(__file__).parent

# For scaling a projection when the user gives no captions; any plain English will do.
PLAIN_CAPTIONS = (
    "",
    "a photo of a cat",
    "a man riding a bicycle through a crowded street at night",
    "an oil painting of mountains above a lake, with a small wooden boat in the foreground",
    "two red apples on a white plate next to a glass of water",
    "portrait of an old woman laughing, black and white, shallow depth of field",
    "a small green triangle on the left on a yellow background",
    "aerial view of a city by the sea",
)


@dataclass(frozen=True)
class ProjectionOptions:
    """How to make the projection from T5's width to the UNet's.

    Attributes:
        captions: captions to fit the projection to by PCA; None: a random orthogonal projection.
        trained: make the projection a layer of the UNet, which trains with it, instead of a frozen component.
        dtype, device: for running T5; dtype None: float32.
    """

    captions: Sequence[str] | None = None
    trained: bool = False
    dtype: torch.dtype | None = None
    device: torch.device | str = "cpu"


def save_projection(stage: Path, projection: T5Projection) -> None:
    """Saves a projection as the frozen component projection/, with the code that diffusers needs to load it."""
    projection.save_pretrained(stage / "projection")
    shutil.copyfile(HERE / "t5_projection.py", stage / "projection" / "t5_projection.py")


def projection_into_unet(stage: Path, projection: T5Projection) -> None:
    """Makes a projection the encoder_hid_proj layer of the UNet in unet/; all other weights are unchanged."""
    scale, linear = projection.config.scaling_factor, projection.linear
    linear.load_state_dict({name: scale * tensor for name, tensor in linear.state_dict().items()})
    unet = load.load_unet(stage / "unet")
    unet.encoder_hid_proj = linear
    unet.register_to_config(encoder_hid_dim=linear.in_features, encoder_hid_dim_type="text_proj")
    shutil.rmtree(stage / "unet")  # the old weights may be in files that save_pretrained does not replace
    unet.save_pretrained(stage / "unet")


def make_projection(model_dir: Path, width: int, seed: int, options: ProjectionOptions) -> T5Projection:
    """Makes the projection for a model directory that has text_encoder/ and tokenizer/.

    With captions: the `width` leading principal components of their hidden states, centered. Without: a random
    orthogonal map (orthonormal rows), which preserves distances as well as `width` dimensions can. Both are scaled to
    unit standard deviation over the captions (PLAIN_CAPTIONS if none are given).

    Args:
        width: the UNet's cross_attention_dim.
        seed: seed of the random orthogonal map.

    Raises:
        ValueError: T5's hidden states are narrower than `width`, or the captions have too few tokens to fit to.
    """
    import torch

    from cachetrain.modeling.t5_projection import T5Projection
    from cachetrain.modeling.text_encoders import TextEncoder

    encoder = TextEncoder(model_dir, options.device, options.dtype or torch.float32, raw=True)
    captions = options.captions or PLAIN_CAPTIONS
    hidden = torch.cat([encoder.encode_ids(encoder.tokenize([caption])[0])[0].float() for caption in captions])
    features = hidden.shape[1]
    if features < width:
        raise ValueError(
            f"T5's hidden states have width {features}, expected at least the UNet's {width}; use a larger T5"
        )
    if options.captions and len(hidden) <= width:
        raise ValueError(
            f"{counted(len(options.captions), 'caption')} with {counted(len(hidden), 'token')}: too few to fit a "
            f"projection to width {width}; use captions with more tokens than that, or omit --fit_captions"
        )
    projection = T5Projection(features, width)
    bias = torch.zeros(width)
    if options.captions:
        mean = hidden.mean(0)
        values, vectors = torch.linalg.eigh(torch.cov(hidden.T, correction=0))
        weight = vectors[:, values.argsort(descending=True)[:width]].T
        bias = -weight @ mean
    else:
        weight = torch.empty(width, features)
        torch.nn.init.orthogonal_(weight, generator=torch.Generator().manual_seed(seed))
    projection.linear.load_state_dict({"weight": weight.contiguous(), "bias": bias})
    projection.register_to_config(scaling_factor=1 / (hidden @ weight.T + bias).std().item())
    return projection.eval().requires_grad_(False)
