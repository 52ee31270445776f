"""The frozen map from T5's width to the UNet's. Copied into model directories, so it imports nothing of ours."""

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin


class T5Projection(ModelMixin, ConfigMixin):
    """`scaling_factor * (W x + b)`: T5 hidden states [B, T, in_features] -> [B, T, out_features].

    W has orthonormal rows (random, or principal components of a caption set, then b centers); scaling_factor is
    1/std of the result, so that the UNet's cross-attention sees unit variance as it does with CLIP.
    """

    @register_to_config
    def __init__(self, in_features: int, out_features: int, scaling_factor: float = 1.0):
        super().__init__()
        self.linear = torch.nn.Linear(in_features, out_features)

    def forward(self, hidden_states):
        return self.linear(hidden_states) * self.config.scaling_factor
