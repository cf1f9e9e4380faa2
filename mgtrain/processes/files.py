"""Files that are written whole or not at all, whether the disk is full or the process is killed."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Write a file atomically: the block writes to a temporary path, which replaces `path` unless the block fails.

    Makes the folder. An `OSError` names `path`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        yield temporary
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
