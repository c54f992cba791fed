"""Frames of a video file as upright 8-bit RGB, or a UserError that says why not. Needs the extra ``video`` (PyAV)."""
from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from dtg_core.errors import UserError

VIDEO_SUFFIXES = frozenset((".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg"))


def read_frames(path: Path) -> Iterator[Image.Image]:
    """Decode the first video stream of a file, one frame at a time; frames may differ in size.

    Raises:
        UserError: PyAV is not installed, or the file holds no frame or breaks off; then after its readable frames.
    """
    try:
        import av
    except ImportError as error:
        raise UserError(f"{path}: videos need the package av - pip install av") from error
    count, frame = 0, None
    try:
        if path.exists() and not path.is_file():  # a FIFO or a device would never end
            raise UserError(f"{path}: it is not a regular file - take it out")
        with av.open(str(path)) as video:
            if not video.streams.video:
                raise UserError(f"{path}: it holds no video - take it out")
            stream = video.streams.video[0]
            for frame in video.decode(stream):
                # From the display matrix of a phone's video, in degrees counterclockwise.
                yield frame.to_image().rotate(frame.rotation, expand=True)
                count += 1
            promised = stream.frames  # 0: the file does not say
            whole = count > 0 and (count >= promised or _is_last(frame, stream))
    except (av.FFmpegError, OSError, ValueError) as error:
        where = f"after frame {count}" if count else "at all"
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: it cannot be read as a video {where} ({reason}) - replace it, or take it out") from error
    if not whole:
        raise UserError(f"{path}: it ends after {count} of {promised} frames - replace it, or take it out")


def _is_last(frame: Any, stream: Any) -> bool:
    """Whether a frame lasts until the stream's end. The last one of a trimmed video does, whose edit list skips frames that the
    file still has and counts; the last one of a file that is cut off does not."""
    if frame.pts is None or stream.duration is None:
        return False
    return bool(frame.pts + (frame.duration or 0) >= (stream.start_time or 0) + stream.duration)
