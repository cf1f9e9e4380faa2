"""The errors a user can cause, and the exit code of each.

Every message is one line that says what was given, what is allowed and what to do. The command line prints it without
a traceback and exits with `exit_code`.
"""

import errno
import mmap
import re


class MgtrainError(Exception):
    """An error that the user can fix. Each subclass has an exit code, its own or that of its base."""

    exit_code = 1

    def __init_subclass__(cls, exit_code: int | None = None) -> None:
        cls.exit_code = exit_code or cls.exit_code


class RecipeError(MgtrainError, exit_code=2):
    """A recipe that cannot be read or does not make sense; the message starts with `file:line:`."""


class UsageError(MgtrainError, exit_code=2):
    """Arguments or options of a command that are invalid or contradict each other."""


class PlanError(MgtrainError, exit_code=2):
    """A schedule that cannot be carried out: a batch that does not divide, a shape the model refuses."""


class DataError(MgtrainError, exit_code=3):
    """A data set that cannot be used: a missing list, a bad line, too many broken videos."""


class VideoError(DataError):
    """A video that cannot be decoded. The loader replaces it, counts it and names it in the log."""


class CheckpointError(MgtrainError, exit_code=4):
    """A checkpoint or a file of a run that is missing, damaged, cannot be written, or belongs to another run."""


class NonFiniteError(MgtrainError, exit_code=5):
    """A loss that is NaN or infinite."""


class ThresholdError(MgtrainError, exit_code=6):
    """A result below a required threshold."""


class LackError(MgtrainError, exit_code=71):
    """The machine lacks memory, shared memory, files, processes or disk space, or its storage does not answer."""


class StoppedError(MgtrainError, exit_code=75):
    """A run that was asked to stop and has saved its state; --resume continues it."""


class RanksLostError(MgtrainError):
    """Another rank of the run has failed; its own message says why."""


class MissingCapabilityError(MgtrainError, exit_code=69):
    """The machine lacks something the command needs (a GPU, a library, a codec)."""


# What an exception of Python, torch, FFmpeg or the system says of a lack, and what to say of it: the first that fits.
LACKS = {
    r"CUDA (error: )?out of memory|CUDNN_STATUS_ALLOC_FAILED":
        "out of the GPU's memory; end other programs on it, or set hardware.memory_gib to less than it has free",
    r"shared memory|\bshm\b|</torch_|[Bb]us error":
        "out of shared memory; enlarge /dev/shm (docker run --shm-size=8g), or lower hardware.workers",
    r"Too many open files|received 0 items of ancdata":
        "too many open files; raise the limit (ulimit -n 65536), or lower hardware.workers",
    r"No space left on device|[Dd]isk quota exceeded|File too large|file write failed|failed writing file":
        "no disk space left; free some, or choose another disk",
    r"can't start new thread|Resource temporarily unavailable":
        "no further process or thread can be started; raise the limits (ulimit -u and -v), or lower hardware.workers",
    r"storage of the videos does not answer":
        "check its mount and its servers, then run again with --resume",
    r"allocate memory|not enough memory|bad_alloc|map segment|unable to mmap|[Oo]ut of memory":
        "out of memory; end other programs, raise the limit (ulimit -v), or lower hardware.workers or batch.clips",
}  # fmt: skip
NUMBERS = {errno.ENOMEM: "out of memory", errno.EAGAIN: "Resource temporarily unavailable"}


def lack_of(error: BaseException) -> LackError | None:
    """What the machine has run out of, if that is why an exception was raised; else None.

    >>> print(lack_of(OSError(24, "Too many open files")))
    too many open files; raise the limit (ulimit -n 65536), or lower hardware.workers ([Errno 24] Too many open files)
    """
    if isinstance(error, MgtrainError):
        return None
    words = (str(error).strip().splitlines() or [""])[-1]  # a loader process sends its traceback first
    number = error.errno if isinstance(error, OSError) else None
    text = f"{NUMBERS.get(number or 0, '')} {'out of memory' if isinstance(error, MemoryError) else ''} {words}"
    for pattern, advice in LACKS.items():
        if re.search(pattern, text):
            return LackError(f"{advice} ({words[:200] or type(error).__name__})")
    return None


def cause_of(error: BaseException) -> str:
    """What the system or FFmpeg says of an error, else the error's text."""
    return str(getattr(error, "strerror", None) or error)


def one_line(error: BaseException, most: int) -> str:
    """The error's text in one line of at most `most` characters."""
    return " ".join(str(error).split())[:most]


def short_of_memory() -> bool:
    """Whether this process cannot have even 64 MiB more: damaged files make libraries ask for more than that."""
    try:
        mmap.mmap(-1, 1 << 26).close()
    except OSError:
        return True
    return False
