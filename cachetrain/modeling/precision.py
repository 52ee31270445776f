"""Which dtype a model computes in."""

import torch


def autocast_for(device, precision):
    """Returns a function that opens the autocast context of a precision.

    "bf16" and "fp16" compute in bfloat16 and float16 from float32 weights; "fp32" and "bf16_pure" compute in the
    dtype of the weights.
    """
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    return lambda: torch.autocast(device.type, dtype, enabled=dtype is not None)
