"""The loss on pairs that are not trained on, always with the same noise and timesteps."""

from contextlib import nullcontext

import numpy as np
import torch

from cachetrain.data.dataset import SampleKey
from cachetrain.data.loader import make_loader, on_device
from cachetrain.log import warn

QUANTILES = 4
_PATIENCE = 5
_GOLDEN_RATIO = (5**0.5 - 1) / 2


class FixedBatches:
    """Batches of SampleKey, of one latent shape each: every sample once in each of QUANTILES parts of the timesteps.

    So all quantiles are equally filled and hold the same samples. Within a quantile the timesteps of sample after
    sample follow the golden ratio's low-discrepancy sequence. Nothing depends on a seed, an epoch or the ranks.

    Args:
        shape_ids: int [N], the latent shape of each sample.
    """

    def __init__(self, shape_ids, batch_size, rank=0, ranks=1):
        self.batch_size = batch_size
        self.rank = rank
        self.ranks = ranks
        # Positions sorted by shape, and where each shape ends: no Python object per sample.
        self._order = np.argsort(shape_ids, kind="stable")
        ends = np.cumsum(np.bincount(shape_ids)) * QUANTILES
        starts = np.concatenate([[0], ends[:-1]])
        self._bounds = [
            (first, min(first + batch_size, end))
            for start, end in zip(starts.tolist(), ends.tolist(), strict=True)
            for first in range(start, end, batch_size)
        ]

    def __len__(self):
        """The same on every rank, for sharded models take their steps together."""
        return -(-len(self._bounds) // self.ranks)

    def __iter__(self):
        return (self.batch(number) for number in range(len(self)))

    def batch(self, number):
        """The rank's batch of that number, a list of SampleKey."""
        first, end = self._bounds[self._global(number) % len(self._bounds)]
        return [self._key(place) for place in range(first, end)]

    def counts(self, number):
        """Whether the batch counts: some ranks repeat one at the end, so that all take equally many steps."""
        return self._global(number) < len(self._bounds)

    def _global(self, number):
        return number * self.ranks + self.rank

    def _key(self, place):
        sample, quantile = int(self._order[place // QUANTILES]), place % QUANTILES
        within = (0.5 + sample * _GOLDEN_RATIO) % 1.0
        # The quantile stands in for the epoch, so that each has noise of its own.
        return SampleKey(quantile, sample, uniform=(quantile + within) / QUANTILES)


class Validation:
    """Measures `val/loss`. Draws only from generators of its own and touches no state of training.

    Args:
        run: Run; a forward pass takes a batch of training's size.
        pairs: CachedPairs of the validation pairs, made without dropout and flips, and with seed 0 in every run.
    """

    def __init__(self, run, pairs):
        self.every_n_steps = run.plan.validation_steps
        self.weighted = run.args.use_snr  # the plain loss is then reported beside the weighted one
        self.device = run.device
        self.world = run.world
        self._batches = FixedBatches(pairs.index.shape_ids, run.args.batch_size, run.world.rank, run.world.ranks)
        self._loader = make_loader(pairs, self._batches, min(2, run.args.num_workers), run.device.type == "cuda")
        self._best, self._stale, self._told = float("inf"), 0, False

    def state_dict(self):
        """What the notice about a plateau goes by, JSON-able."""
        return {"best": self._best, "stale": self._stale, "told": self._told}

    def load_state_dict(self, state):
        self._best, self._stale, self._told = state["best"], state["stale"], state["told"]

    def due(self, step, max_steps):
        """Whether to measure after optimizer step `step`."""
        return step // self.every_n_steps > (step - 1) // self.every_n_steps or step == max_steps

    def measure(self, unet, forward, step, ema=None):
        """Returns {tag: float}: val/loss, val/loss_q1 (least noise) to q4, of weighted losses val/loss_raw; with EMA
        val/loss_ema, val/loss_ema_q1 to q4. This is a place where the host waits for the device. All ranks take part.

        Args:
            unet: the module itself; its mode is put back.
            forward: function (unet, batch on the device) that returns `loss` and `squared_error`, float32 [B] each.
            ema: Ema, whose `applied()` puts the averages into `unet` for a while.
        """
        loss, raw = self._means(unet, forward, nullcontext())
        values = _by_quantile("val/loss", loss)
        if self.weighted:
            values["val/loss_raw"] = raw.mean()
        if ema is not None:
            values |= _by_quantile("val/loss_ema", self._means(unet, forward, ema.applied())[0])
        values = {tag: float(value) for tag, value in values.items()}
        self._watch(values.get("val/loss_ema", values["val/loss"]), step)
        return values

    @torch.no_grad()
    def _means(self, unet, forward, weights):
        """Means over each quantile: float64 numpy [2, QUANTILES], of the loss and of the plain squared error."""
        sums = torch.zeros(3, QUANTILES, dtype=torch.float64, device=self.device)
        training = unet.training
        with weights, torch.compiler.set_stance("force_eager"):  # its batch sizes would be compiled one by one
            unet.eval()
            try:
                for number, batch in enumerate(on_device(self._loader, self.device)):
                    result = forward(unet, batch)
                    if self._batches.counts(number):
                        quantiles = torch.tensor([key.epoch for key in self._batches.batch(number)])
                        values = [result.loss, result.squared_error, torch.ones_like(result.loss)]
                        values = torch.stack(values).double()
                        sums.index_add_(1, quantiles.to(self.device, non_blocking=True), values)
            finally:
                unet.train(training)
        sums = self.world.sum(sums).cpu().numpy()
        return sums[:2] / sums[2]

    def _watch(self, loss, step):
        """Says once, on the first rank, that the loss has stopped improving."""
        self._stale = 0 if loss < self._best else self._stale + 1
        self._best = min(self._best, loss)
        if self._stale == _PATIENCE and self.world.main and not self._told:
            self._told = True
            warn(
                f"the validation loss has not improved in {_PATIENCE} validations (step {step}: {loss:.5f}, best "
                f"{self._best:.5f}); from here on training may only memorise"
            )


def _by_quantile(tag, loss):
    """{tag: mean, tag_q1 ...: part} of float [QUANTILES]."""
    return {tag: loss.mean()} | {f"{tag}_q{quantile + 1}": mean for quantile, mean in enumerate(loss)}
