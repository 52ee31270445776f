"""The validation loss: on pairs held out from training, always with the same noise and timesteps."""

from collections.abc import Callable
from contextlib import nullcontext

import numpy as np
import torch

from cachetrain.data.dataset import SampleKey
from cachetrain.data.loader import make_loader, on_device
from cachetrain.log import counted, warn

QUANTILES = 4
_PATIENCE = 5  # validations without improvement before a warning
_GOLDEN_RATIO = (5**0.5 - 1) / 2


class FixedBatches:
    """A batch sampler that draws every sample once in each of QUANTILES equal ranges of timesteps.

    All quantiles thus have the same samples. Within a quantile, the timesteps of successive samples follow the
    low-discrepancy sequence of the golden ratio. Nothing depends on the seed, the epoch or the number of ranks.

    A batch is a list of SampleKey, all of one latent shape.

    Args:
        shape_ids: int [N], the latent shape of each sample.
        batch_size: samples in a batch of one rank.
        rank: this rank.
        ranks: number of ranks.
    """

    def __init__(self, shape_ids: np.ndarray, batch_size: int, rank: int = 0, ranks: int = 1):
        self.batch_size = batch_size
        self.rank = rank
        self.ranks = ranks
        # Arrays in place of a list of batches: no Python object per sample.
        self._order = np.argsort(shape_ids, kind="stable")
        ends = np.cumsum(np.bincount(shape_ids)) * QUANTILES
        starts = np.concatenate([[0], ends[:-1]])
        self._bounds = [
            (first, min(first + batch_size, end))
            for start, end in zip(starts.tolist(), ends.tolist(), strict=True)
            for first in range(start, end, batch_size)
        ]

    def __len__(self):
        """Number of batches, the same on every rank: a forward pass of a sharded model needs all ranks."""
        return -(-len(self._bounds) // self.ranks)

    def __iter__(self):
        return (self.batch(number) for number in range(len(self)))

    def batch(self, number: int) -> list[SampleKey]:
        """Returns batch `number` of this rank."""
        first, end = self._bounds[self._global_number(number) % len(self._bounds)]
        return [self._key(position) for position in range(first, end)]

    def counts(self, number: int) -> bool:
        """Whether batch `number` of this rank counts. Batches that only fill up the last round of ranks do not."""
        return self._global_number(number) < len(self._bounds)

    def _global_number(self, number):
        return number * self.ranks + self.rank

    def _key(self, position):
        sample, quantile = int(self._order[position // QUANTILES]), position % QUANTILES
        within = (0.5 + sample * _GOLDEN_RATIO) % 1.0
        # The quantile is used as the epoch, so that the noise differs between quantiles.
        return SampleKey(quantile, sample, uniform=(quantile + within) / QUANTILES)


class Validation:
    """Measures `val/loss`, without changing the state of training or of global random number generators.

    Args:
        run: Run; batches have the size of training batches.
        pairs: CachedPairs of the validation pairs, without dropout and flips, and with seed 0 in every run.
    """

    def __init__(self, run, pairs):
        self.every_n_steps = run.plan.validation_steps
        # The plain loss is then reported beside the one that is trained.
        self.weighted = run.weighted
        self.device = run.device
        self.world = run.world
        self._batches = FixedBatches(pairs.index.shape_ids, run.args.batch_size, run.world.rank, run.world.ranks)
        self._loader = make_loader(pairs, self._batches, min(2, run.args.num_workers), run.device.type == "cuda")
        self._faults = {}  # of the current measurement: {number of the pair: reason}
        self._left_out = set()
        self._best = float("inf")
        self._num_stale = 0  # validations since the best loss
        self._warned = False

    def state_dict(self) -> dict:
        """Returns the state of the plateau warning, JSON-able."""
        return {"best": self._best, "stale": self._num_stale, "told": self._warned}

    def load_state_dict(self, state: dict) -> None:
        self._best = state["best"]
        self._num_stale = state["stale"]
        self._warned = state["told"]

    def due(self, step: int, max_steps: int) -> bool:
        """Whether to validate after optimizer step `step`."""
        return step // self.every_n_steps > (step - 1) // self.every_n_steps or step == max_steps

    def measure(self, unet: torch.nn.Module, forward: Callable, step: int, ema=None) -> dict[str, float]:
        """Measures the validation loss. Called by all ranks; the host waits for the device here.

        Args:
            unet: UNet2DConditionModel, not its distributed wrapper.
            forward: function of (unet, batch on the device), returns `loss` and `squared_error`, float32 [B] each.
            step: optimizer steps done.
            ema: Ema, to measure the averaged weights too, or None.

        Returns:
            {tag: value}: val/loss, val/loss_q1 (least noise) to val/loss_q4; val/loss_raw if losses are weighted;
            with EMA also val/loss_ema, val/loss_ema_q1 to val/loss_ema_q4.
        """
        loss, raw = self._means(unet, forward, nullcontext())
        values = _by_quantile("val/loss", loss)
        if self.weighted:
            values["val/loss_raw"] = raw.mean()
        if ema is not None:
            values |= _by_quantile("val/loss_ema", self._means(unet, forward, ema.applied())[0])
        values = {tag: float(value) for tag, value in values.items()}
        self._warn_of_faults()
        self._check_plateau(values.get("val/loss_ema", values["val/loss"]), step)
        return values

    @torch.no_grad()
    def _means(self, unet, forward, weights):
        """Returns the means of `loss` and `squared_error` in each quantile, float64 numpy [2, QUANTILES].

        Args:
            weights: context manager in which the UNet has the weights to measure.
        """
        sums = torch.zeros(3, QUANTILES, dtype=torch.float64, device=self.device)
        training = unet.training
        with weights, torch.compiler.set_stance("force_eager"):  # each batch size would compile another graph
            unet.eval()
            try:
                for number, batch in enumerate(on_device(self._loader, self.device)):
                    result = forward(unet, batch)
                    if self._batches.counts(number):
                        quantiles = torch.tensor([key.epoch for key in self._batches.batch(number)])
                        values = [result.loss, result.squared_error, torch.ones_like(result.loss)]
                        values = (torch.stack(values) * batch["weights"]).double()
                        self._faults |= dict(batch["faults"])
                        sums.index_add_(1, quantiles.to(self.device, non_blocking=True), values)
            finally:
                unet.train(training)
        sums = self.world.sum(sums).cpu().numpy()
        with np.errstate(invalid="ignore"):  # nan where no sample could be read
            return sums[:2] / sums[2]

    def _warn_of_faults(self):
        """Warns of the pairs that could not be read, on any rank; of each pair once in a run."""
        faults = {number: reason for faults in self.world.gather(self._faults) for number, reason in faults.items()}
        self._faults = {}
        new = faults.keys() - self._left_out
        self._left_out |= new
        if new:
            left_out = counted(len(new), "pair")
            warn(f"left out of the validation loss, which shifts it: {left_out}, the first: {faults[min(new)]}")

    def _check_plateau(self, loss, step):
        """Warns once in a run, on rank 0, if the loss has stopped improving."""
        self._num_stale = 0 if loss < self._best else self._num_stale + 1
        self._best = min(self._best, loss)
        if self._num_stale == _PATIENCE and self.world.main and not self._warned:
            self._warned = True
            warn(
                f"the validation loss has not improved in {_PATIENCE} validations (step {step}: {loss:.5f}, best "
                f"{self._best:.5f}); further training may only memorize the training data"
            )


def _by_quantile(tag, loss):
    """Returns {tag: mean, tag_q1: first quantile, ...} of losses, float [QUANTILES]."""
    return {tag: loss.mean()} | {f"{tag}_q{quantile + 1}": value for quantile, value in enumerate(loss)}
