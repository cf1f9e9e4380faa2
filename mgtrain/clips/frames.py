"""Read clips from a folder of frames: only the pictures of a clip's own frames, and no more pixels than it needs.

A JPEG is decoded at 1/2, 1/4 or 1/8 of its size where a clip is no larger, so the cost of a clip shrinks with its grid,
as the network's does. Pillow decodes, or simplejpeg where it is installed: the same pixels in 55 to 76 % of the time,
since both are libjpeg-turbo.
"""

import io
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import replace
from importlib import import_module

import numpy as np
from PIL import Image

from mgtrain.clips.cut import Cut, VideoInfo, wanted_frames
from mgtrain.clips.decode import MAX_PIXELS
from mgtrain.clips.pictures import Pictures, clips_by, clips_of
from mgtrain.clips.stages import stage
from mgtrain.clips.storage import does_not_answer
from mgtrain.data.frames import list_frames
from mgtrain.errors import VideoError, cause_of

try:
    decode_jpeg: Callable[..., np.ndarray] | None = import_module("simplejpeg").decode_jpeg
except ImportError:
    decode_jpeg = None

SHRUNK = (8, 4, 2)  # what a JPEG's width and height may be divided by; the results are rounded up
FORMATS = ("JPEG", "PNG", "BMP", "WEBP")


class FrameFolder(AbstractContextManager["FrameFolder"]):
    """An open folder of frames, read like a `VideoFile`. `fps` is the rate at which its frames were taken."""

    first = 0  # number of its first frame in what is at `path`
    damage = lacking = ""  # what ended `decodable` early, and which frames are missing

    def __init__(self, path: str | os.PathLike[str], fps: float | None) -> None:
        self.path = os.fspath(path)
        self._frames = list_frames(self.path)
        if fps is None:
            raise VideoError(f"{self.path}: a folder of frames has no frame rate; set data.fps to that of the frames")
        with self._opened(0) as picture:
            self.codec, (width, height) = str(picture.format).lower(), picture.size
        self.info = VideoInfo(len(self._frames), fps, width, height)

    def __exit__(self, *_: object) -> None:
        pass

    @property
    def nbytes(self) -> int:
        """The bytes of all pictures."""
        with os.scandir(self.path) as entries:
            return sum(entry.stat().st_size for entry in entries)

    def read(self, cuts: Sequence[Cut]) -> list[np.ndarray]:
        """The clips, each uint8 (T, crop, crop, 3) RGB, of pictures shrunk as far as none is enlarged later."""
        return clips_by(self._shrink, self._read, cuts)

    def _read(self, by: int, cuts: Sequence[Cut]) -> list[np.ndarray]:
        pictures = ((self._picture(index, by), (index,)) for index in wanted_frames(cuts))
        return clips_of([self._smaller(cut, by) for cut in cuts], pictures)

    def pictures(self, wanted: Sequence[int]) -> Pictures:
        """Frames as uint8 (H, W, 3) RGB, each with the wanted number that it stands for."""
        return ((self._picture(index, 1), (index,)) for index in wanted)

    def decodable(self, wanted: range | None = None) -> int:
        """The number of frames that can be decoded, of all or the wanted ones; `damage` says what ended it early."""
        count, self.damage = 0, ""
        wanted = range(self.info.frames) if wanted is None else wanted
        self.lacking = self._frames.gaps(wanted)
        try:
            for index in wanted:
                self._picture(index, 1)
                count += 1
        except VideoError as error:
            if does_not_answer(error.__cause__):
                raise
            self.damage = str(error).removeprefix(f"{self.path}/").partition(";")[0]
        return count

    def _shrink(self, cut: Cut) -> int:
        """What the sides of pictures may be divided by for a clip."""
        by_more = SHRUNK if self.codec == "jpeg" else ()
        return next((by for by in by_more if min(cut.region[2:]) / by >= cut.crop - 0.5), 1)

    def _smaller(self, cut: Cut, by: int) -> Cut:
        """The cut in pixels of shrunk pictures, its region rounded to these."""
        x, y, width, height = cut.region
        left, top, right, bottom = (round(edge / by) for edge in (x, y, x + width, y + height))
        return replace(cut, region=(left, top, max(1, right - left), max(1, bottom - top)))

    @stage("decode")
    def _picture(self, index: int, by: int) -> np.ndarray:
        """A frame, its sides divided by `by`, uint8 (h, w, 3) RGB; one of another size than the first is resized."""
        size = -(-self.info.width // by), -(-self.info.height // by)
        file = self._frames.file(index)
        try:
            with open(file, "rb") as opened:
                data = opened.read()
            if decode_jpeg is not None and data.startswith(b"\xff\xd8"):
                with suppress(ValueError):  # Pillow decides what is damaged
                    pixels = decode_jpeg(data, "RGB", min_width=size[0], min_height=size[1])
                    if pixels.shape == (*size[::-1], 3):
                        return pixels
            with self._opened(index, data) as picture:
                if by > 1:
                    picture.draft("RGB", (self.info.width // by, self.info.height // by))
                upright = picture.convert("RGB")
                return np.asarray(upright if upright.size == size else upright.resize(size))
        except (OSError, ValueError, SyntaxError) as error:
            cause = cause_of(error)
            raise VideoError(f"{file}: {cause}; replace this frame, or leave the video out of the list") from error

    def _opened(self, index: int, data: bytes | None = None) -> Image.Image:
        """A frame whose header has been read."""
        file = self._frames.file(index)
        try:
            picture = Image.open(file if data is None else io.BytesIO(data), formats=FORMATS)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            cause = getattr(error, "strerror", None) or "not a picture that can be read"
            raise VideoError(f"{file}: {cause}; replace this frame, or leave the video out of the list") from error
        if picture.width * picture.height > MAX_PIXELS or picture.mode[0] in "IF":
            what = f"{picture.width} x {picture.height} pixels of mode {picture.mode}"
            picture.close()
            raise VideoError(f"{file}: {what}; allowed are {MAX_PIXELS:,} pixels of 8 bits a channel")
        return picture
