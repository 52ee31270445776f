"""The dtypes of a model: of its weights, and of what it computes."""

from collections.abc import Callable

import torch

from cachetrain.modeling.lora import is_adapted

_COMPUTED = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast_for(device: torch.device, precision: str) -> Callable[[], torch.autocast]:
    """Returns a function that makes the autocast context for a precision.

    "bf16" and "fp16" compute in bfloat16 and float16, of float32 weights; "fp32" and "bf16_pure" compute in the
    dtype of the weights.
    """
    dtype = _COMPUTED.get(precision)
    return lambda: torch.autocast(device.type, dtype, enabled=dtype is not None)


def cast_weights(unet: torch.nn.Module, precision: str) -> None:
    """Gives the weights of a UNet, in place, the dtypes that they are trained in.

    float32, or bfloat16 with "bf16_pure". Frozen weights beside an adapter need no float32 copy: they have the dtype
    in which the precision computes.
    """
    trained = torch.bfloat16 if precision == "bf16_pure" else torch.float32
    frozen = _COMPUTED.get(precision, trained) if is_adapted(unet) else trained
    for parameter in unet.parameters():
        parameter.data = parameter.data.to(trained if parameter.requires_grad else frozen)
