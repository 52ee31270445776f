"""Steps whose loss or gradients are not finite: no weight, moment or average sees them, and their files are named."""

from pathlib import Path

import torch

from cachetrain.log import warn

QUARANTINE = "quarantine.tsv"


def backward_seed(loss: torch.Tensor) -> torch.Tensor:
    """The gradient that backpropagation of a 0-dim loss starts with: 1, or nan where the loss is not finite.

    With nan all gradients of that pass are nan, so once they have been reduced every rank sees the bad loss.
    """
    return torch.where(loss.isfinite(), torch.ones_like(loss), torch.nan)


def step_if_finite(
    optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, finite: torch.Tensor
) -> bool | torch.Tensor:
    """Steps, unless the gradients are not finite: weights and moments then stay bit-for-bit as they are.

    An optimizer that can skip on the device (optimizers.Implementation.skips_on_device) is told there. For any other
    the host waits for the device here, once a step: to copy what the step would change, and back, would take longer.

    Args:
        optimizer: of optim.make_optimizer; one without `implementation` is taken for one that cannot skip.
        scaler: of optim.loss_scaler; with float16 it looks at the gradients itself.
        finite: bool 0-dim on the device, the same on all ranks.

    Returns:
        True or False where the host knows whether it stepped, else `finite`.
    """
    if scaler.is_enabled():
        scaler.step(optimizer)
        scaler.update()
        return finite
    if getattr(getattr(optimizer, "implementation", None), "skips_on_device", False):
        optimizer.found_inf = (~finite).float()  # as GradScaler does
        optimizer.step()
        return finite
    if not finite.item():  # the host waits here
        return False
    optimizer.step()
    return True


class NonfiniteSteps:
    """Names the files of steps that were skipped, and tells when there were too many in a row.

    Args:
        index: PairIndex.
        output_dir: of the run; the names are appended to its quarantine.tsv.
        world: World; all ranks see the same steps.
        limit: number of skipped steps in a row that end the run.
        scaled: float16's loss scaling skips steps with too large gradients as a matter of course, so that only losses
            count.
    """

    def __init__(self, index, output_dir: Path, world, limit: int, scaled: bool):
        self.index = index
        self.path = output_dir / QUARANTINE
        self.world = world
        self.limit = limit
        self.scaled = scaled
        self.in_a_row = 0
        self._steps = []
        self._parts = []
        self._last_skipped = None  # step

    def add(self, samples: torch.Tensor, loss: torch.Tensor) -> None:
        """Remembers a micro-batch until the next `read`.

        Args:
            samples: int64 [B], numbers of its pairs; loss: float32 [B]; on the device.
        """
        # All tensors of a batch share one block of memory, which a reference to one of them would keep.
        self._parts.append((samples.clone(), loss))

    def end_step(self, step: int, finite: torch.Tensor) -> None:
        """Ends a step. `finite`: as for step_if_finite."""
        self._steps.append((step, finite, self._parts))
        self._parts = []

    def read(self, num_skipped: int) -> bool:
        """Looks at the steps since the last call; to be called at a log step, by all ranks.

        Args:
            num_skipped: how many of them the statistics have counted as skipped; 0: nothing is read.

        Returns:
            whether `limit` steps in a row were skipped.
        """
        steps, self._steps = self._steps, []
        if not num_skipped:
            self.in_a_row = 0
            return False
        lines = []
        for step, finite, parts in steps:
            losses, samples = torch.cat([loss for _, loss in parts]), torch.cat([ids for ids, _ in parts])
            bad = ~losses.isfinite()  # the host waits here
            skipped = self.world.any(bool(bad.any()) or not (self.scaled or finite.item()))
            self.in_a_row = self.in_a_row + 1 if skipped else 0
            if skipped:
                self._last_skipped = step
                lines += self._lines(step, samples, losses, bad)
            if self.in_a_row >= self.limit:
                break
        self._write(lines)
        return self.in_a_row >= self.limit

    def advice(self) -> str:
        """What to say when `read` has found too many."""
        return (
            f"loss or gradients were not finite in {self.in_a_row} steps in a row, up to step {self._last_skipped}: "
            f"look at {self.path}, lower --lr or use --precision fp32, and resume with --resume_anyway"
        )

    def _lines(self, step, samples, losses, bad):
        """A line for each pair, of any rank, whose loss is not finite; if there is none, for each of the step."""
        pairs = list(zip(samples.tolist(), losses.tolist(), bad.tolist(), strict=True))
        pairs = [pair for part in self.world.gather(pairs) for pair in part]
        own = [(i, f"loss {loss}") for i, loss, is_bad in pairs if is_bad]
        named = own or [(i, "gradients of its step") for i, _, _ in pairs]
        paths = [(why, self.index.image_path(i), self.index.text_path(i)) for i, why in named]
        return [f"{step}\t{why}\t{image}\t{text}\n" for why, image, text in paths]

    def _write(self, lines):
        if not lines or not self.world.main:
            return
        steps = sorted({int(line.split("\t")[0]) for line in lines})
        message = f"loss or gradients were not finite at step {', '.join(map(str, steps[:5]))}"
        message += (f" and {len(steps) - 5} more" if len(steps) > 5 else "") + ": skipped, weights are as before"
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.writelines(lines)
            warn(f"{message}; {len(lines)} pairs are named in {self.path}")
        except OSError as error:
            warn(f"{message}; {self.path}: {error.strerror}, so here are its lines:\n{''.join(lines)}")
