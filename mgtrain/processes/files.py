"""Files that are written whole or not at all, whether the disk is full or the process is killed."""

import errno
import hashlib
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

LONGEST = 255 - len("..tmp")  # bytes of a name that may become part of that of a temporary file


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Write a file atomically: the block writes to a temporary path, which replaces `path` unless the block fails.

    Makes the folder. The file gets the permissions of a new one, whatever the block does. The block writes to devices
    and pipes themselves. An `OSError` names `path`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if path.exists() and not path.is_file():
        yield path
        return
    name = os.fsencode(path.name)
    short = path.name if len(name) <= LONGEST else hashlib.blake2b(name, digest_size=16).hexdigest()
    temporary = path.with_name(f".{short}.tmp")
    try:
        temporary.touch()
        mode = stat.S_IMODE(temporary.stat().st_mode)
        yield temporary
        temporary.chmod(mode)
        temporary.replace(path)
    except BaseException as error:
        with suppress(OSError):  # there may be nothing to delete
            temporary.unlink()
        if isinstance(error, OSError) and str(error.filename) == str(temporary):
            error.filename = str(path)
        raise


def write_whole(path: Path, content: bytes) -> None:
    """Write bytes to a file atomically; makes its folder. An `OSError` names `path`."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)
