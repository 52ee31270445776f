"""Steps whose loss or gradients are not finite: no weight, moment or average sees them, and their files are named."""

import torch

from cachetrain.log import warn

QUARANTINE = "quarantine.tsv"


def seed_of(loss):
    """What the backward pass of a 0-dim loss starts from: 1, or nan where the loss is not finite.

    Its gradients then are not finite either, and once they have been exchanged every rank sees that.
    """
    return torch.where(loss.isfinite(), torch.ones_like(loss), torch.nan)


def step_if_finite(optimizer, scaler, finite):
    """Steps, unless the gradients are not finite: weights and moments then stay as they are, bit by bit.

    torch's fused AdamW is told on the device. Every other optimizer is asked for by the host, which waits for the
    device here, once a step: to copy what it would change, and back, would take longer.

    Args:
        scaler: of optim.loss_scaler; with float16 it looks at the gradients itself.
        finite: bool 0-dim on the device, the same on all ranks.

    Returns:
        True or False where the host knows whether it stepped, else `finite`.
    """
    if scaler.is_enabled():
        scaler.step(optimizer)
        scaler.update()
        return finite
    if isinstance(optimizer, torch.optim.AdamW):
        optimizer.found_inf = (~finite).float()  # as GradScaler does
        optimizer.step()
        return finite
    if not finite.item():
        return False
    optimizer.step()
    return True


class Guard:
    """Names the files of steps that were skipped, and tells when there are too many in a row.

    Args:
        index: PairIndex.
        output_dir: of the run; the names go to quarantine.tsv there.
        world: World; all ranks see the same steps.
        limit: number of skipped steps in a row that end the run.
        scaled: with float16's loss scaling steps with too large gradients are skipped as a matter of course: only
            losses count.
    """

    def __init__(self, index, output_dir, world, limit, scaled):
        self.index, self.path, self.world = index, output_dir / QUARANTINE, world
        self.limit, self.scaled = limit, scaled
        self.in_a_row, self._steps, self._parts = 0, [], []
        self._last = None  # step that was skipped

    def add(self, samples, loss):
        """Remembers a micro-batch until the next `read`.

        Args:
            samples: int64 [B], numbers of its pairs; loss: float32 [B]; on the device.
        """
        self._parts.append((samples.clone(), loss))  # a batch's tensors are one memory: it must not be kept with them

    def end_step(self, step, finite):
        """Ends a step. `finite`: as for step_if_finite."""
        self._steps.append((step, finite, self._parts))
        self._parts = []

    def read(self, num_skipped):
        """Looks at the steps since the last call, at a log step. All ranks take part.

        Args:
            num_skipped: how many of them were skipped, as the statistics have counted; without any nothing is read.

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
                self._last = step
                lines += self._lines(step, samples, losses, bad)
            if self.in_a_row >= self.limit:
                break
        self._write(lines)
        return self.in_a_row >= self.limit

    def advice(self):
        """What to say when `read` has found too many."""
        return (f"loss or gradients were not finite in {self.in_a_row} steps in a row, up to step {self._last}: look "
                f"at {self.path}, lower --lr or use --precision fp32, and go on with --resume_anyway")  # fmt: skip

    def _lines(self, step, samples, losses, bad):
        """A line for each pair of any rank whose own loss is not finite; without any, for all of the step."""
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
