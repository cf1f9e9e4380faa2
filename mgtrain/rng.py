"""The only place that makes random generators.

Every draw is keyed by what it is for (the run's seed, a clip's position, a step's number), never by when or where it
happens. So the same clip is cut whichever worker, rank or resumed process asks for it.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np


class Draw(IntEnum):
    """What a draw is for: draws with different purposes never share a key."""

    ORDER = 0  # the order of the videos in an epoch
    CUT = 1  # how a clip is cut
    REPLACEMENT = 2  # which video stands in for one that cannot be decoded
    STEP = 3  # dropout's mask in a step
    INIT = 4  # the model's first weights
    RECALIBRATION = 5  # the clips that recalibrate BatchNorm
    SYNTHETIC = 6  # synthetic videos
    RAND_AUGMENT = 7  # a clip's operations of RandAugment
    COLOUR = 8  # brightness, contrast, saturation and hue of a step's clips
    ERASE = 9  # the boxes erased from a step's clips
    MIX = 10  # how the pairs of a step's clips are mixed
    CHOICE = 11  # which videos are set apart for validation, or looked at as a sample
    PREPARE = 12  # the order in which videos are prepared
    NOISE = 13  # clips that an exported network is tried with


def generator(seed: int, draw: Draw, *key: int) -> np.random.Generator:
    """A generator for one purpose and one key, the same on every machine.

    >>> generator(1, Draw.CUT, 7).random() == generator(1, Draw.CUT, 7).random()
    True
    """
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, int(draw), *key])))


def seed_of(seed: int, draw: Draw, *key: int) -> int:
    """A 63-bit seed for generators of other libraries, for one purpose and one key."""
    return int(np.random.SeedSequence([seed, int(draw), *key]).generate_state(1, np.uint64)[0] >> np.uint64(1))
