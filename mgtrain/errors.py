"""The errors a user can cause, and the exit code of each.

Every message is one line that says what was given, what is allowed and what to do. The command line prints it without
a traceback and exits with `exit_code`.
"""

from __future__ import annotations


class MgtrainError(Exception):
    """An error that the user can fix. Each subclass has an exit code."""

    exit_code = 1


class RecipeError(MgtrainError):
    """A recipe that cannot be read or does not make sense; the message starts with `file:line:`."""

    exit_code = 2


class UsageError(MgtrainError):
    """Arguments or options of a command that are invalid or contradict each other."""

    exit_code = 2


class PlanError(MgtrainError):
    """A schedule that cannot be carried out: a batch that does not divide, a shape the model refuses."""

    exit_code = 2


class DataError(MgtrainError):
    """A data set that cannot be used: a missing list, a bad line, too many broken videos."""

    exit_code = 3


class VideoError(DataError):
    """A video that cannot be decoded. The loader replaces it, counts it and names it in the log."""


class CheckpointError(MgtrainError):
    """A checkpoint or run directory that is missing, damaged or belongs to another run."""

    exit_code = 4


class NonFiniteError(MgtrainError):
    """A loss that is NaN or infinite."""

    exit_code = 5


class ThresholdError(MgtrainError):
    """A result below a required threshold."""

    exit_code = 6


class StoppedError(MgtrainError):
    """A run that was asked to stop and has saved its state; --resume continues it."""

    exit_code = 75


class RanksLostError(MgtrainError):
    """Another rank of the run has failed; its own message says why."""

    exit_code = 1


class MissingCapabilityError(MgtrainError):
    """The machine lacks something the command needs (a GPU, a library, a codec)."""

    exit_code = 69
