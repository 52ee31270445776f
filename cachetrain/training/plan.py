"""Lengths of a run: converts the flags, in steps or epochs, into optimizer steps."""

from __future__ import annotations

import math
from argparse import Namespace
from typing import NamedTuple

from cachetrain.log import counted


class Plan(NamedTuple):
    """Lengths of a run, in optimizer steps unless noted.

    Attributes:
        effective_batch: samples in one step, over all ranks.
        steps_per_epoch: need not be whole.
        max_steps: length of the run.
        warmup_steps: length of the learning rate's warm-up.
        decay_steps: steps until the final learning rate is reached, warm-up included.
        save_steps: steps between scheduled checkpoints.
        save_start: first step with scheduled checkpoints.
        validation_steps: steps between validations; need not be whole.
        peak_lr: peak learning rate.
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
        """Whether an epoch ends within optimizer step `step`."""
        return int(step / self.steps_per_epoch) > int((step - 1) / self.steps_per_epoch)


def make_plan(args: Namespace, samples_per_epoch: float, ranks: int) -> Plan:
    """Converts epochs into steps, and fills in defaults."""
    effective_batch = args.batch_size * args.gradient_accum * ranks
    per_epoch = samples_per_epoch / effective_batch
    max_steps = max(1, args.max_steps.resolve(per_epoch))
    # By default slightly longer than the run, so that the learning rate ends above zero.
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


def planned_coverage(index, plan: Plan, global_batch: int) -> str:
    """Describes, in one line, the epochs of the run and the share of each latent shape.

    A shape with too few samples to fill a batch during the run is marked: its samples are never trained.

    Args:
        index: PairIndex of the training pairs.
        plan: Plan.
        global_batch: samples in one backward pass, over all ranks.
    """
    num_samples = plan.max_steps * plan.effective_batch
    parts = [
        f"{num_samples / index.samples_per_epoch:.2f} epochs of {counted(round(index.samples_per_epoch), 'sample')}, "
        f"from {counted(index.num_pairs, 'pair')}"
    ]
    for shape, visits in zip(index.shapes, index.visits.tolist(), strict=True):
        share = visits / index.samples_per_epoch
        fills = share * num_samples >= global_batch
        parts.append(f"{'x'.join(map(str, shape))}: {share:.1%}" + ("" if fills else ", NEVER FILLS A BATCH"))
    return "; ".join(parts)


def data_coverage(index, batch_sampler) -> str:
    """Describes, in one line at the end of a run, how many pairs were trained and how many wait for a full batch.

    Args:
        index: PairIndex of the training pairs.
        batch_sampler: BatchSampler of the run.
    """
    waiting = ", ".join(
        f"{count} of {'x'.join(map(str, index.shapes[shape]))}"
        for shape, count in sorted(batch_sampler.waiting.items())
    )
    untrained = ~batch_sampler.trained & (index.repeats > 0)
    num_untrained = int(untrained.reshape(-1, index.sizes).all(1).sum())  # at any of its sizes
    line = f"coverage: {index.num_pairs - num_untrained:,} of {counted(index.num_pairs, 'pair')} trained"
    return line + (f"; waiting for a full batch: {waiting}" if waiting else "")
