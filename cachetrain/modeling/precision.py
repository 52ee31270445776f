"""The dtype in which a model computes."""

from collections.abc import Callable

import torch


def autocast_for(device: torch.device, precision: str) -> Callable[[], torch.autocast]:
    """Returns a function that makes the autocast context for a precision.

    "bf16" and "fp16" compute in bfloat16 and float16 with float32 weights; "fp32" and "bf16_pure" compute in the
    dtype of the weights.
    """
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    return lambda: torch.autocast(device.type, dtype, enabled=dtype is not None)
