"""Exponential moving average (EMA) of the weights."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch

from cachetrain.distributed import local_shards


class Ema:
    """Exponential moving average of the trained weights, in float32, with warm-up of the decay.

    decay_t = min(decay, (1 + t) / (10 + t)), as TensorFlow's ExponentialMovingAverage(num_updates). Averages of
    sharded weights (fully_shard) are sharded in the same way.

    Args:
        parameters: the trained parameters, of any float dtype.
        decay: in [0, 1).
        device: device of the averages; default: that of the parameters. "cpu" saves device memory, but every update
            then waits until the weights have been copied, unless `sources` are already on the CPU.
        sources: tensors to average in place of `parameters`, equal to the parameters after each optimizer step
            (CpuOffload.cpu_parameters).

    Attributes:
        averages: float32 tensors, in the order of `parameters`.
    """

    def __init__(
        self,
        parameters: Iterable[torch.nn.Parameter],
        decay: float,
        device: torch.device | str | None = None,
        sources: Iterable[torch.Tensor] | None = None,
    ):
        self.decay = decay
        self._parameters = list(parameters)
        self._sources = self._parameters if sources is None else list(sources)
        self.averages = [p.detach().to(device or p.device, torch.float32, copy=True) for p in self._parameters]
        pairs = zip(self._sources, self.averages, strict=True)
        self._same_type = all(source.dtype == a.dtype and source.device == a.device for source, a in pairs)

    @torch.no_grad()
    def update(self, step: int, stepped: bool | torch.Tensor = True) -> None:
        """Updates the averages after optimizer step `step` (from 1).

        Args:
            stepped: result of nonfinite.step_if_finite; a skipped step does not change the averages.
        """
        if stepped is False:
            return
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        averages, sources = local_shards(self.averages), local_shards(self._sources)
        if stepped is not True:  # a tensor, not read by the host: lerp by 0 changes no bit
            weight = weight * stepped.to(averages[0].device, torch.float32)
        elif self._same_type:
            torch._foreach_lerp_(averages, sources, weight)
            return
        for average, source in zip(averages, sources, strict=True):
            average.lerp_(source.to(average), weight)  # one float32 copy at a time, to save memory

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Replaces the parameters by the averages inside the block; the raw weights are restored bit for bit."""
        with torch.no_grad():
            parameters, averages = local_shards(self._parameters), local_shards(self.averages)
            raw = [p.to(a.device, copy=True) for p, a in zip(parameters, averages, strict=True)]
        try:
            _copy(parameters, averages)
            yield
        finally:
            _copy(parameters, raw)

    def named(self, unet: torch.nn.Module) -> dict[str, torch.Tensor]:
        """Returns {name of the parameter in `unet`: float32 average}."""
        names = {parameter: name for name, parameter in unet.named_parameters()}
        return {names[parameter]: average for parameter, average in zip(self._parameters, self.averages, strict=True)}


@torch.no_grad()
def _copy(targets, sources):
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source)
