"""How long a run is: what the flags say in steps or epochs, resolved into optimizer steps."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np


class Plan(NamedTuple):
    """Lengths in optimizer steps.

    Attributes:
        effective_batch: samples of one step, over all ranks.
        steps_per_epoch, validation_steps: floats.
        peak_lr: learning rate at its peak.
    """

    effective_batch: int
    steps_per_epoch: float
    max_steps: int
    warmup_steps: int
    decay_steps: int
    save_steps: int
    save_start: int
    validation_steps: float
    peak_lr: float

    def ends_epoch(self, step: int) -> bool:
        """Whether an epoch has come to its end within this step."""
        return int(step / self.steps_per_epoch) > int((step - 1) / self.steps_per_epoch)


def make_plan(args, samples_per_epoch: float, ranks: int) -> Plan:
    """Resolves epochs into steps, and what was not given into its default."""
    effective_batch = args.batch_size * args.gradient_accum * ranks
    per_epoch = samples_per_epoch / effective_batch
    max_steps = max(1, args.max_steps.resolve(per_epoch))
    # Slightly longer than the run, so that the learning rate ends above zero.
    decay_steps = args.lr_decay_steps.resolve(per_epoch) if args.lr_decay_steps else round(1.1 * max_steps)
    warmup_steps = args.warmup_steps.resolve(per_epoch) if args.warmup_steps else round(0.02 * decay_steps)
    return Plan(
        effective_batch=effective_batch,
        steps_per_epoch=per_epoch,
        max_steps=max_steps,
        warmup_steps=0 if args.scheduler == "constant" else warmup_steps,
        decay_steps=decay_steps,
        save_steps=max(1, args.save_steps.resolve(per_epoch)),
        save_start=args.save_start.resolve(per_epoch),
        validation_steps=max(1, args.val_steps.resolve(per_epoch)) if args.val_steps else max(1.0, per_epoch),
        peak_lr=args.learning_rate * (math.sqrt(effective_batch) if args.scale_lr else 1.0),
    )


def coverage(index, plan: Plan, global_batch: int) -> str:
    """One line on how often the run comes to each sample, and which sizes are too rare to fill a batch in it.

    Args:
        global_batch: samples of one backward pass, over all ranks.
    """
    num_samples = plan.max_steps * plan.effective_batch
    lines = [
        f"{num_samples / index.samples_per_epoch:.2f} epochs of {index.samples_per_epoch:,.0f} samples, "
        f"from {len(index):,} pairs"
    ]
    for number, shape in enumerate(index.shapes):
        share = float(index.repeats[index.shape_ids == number].sum(dtype=np.float64)) / index.samples_per_epoch
        fills = share * num_samples >= global_batch
        lines.append(f"{'x'.join(map(str, shape))}: {share:.1%}" + ("" if fills else ", NEVER FILLS A BATCH"))
    return "; ".join(lines)


def leftover(index, batch_sampler) -> str:
    """One line on what was not trained, at the end of a run."""
    waiting = ", ".join(
        f"{count} of {'x'.join(map(str, index.shapes[shape]))}"
        for shape, count in sorted(batch_sampler.waiting.items())
    )
    never = int((~batch_sampler.trained & (index.repeats > 0)).sum())
    line = f"coverage: {len(index) - never:,} of {len(index):,} pairs trained"
    return line + (f"; waiting for a full batch: {waiting}" if waiting else "")
