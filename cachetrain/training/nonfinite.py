"""Skips optimizer steps whose loss or gradients are NaN or infinite, and lists the files of their samples."""

from pathlib import Path

import torch

from cachetrain.log import warn

QUARANTINE = "quarantine.tsv"


def backward_seed(loss: torch.Tensor) -> torch.Tensor:
    """Returns the gradient to start the backward pass of a 0-dim loss with: 1, or nan if the loss is not finite.

    nan makes all gradients of the backward pass nan, so that every rank notices the bad loss once gradients have been
    reduced.
    """
    return torch.where(loss.isfinite(), torch.ones_like(loss), torch.nan)


def step_if_finite(
    optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, finite: torch.Tensor
) -> bool | torch.Tensor:
    """Steps the optimizer if the gradients are finite; otherwise weights and optimizer state do not change by a bit.

    Optimizers with optimizers.Implementation.skips_on_device skip the step on the device. For the others the host
    waits for the device here, once a step; saving and restoring what a step changes would take longer.

    Args:
        optimizer: of optim.make_optimizer; without an `implementation`, it is assumed not to skip on the device.
        scaler: of optim.loss_scaler; with float16 it checks the gradients itself.
        finite: bool 0-dim on the device, whether the gradients are finite; the same on all ranks.

    Returns:
        whether the optimizer has stepped: True or False if the host knows, else `finite`.
    """
    if scaler.is_enabled():
        scaler.step(optimizer)
        scaler.update()
        return finite
    if getattr(getattr(optimizer, "implementation", None), "skips_on_device", False):
        optimizer.found_inf = (~finite).float()  # as GradScaler sets it
        optimizer.step()
        return finite
    if not finite.item():  # the host waits for the device
        return False
    optimizer.step()
    return True


class NonfiniteSteps:
    """Lists the files of skipped steps in quarantine.tsv, and counts skipped steps in a row.

    Args:
        index: PairIndex.
        output_dir: of the run; quarantine.tsv is written there.
        world: World.
        limit: number of skipped steps in a row that ends the run.
        scaled: whether float16 loss scaling is on. Scaling overflows the gradients now and then, so that only
            steps with a loss that is not finite count as skipped.

    Attributes:
        in_a_row: number of skipped steps in a row, up to the last `read`.
    """

    def __init__(self, index, output_dir: Path, world, limit: int, scaled: bool):
        self.index = index
        self.path = output_dir / QUARANTINE
        self.world = world
        self.limit = limit
        self.scaled = scaled
        self.in_a_row = 0
        self._steps = []
        self._micro_batches = []  # (sample numbers, losses) of the current step
        self._last_skipped = None  # step number

    def add(self, samples: torch.Tensor, loss: torch.Tensor) -> None:
        """Keeps a micro-batch until the next `read`.

        Args:
            samples: int64 [B], numbers of the pairs, on the device.
            loss: float32 [B], on the device.
        """
        # Cloned because all tensors of a batch share one block of memory, which a reference would keep alive.
        self._micro_batches.append((samples.clone(), loss))

    def end_step(self, step: int, finite: torch.Tensor) -> None:
        """Ends optimizer step `step`. `finite`: as for step_if_finite."""
        self._steps.append((step, finite, self._micro_batches))
        self._micro_batches = []

    def read(self, num_skipped: int) -> bool:
        """Checks the steps since the last call and lists the skipped ones. Called at log steps, by all ranks.

        Args:
            num_skipped: number of skipped steps since the last call, of Statistics; if 0, no tensor is read.

        Returns:
            whether `limit` steps in a row were skipped.
        """
        steps, self._steps = self._steps, []
        if not num_skipped:
            self.in_a_row = 0
            return False
        lines = []
        for step, finite, micro_batches in steps:
            samples, losses = (torch.cat(tensors) for tensors in zip(*micro_batches, strict=True))
            bad = ~losses.isfinite()
            # The host waits for the device here.
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
        """The error message for `limit` skipped steps in a row."""
        return (
            f"loss or gradients were not finite in {self.in_a_row} steps in a row, up to step {self._last_skipped}: "
            f"check the files listed in {self.path}, lower --lr or use --precision fp32, and resume with "
            "--resume_anyway"
        )

    def _lines(self, step, samples, losses, bad):
        """Returns lines for quarantine.tsv: the pairs of all ranks with a bad loss; if none, all of the step."""
        pairs = list(zip(samples.tolist(), losses.tolist(), bad.tolist(), strict=True))
        pairs = [pair for of_rank in self.world.gather(pairs) for pair in of_rank]
        bad_losses = [(number, f"loss {loss}") for number, loss, is_bad in pairs if is_bad]
        listed = bad_losses or [(number, "gradients of its step") for number, _, _ in pairs]
        return [
            f"{step}\t{reason}\t{self.index.image_path(number)}\t{self.index.text_path(number)}\n"
            for number, reason in listed
        ]

    def _write(self, lines):
        if not lines or not self.world.main:
            return
        steps = sorted({int(line.split("\t")[0]) for line in lines})
        more = f" and {len(steps) - 5} more" if len(steps) > 5 else ""
        message = f"loss or gradients were not finite at step {', '.join(map(str, steps[:5]))}{more}: "
        message += "skipped, the weights have not changed"
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.writelines(lines)
            warn(f"{message}; {len(lines)} pairs are listed in {self.path}")
        except OSError as error:
            warn(f"{message}; {self.path}: {error.strerror}; the lines are:\n{''.join(lines)}")
