"""From a decoded frame to upright 8-bit RGB."""

from __future__ import annotations

from dataclasses import dataclass

import av
import numpy as np


@dataclass(frozen=True)
class Orientation:
    """How stored pixels are laid out for display: first swap the axes, then mirror.

    These three switches give all eight ways to turn and mirror a picture by right angles.
    """

    transpose: bool = False
    mirror_x: bool = False
    mirror_y: bool = False

    def apply(self, image: np.ndarray) -> np.ndarray:
        """[H, W, 3] as stored -> [H', W', 3] as displayed, a view."""
        if self.transpose:
            image = image.transpose(1, 0, 2)
        if self.mirror_y:
            image = image[::-1]
        if self.mirror_x:
            image = image[:, ::-1]
        return image

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width as displayed."""
        return (width, height) if self.transpose else (height, width)


def orientation_of(frame: av.VideoFrame) -> Orientation:
    """Reads the display matrix [[a, b, u], [c, d, v], [x, y, w]] that a camera wrote.

    It maps a stored point (p, q) to (a p + c q, b p + d q); y points down. Angles between the
    right ones are rounded to the nearest: what cameras write are right angles.
    """
    for data in frame.side_data:
        if data.type.name == "DISPLAYMATRIX":
            a, b, _, c, d = np.frombuffer(bytes(data), np.int32)[:5].tolist()
            if abs(b) + abs(c) > abs(a) + abs(d):
                return Orientation(transpose=True, mirror_x=c < 0, mirror_y=b < 0)
            return Orientation(mirror_x=a < 0, mirror_y=d < 0)
    return Orientation()


def to_rgb(frame: av.VideoFrame, height: int, width: int) -> np.ndarray:
    """uint8 [height, width, 3], not yet turned: libswscale's conversion to 8-bit RGB.

    The matrix (BT.601, BT.709, BT.2020) and the range are those that the file tells; untagged files
    count as BT.601 of limited range, as in FFmpeg. More than 8 bits are rounded to 8; high dynamic
    range is not tone-mapped. A frame of another size than the first is scaled to it.
    """
    return frame.reformat(width=width, height=height, format="rgb24").to_ndarray()
