"""The exponential moving average of the weights."""

from contextlib import contextmanager

import torch

from cachetrain.distributed import local_parts


class Ema:
    """Exponential moving average of trained weights in float32, with warm-up of the decay.

    decay_t = min(decay, (1 + t) / (10 + t)), as TensorFlow's ExponentialMovingAverage(num_updates). Sharded weights
    (fully_shard) have sharded averages: every rank averages its own part.

    Args:
        parameters: the trained parameters, any float dtype; frozen ones need no average.
        decay: in [0, 1).
        device: where the averages live; default: beside the parameters. "cpu" saves device memory, but every update
            then waits for the weights to arrive, unless `sources` are on the CPU already.
        sources: tensors equal to the parameters after each optimizer step, to average instead of them
            (CpuOffload.cpu_parameters).
    """

    def __init__(self, parameters, decay, device=None, sources=None):
        self.decay = decay
        self._parameters = list(parameters)
        self._sources = self._parameters if sources is None else list(sources)
        self.averages = [p.detach().to(device or p.device, torch.float32, copy=True) for p in self._parameters]
        pairs = zip(self._sources, self.averages, strict=True)
        self._alike = all(source.dtype == a.dtype and source.device == a.device for source, a in pairs)

    @torch.no_grad()
    def update(self, step, stepped=True):
        """Moves the averages towards the weights after optimizer step `step` (from 1).

        Args:
            stepped: of guard.step_if_finite: a step that was skipped leaves the averages as they are.
        """
        if stepped is False:
            return
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        averages, sources = local_parts(self.averages), local_parts(self._sources)
        if stepped is not True:  # known to the device only; lerp by 0 changes no bit
            weight = weight * stepped.to(averages[0].device, torch.float32)
        elif self._alike:
            torch._foreach_lerp_(averages, sources, weight)
            return
        for average, source in zip(averages, sources, strict=True):
            average.lerp_(source.to(average), weight)  # one float32 copy at a time

    @contextmanager
    def applied(self):
        """Puts the averages into the parameters, and the raw weights back bit by bit, also after an exception."""
        with torch.no_grad():
            parameters, averages = local_parts(self._parameters), local_parts(self.averages)
            raw = [p.to(a.device, copy=True) for p, a in zip(parameters, averages, strict=True)]
        try:
            _copy(parameters, averages)
            yield
        finally:
            _copy(parameters, raw)

    def named(self, unet):
        """{name of the parameter in `unet`: its average, float32}."""
        names = {parameter: name for name, parameter in unet.named_parameters()}
        return {names[parameter]: average for parameter, average in zip(self._parameters, self.averages, strict=True)}


@torch.no_grad()
def _copy(targets, sources):
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source)
