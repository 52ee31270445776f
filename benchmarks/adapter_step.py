#!/usr/bin/env -S python3 -P
"""Compares the CPU time of a training step with adapters and of the whole UNet.

    ./benchmarks/adapter_step.py

The UNet is SD1.5's with half of its width, so that all of it trains in 5 GB: in float32 on one thread, with latents
of 32x32 and a batch of one. The time is the least of four steps, after one that does not count.
"""

import time

from cachetrain import cli

CONFIG = {"sample_size": 32, "cross_attention_dim": 768, "block_out_channels": (160, 320, 640, 640)}
RANK = 16
WAYS = {
    "the whole UNet": None,
    "attention": {"targets": "attention"},
    "attention, DoRA": {"targets": "attention", "dora": True},
    "all": {"targets": "all"},
}


def parse_args(argv=None):
    return cli.parser(__doc__).parse_args(argv)


def step_s(adapter):
    """CPU seconds of a step; `adapter`: arguments of lora.add, or None."""
    import torch
    from diffusers import UNet2DConditionModel

    from cachetrain.modeling import lora
    from cachetrain.training.optim import make_optimizer

    torch.set_num_threads(1)
    torch.manual_seed(0)
    unet, times = UNet2DConditionModel(**CONFIG), []
    if adapter:
        lora.add(unet, RANK, float(RANK), **adapter)
    trained = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    optimizer = make_optimizer("adamw", trained, 1e-4, (0.9, 0.999), 0.01)
    inputs = torch.randn(1, 4, 32, 32), torch.tensor([500]), torch.randn(1, 77, 768)
    for _ in range(5):
        start = time.process_time()
        unet(*inputs).sample.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.process_time() - start)
    return min(times[1:])


def main(argv=None):
    parse_args(argv)
    whole = None
    for name, adapter in WAYS.items():
        seconds = step_s(adapter)
        whole = whole or seconds
        print(f"{name:18}{seconds:6.2f} s{seconds / whole:6.2f}", flush=True)
    return 0


if __name__ == "__main__":
    cli.run(main)
