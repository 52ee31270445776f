"""Every random draw of training: a pure function of (seed, epoch, sample, visit in the epoch, purpose).

Philox is counter-based (Salmon et al. 2011): each draw has its own stream, so nothing depends on the order in
which samples are visited, the number of workers or ranks, or on what else was drawn.
"""

import numpy as np

ORDER, NOISE, TIMESTEP, DROPOUT, FLIP, OFFSET, STRATA, REPEATS = range(8)


def generator(seed, epoch, sample, purpose, repeat=0):
    """Returns the numpy Generator of one purpose (a constant above) of one visit to one sample.

    Args:
        repeat: which visit of the epoch, from 0, where an epoch visits a sample several times.
    """
    return np.random.Generator(np.random.Philox(key=seed, counter=[0, purpose + (repeat << 8), sample, epoch]))


def permutation(seed, epoch, length):
    """Returns the order of an epoch: a permutation of range(length), int64."""
    return generator(seed, epoch, 0, ORDER).permutation(length)


def visits(seed, epoch, weights):
    """Returns the visits of an epoch in their order.

    Args:
        weights: float32 [N], the mean number of visits to each sample; their fractions are drawn for each epoch.

    Returns:
        (samples, repeats), int64 [M] each: which sample, and its how manieth visit of this epoch, from 0.
    """
    if (weights == 1).all():
        samples = permutation(seed, epoch, len(weights))
        return samples, np.zeros_like(samples)
    whole = np.floor(weights)
    drawn = generator(seed, epoch, 0, REPEATS).random(len(weights), dtype=np.float32)
    counts = (whole + (drawn < weights - whole)).astype(np.int64)
    samples = np.repeat(np.arange(len(weights)), counts)
    repeats = np.arange(len(samples)) - np.repeat(np.cumsum(counts) - counts, counts)
    order = permutation(seed, epoch, len(samples))
    return samples[order], repeats[order]
