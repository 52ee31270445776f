"""Every random draw of training: a pure function of (seed, epoch, sample, purpose).

Philox is counter-based (Salmon et al. 2011): each draw has its own stream, so nothing depends on the order in
which samples are visited, the number of workers or ranks, or on what else was drawn.
"""

import numpy as np

ORDER, NOISE, TIMESTEP, DROPOUT, FLIP, OFFSET, STRATA = range(7)


def generator(seed, epoch, sample, purpose):
    """Returns the numpy Generator of one purpose (a constant above) of one visit to one sample."""
    return np.random.Generator(np.random.Philox(key=seed, counter=[0, purpose, sample, epoch]))


def permutation(seed, epoch, length):
    """Returns the order of an epoch: a permutation of range(length), int64."""
    return generator(seed, epoch, 0, ORDER).permutation(length)
