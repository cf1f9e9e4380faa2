"""Read all videos of a data set as training does, and decode each frame, in processes that a bad video may crash.

The status of a video is one of

    ok        usable
    short     usable, but with fewer frames than its container or stretch says or than the base clip spans, or with
              missing frames; the frame before repeats
    corrupt   it cannot be opened, or decoding ends well before its end
    crash     it kills the process that decodes it
    timeout   decoding takes too long
    missing   there is no such file

The manifest has a line for each video; a second run checks only videos that are new, changed, timed out or were
missing. With `data.checked`, `fit` skips unusable videos.
"""

import os
import stat
from collections.abc import Iterable
from contextlib import suppress
from functools import partial
from pathlib import Path

from mgtrain.clips.cut import VideoInfo, cut_views
from mgtrain.clips.sources import open_source
from mgtrain.clips.storage import raise_unanswered
from mgtrain.console import ShowProgress, no_progress
from mgtrain.data.manifest import STATUSES, Manifest, Record, checksum
from mgtrain.data.stretch import file_of
from mgtrain.errors import DataError, VideoError, cause_of
from mgtrain.grid import Grid
from mgtrain.processes.isolated import Lost, isolated
from mgtrain.recipe import Clip

FEWER = 2  # frames that may be missing at the end: durations are rounded, and the last packet is often truncated


def check(
    root: str,
    paths: Iterable[str],
    file: Path,
    clip: Clip,
    workers: int,
    *,
    seconds: float,
    memory: int,
    fps: float | None = None,
    progress: ShowProgress = no_progress,
) -> list[Record]:
    """Check the videos at `paths`, relative to `root`; returns their records, which the manifest `file` keeps.

    `seconds` limits the time of a video, `memory` the bytes of a process. `fps` is the rate of folders of frames.
    Raises `DataError` if the manifest is another command's, or cannot be written.
    """
    paths = sorted(set(paths))
    manifest = Manifest(file)
    for record in manifest.records.values():
        if record.get("status") not in STATUSES or not record.keys() >= {"bytes", "mtime_ns"}:
            raise DataError(f"{file}: not a manifest of `mgtrain data check`; choose another file")
    todo = [path for path in paths if not _is_known(root, path, manifest.records.get(path))]
    checks = isolated(partial(check_video, root, clip=clip, fps=fps), todo, workers, seconds=seconds, memory=memory)
    with manifest:
        for done, (path, found) in enumerate(checks, start=len(paths) - len(todo) + 1):
            if isinstance(found, Lost):
                found = {**_file_facts(root, path), "status": found.kind, "message": found.cause}
            manifest.add(found)
            progress("videos checked", done, len(paths))
    return manifest.of(paths)


def check_video(root: str, path: str, clip: Clip, fps: float | None = None) -> Record:
    """Read a whole video; returns its record. Raises `LackError` if its storage does not answer."""
    facts = _file_facts(root, path)
    whole = os.path.join(root, path)
    try:
        with open_source(whole, fps) as video:
            info = video.info
            decodable, damage = video.decodable(), video.damage
            grid = Grid(clip.frames, clip.crop, (clip.stride, clip.stride), (clip.short_side[0], clip.short_side[0]))
            video.read(cut_views(grid, info, times=2, crops=1, fps=clip.fps))
        facts |= {"frames": decodable, "fps": info.fps, "width": info.width, "height": info.height}
        if os.path.isfile(whole):  # a long file is not read once more for every stretch of it
            facts["sha256"] = checksum(Path(whole))
        status, message = judge(info, decodable, damage, clip)
        if status == "ok" and video.lacking:
            status, message = "short", video.lacking
    except (VideoError, OSError, MemoryError) as error:
        raise_unanswered(whole, error)
        missing = isinstance(error.__cause__ or error, FileNotFoundError | NotADirectoryError)
        status = "missing" if missing else "corrupt"
        message = cause_of(error).removeprefix(f"{whole}: ").partition(";")[0] or "out of memory"
    return {**facts, "status": status, "message": message}


def judge(info: VideoInfo, decodable: int, damage: str, clip: Clip) -> tuple[str, str]:
    """Status and message of a video with `decodable` of the frames in `info`, up to the error `damage`, if any.

    >>> clip = Clip(frames=8, stride=8, crop=224, short_side=(256, 320), fps=30)
    >>> judge(VideoInfo(300, 30.0, 340, 256), 300, "", clip)
    ('ok', '')
    >>> judge(VideoInfo(60, 30.0, 340, 256), 60, "", clip)
    ('short', '60 frames, the base clip spans 64')
    >>> judge(VideoInfo(300, 30.0, 340, 256), 120, "", clip)
    ('short', '120 of 300 frames decode')
    >>> judge(VideoInfo(300, 30.0, 340, 256), 120, "Invalid data", clip)
    ('corrupt', 'Invalid data after 120 of 300 frames')
    """
    span = round(clip.frames * clip.stride * info.fps / clip.fps)
    lacks = decodable < info.frames - FEWER
    if damage and lacks:
        return "corrupt", f"{damage} after {decodable} of {info.frames} frames"
    if lacks:
        return "short", f"{decodable} of {info.frames} frames decode"
    if decodable < span:
        return "short", f"{decodable} frames, the base clip spans {span}"
    return "ok", ""


def _file_facts(root: str, path: str) -> Record:
    """A video's record before it is read; size and time are 0 unless it is a regular file or a folder."""
    facts = {"path": path, "status": "", "frames": 0, "fps": 0.0, "width": 0, "height": 0, "bytes": 0, "mtime_ns": 0}
    with suppress(OSError, ValueError):
        status = os.stat(file_of(os.path.join(root, path)))
        if stat.S_IFMT(status.st_mode) in (stat.S_IFREG, stat.S_IFDIR):
            facts |= {"bytes": status.st_size, "mtime_ns": status.st_mtime_ns}
    return {**facts, "sha256": "", "message": ""}


def _is_known(root: str, path: str, record: Record | None) -> bool:
    if record is None or record["status"] in ("timeout", "missing"):
        return False
    now = _file_facts(root, path)
    return (now["bytes"], now["mtime_ns"]) == (record["bytes"], record["mtime_ns"])
