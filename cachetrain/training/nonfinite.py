"""Skips optimizer steps whose loss or gradients are NaN or infinite, and lists the files of their samples, and those
of samples that cannot be read."""

import os
from pathlib import Path

import numpy as np
import torch

from cachetrain.log import append_line, counted, list_entry, warn
from cachetrain.reading import open_regular

QUARANTINE = "quarantine.tsv"
# A run ends when more pairs than both of these, or all pairs, cannot be read.
_MAX_UNREADABLE, _MAX_UNREADABLE_SHARE = 10, 0.1


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
    if hasattr(optimizer, "skipped"):  # GradientRelease: the backward pass has updated the weights, or skipped all
        optimizer.step()
        return not optimizer.skipped
    if getattr(getattr(optimizer, "implementation", None), "skips_on_device", False):
        optimizer.found_inf = (~finite).float()  # as GradScaler sets it
        optimizer.step()
        return finite
    if not finite.item():  # the host waits for the device
        return False
    optimizer.step()
    return True


class NonfiniteSteps:
    """Lists the files of skipped steps and unreadable pairs in quarantine.tsv, and decides when the run must end.

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
        self._faults = {}  # since the last `read`: {number of the pair: reason}
        self._last_fault = None
        self._unreadable = np.zeros(len(index), bool)  # on all ranks alike

    def add(self, batch: dict, loss: torch.Tensor) -> None:
        """Keeps a micro-batch until the next `read`.

        Args:
            batch: dict of data.batching.collate, on the device.
            loss: float32 [B], on the device.
        """
        # Cloned because all tensors of a batch share one block of memory, which a reference would keep alive.
        self._micro_batches.append((batch["samples"].clone(), loss))
        self._faults |= dict(batch["faults"])

    def end_step(self, step: int, finite: torch.Tensor) -> None:
        """Ends optimizer step `step`. `finite`: as for step_if_finite."""
        self._steps.append((step, finite, self._micro_batches))
        self._micro_batches = []

    def read(self, num_skipped: int, optimizer=None) -> bool:
        """Checks the steps since the last call and lists what was skipped. Called at log steps, by all ranks.

        Args:
            num_skipped: number of skipped steps since the last call, of Statistics; if 0, no tensor is read.
            optimizer: of the run; a GradientRelease is checked as well.

        Returns:
            whether the run must end: `limit` steps in a row were skipped, or too many pairs cannot be read.

        Raises:
            ValueError: of GradientRelease.check.
        """
        if hasattr(optimizer, "check"):
            optimizer.check()
        steps, self._steps = self._steps, []
        self._read_faults(steps[-1][0])
        if not num_skipped:
            self.in_a_row = 0
            return self._too_many_unreadable()
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
        if lines:
            numbers = sorted({int(line.split(b"\t")[0]) for line in lines})
            more = f" and {len(numbers) - 5} more" if len(numbers) > 5 else ""
            listed = ", ".join(map(str, numbers[:5])) + more
            message = f"loss or gradients were not finite at step {listed}: skipped, the weights have not changed"
            self._write(lines, message)
        return self.in_a_row >= self.limit or self._too_many_unreadable()

    def advice(self) -> str:
        """The error message for a run that must end."""
        if self._too_many_unreadable():
            return (
                f"{self._unreadable.sum()} of {counted(len(self.index), 'pair')} cannot be read, listed in "
                f"{self.path}; the last one: {self._last_fault}: restore the files, and continue with --resume latest"
            )
        return (
            f"loss or gradients were not finite in {counted(self.in_a_row, 'step')} in a row, up to step "
            f"{self._last_skipped}: check the files listed in {self.path}, lower --lr or use --precision fp32, and "
            "resume with --resume_anyway"
        )

    def _too_many_unreadable(self):
        limit = max(_MAX_UNREADABLE, _MAX_UNREADABLE_SHARE * len(self.index))
        return bool(self._unreadable.sum() > limit or self._unreadable.all())

    def _read_faults(self, step):
        """Lists the pairs that could not be read, on any rank, for the first time since the last call."""
        faults, self._faults = self._faults, {}
        if not self.world.any(bool(faults)):
            return
        faults = {number: reason for of_rank in self.world.gather(faults) for number, reason in of_rank.items()}
        new = [number for number in sorted(faults) if not self._unreadable[number]]
        if not new:
            return
        self._unreadable[new] = True
        self._last_fault = faults[new[-1]]
        lines = [self._line(step, f"unreadable: {faults[number]}", number) for number in new]
        message = f"up to step {step}, {counted(len(new), 'more pair')} could not be read ({faults[new[0]]}), "
        self._write(lines, message + "to be counted with weight 0")

    def _line(self, step, reason, number):
        paths = self.index.image_path(number), self.index.text_path(number)
        return b"\t".join([b"%d" % step, *map(list_entry, (reason, *paths))]) + b"\n"

    def _lines(self, step, samples, losses, bad):
        """Returns lines for quarantine.tsv: the pairs of all ranks with a bad loss; if none, all of the step."""
        pairs = list(zip(samples.tolist(), losses.tolist(), bad.tolist(), strict=True))
        pairs = [pair for of_rank in self.world.gather(pairs) for pair in of_rank]
        bad_losses = [(number, f"loss {loss}") for number, loss, is_bad in pairs if is_bad]
        listed = bad_losses or [(number, "gradients of its step") for number, _, _ in pairs]
        return [self._line(step, reason, number) for number, reason in listed]

    def _write(self, lines, message):
        if not self.world.main:
            return
        try:
            with open_regular(self.path, "ab") as file:
                append_line(file, b"".join(lines))
            warn(f"{message}; listed in {self.path}: {counted(len(lines), 'pair')}")
        except OSError as error:
            warn(f"{message}; {self.path}: {error.strerror}; the lines are:")
            for line in lines:
                warn(os.fsdecode(line).rstrip("\n"))
