"""The frozen projection from T5's width to the UNet's.

This file is copied into model directories, so it must not import cachetrain.
"""

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin


class T5Projection(ModelMixin, ConfigMixin):
    """`scaling_factor * (W x + b)`: T5 hidden states [B, T, in_features] -> [B, T, out_features].

    W has orthonormal rows, either random or the principal components of a set of captions (then b centres the
    result). scaling_factor is 1 / (standard deviation of W x + b), so that the UNet's cross-attention gets unit
    variance as with CLIP.
    """

    @register_to_config
    def __init__(self, in_features: int, out_features: int, scaling_factor: float = 1.0):
        super().__init__()
        self.linear = torch.nn.Linear(in_features, out_features)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.linear(hidden_states) * self.config.scaling_factor
