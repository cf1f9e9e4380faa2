"""The only place that makes random generators.

Every draw is keyed by its purpose, the run's seed, and a clip's position or a step's number, never by when or where it
happens. So every worker, rank or resumed process cuts the same clip.
"""

from enum import IntEnum

import numpy as np


class Draw(IntEnum):
    """The purpose of a draw; draws with different purposes never share a key."""

    ORDER = 0  # the order of the videos in an epoch
    CUT = 1  # how a clip is cut
    REPLACEMENT = 2  # which video replaces one that cannot be decoded
    STEP = 3  # the dropout mask of a step
    INIT = 4  # the model's initial weights
    RECALIBRATION = 5  # the clips that recalibrate BatchNorm
    SYNTHETIC = 6  # synthetic videos
    RAND_AUGMENT = 7  # RandAugment operations of a clip
    COLOUR = 8  # brightness, contrast, saturation and hue of a step's clips
    ERASE = 9  # the boxes erased from a step's clips
    MIX = 10  # how the pairs of a step's clips are mixed
    CHOICE = 11  # which videos are held out for validation, or sampled
    PREPARE = 12  # the order in which videos are prepared
    NOISE = 13  # clips that test an exported network
    BALANCE = 14  # the order of a class's videos where data.balance repeats them
    BOOTSTRAP = 15  # how often each replicate has a video, for the error of mean average precision


def generator(seed: int, draw: Draw, *key: int) -> np.random.Generator:
    """A generator for one purpose and one key, the same on every machine.

    >>> generator(1, Draw.CUT, 7).random() == generator(1, Draw.CUT, 7).random()
    True
    """
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, int(draw), *key])))


def seed_of(seed: int, draw: Draw, *key: int) -> int:
    """A 63-bit seed for generators of other libraries, for one purpose and one key."""
    return int(np.random.SeedSequence([seed, int(draw), *key]).generate_state(1, np.uint64)[0] >> np.uint64(1))
