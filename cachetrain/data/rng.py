"""The random draws of training, each a pure function of (seed, epoch, sample, repeat in the epoch, purpose).

Philox is counter-based (Salmon et al. 2011): each draw has its own stream, so no draw depends on the order of the
samples, the number of workers or ranks, or on other draws.
"""

import numpy as np

ORDER, NOISE, TIMESTEP, DROPOUT, FLIP, OFFSET, STRATA, REPEATS, VALIDATION, ADAPTER_DROPOUT, VARIANT = range(11)
CROP, SIZE = 11, 12


def generator(seed: int, epoch: int, sample: int, purpose: int, repeat: int = 0) -> np.random.Generator:
    """Returns the generator for one purpose (a constant above) and one sample.

    Args:
        repeat: how often the sample has come up in this epoch, from 0.
    """
    return np.random.Generator(np.random.Philox(key=seed, counter=[0, purpose + (repeat << 8), sample, epoch]))


def permutation(seed: int, epoch: int, length: int) -> np.ndarray:
    """Returns the order of an epoch: a permutation of range(length), int64."""
    return generator(seed, epoch, 0, ORDER).permutation(length)


def epoch_order(seed: int, epoch: int, repeats: np.ndarray, choices: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Returns the samples of an epoch, in training order.

    Args:
        repeats: float32 [N], how often each sample comes up in an epoch, on average; the fractional part is the
            probability of one more repeat, drawn anew for each epoch.
        choices: each visit draws one of so many consecutive samples, which have the same `repeats`.

    Returns:
        (samples, repeats), int64 [M] each: the sample, and how often the sample has come up in this epoch, from 0;
        with choices, how often one of those it was drawn from has.
    """
    order, groups, numbers = _visits(seed, epoch, repeats[::choices])
    if choices == 1:
        return groups[order], numbers[order]
    drawn = generator(seed, epoch, 0, SIZE).random(len(groups))  # by group and visit, whatever the order
    return (groups * choices + (drawn * choices).astype(np.int64))[order], numbers[order]


def _visits(seed, epoch, repeats):
    """Returns (order, samples, repeats), int64 [M] each; `order` is the permutation of the other two."""
    if (repeats == 1).all():
        samples = np.arange(len(repeats))
        return permutation(seed, epoch, len(repeats)), samples, np.zeros_like(samples)
    floor = np.floor(repeats)
    drawn = generator(seed, epoch, 0, REPEATS).random(len(repeats), dtype=np.float32)
    counts = (floor + (drawn < repeats - floor)).astype(np.int64)
    samples = np.repeat(np.arange(len(repeats)), counts)
    numbers = np.arange(len(samples)) - np.repeat(np.cumsum(counts) - counts, counts)
    return permutation(seed, epoch, len(samples)), samples, numbers
