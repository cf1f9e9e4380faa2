"""Tell a storage that does not answer from a damaged file."""

import errno
import os

from mgtrain.errors import LackError, short_of_memory

# Errors of a network file system, which no damaged file causes.
STORAGE = {errno.ESTALE, errno.ETIMEDOUT, errno.ESHUTDOWN, errno.ENOTCONN, errno.EHOSTDOWN, errno.EHOSTUNREACH}
BLOCK = 1 << 20  # bytes


def does_not_answer(error: BaseException | None) -> bool:
    """Whether an error is that of a storage that does not answer."""
    return getattr(error, "errno", None) in STORAGE


def is_no_damage(error: BaseException) -> bool:
    """Whether an error is the storage's, not the file's. Raises `MemoryError` if it is for a lack of memory."""
    if getattr(error, "errno", None) == errno.ENOMEM and short_of_memory():
        raise MemoryError from error
    return does_not_answer(error)


def reading_error(file: int) -> OSError | None:
    """The error of reading an open file once, from its start to its end; None if all of it can be read."""
    place = 0
    try:
        while block := os.pread(file, BLOCK, place):
            place += len(block)
    except OSError as error:
        return error
    return None


def raise_unanswered(path: str | os.PathLike[str], error: BaseException) -> None:
    """Raise `LackError` if the storage does not answer, so that the video at `path` is not taken for a bad one."""
    for cause in (error, error.__cause__):
        if does_not_answer(cause):
            raise LackError(
                f"{os.fspath(path)}: the storage does not answer ({cause}); check its mount and its servers, then run "
                "the same command again"
            ) from error
