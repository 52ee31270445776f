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
    samples, numbers = visits(seed, epoch, repeats)
    return permutation(seed, epoch, len(samples)), samples, numbers


def visits(seed: int, epoch: int, repeats: np.ndarray, start: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Returns the visits of an epoch to some pairs in a row, or to all of them, sorted.

    Args:
        repeats: float32 [N], how often each of them comes up in an epoch, on average.
        start: number of the first of them.

    Returns:
        (pairs, repeats), int64 [M] each: the pair, numbered from `start`, and how often it has come up, from 0.
    """
    pairs = np.arange(start, start + len(repeats))
    if (repeats == 1).all():
        return pairs, np.zeros_like(pairs)
    generator_of_all = generator(seed, epoch, 0, REPEATS)
    generator_of_all.bit_generator.advance(start // 8)  # each count of Philox gives eight float32
    drawn = generator_of_all.random(start % 8 + len(repeats), dtype=np.float32)[start % 8 :]
    floor = np.floor(repeats)
    counts = (floor + (drawn < repeats - floor)).astype(np.int64)
    pairs = np.repeat(pairs, counts)
    return pairs, np.arange(len(pairs)) - np.repeat(np.cumsum(counts) - counts, counts)
