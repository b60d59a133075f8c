"""Paint one frame of a procedural world with numpy: signed distances, one pixel of antialiasing."""

from __future__ import annotations

from functools import cache

import numpy as np

from videodistill.data.procedural.world import Thing, World

RGB = {
    "red": (226, 44, 44),
    "green": (40, 176, 64),
    "blue": (46, 84, 236),
    "yellow": (246, 222, 40),
    "purple": (150, 50, 190),
    "orange": (246, 140, 24),
    "cyan": (60, 214, 226),
    "white": (246, 246, 246),
    "grey": (128, 128, 128),
}
_OUTLINE = 0.012
"""Width of the dark line around each object, as a fraction of the picture's side."""


def render(world: World, index: int, size: int) -> np.ndarray:
    """One frame.

    Args:
        world: What happens.
        index: Frame number, 0 .. world.frames - 1.
        size: Side of the square picture in pixels.

    Returns:
        uint8 [size, size, 3], RGB.
    """
    picture = _backdrop(world, index, size)
    for drawn in world.objects_at(index):
        _paint(picture, drawn.thing, drawn.x * size, drawn.y * size, drawn.radius * size)
    return (picture + 0.5).astype(np.uint8)


def _backdrop(world: World, index: int, size: int) -> np.ndarray:
    """A dark slope of colour with soft blobs that move with the camera, float32 [size, size, 3].

    Three blobs, a slope along x and one along y are each a column times a row: one matrix product.
    """
    dx, dy = world.pan(index)
    at = (np.arange(size) + 0.5) / size
    random = world.backdrop
    base, slope_x, slope_y = 34 + 42 * random[0, :3], 24 * random[1, :3], 24 * random[2, :3]
    x, y, width, strength = random[3:, :4].T[..., None]
    spread = 0.05 + 0.1 * width
    along_x = np.exp(-(((at - x - dx) / spread) ** 2))
    along_y = np.exp(-(((at - y - dy) / spread) ** 2)) * (36 * strength - 18)
    columns = np.stack([*along_y, np.ones(size), at - dy], axis=1)
    slope = base + slope_x * (at[:, None] - dx)
    rows = [*np.repeat(along_x, 3, axis=1), slope.reshape(-1), np.tile(slope_y, size)]
    picture = (columns.astype(np.float32) @ np.stack(rows).astype(np.float32)).reshape(
        size, size, 3
    )
    return picture.clip(0, 255, out=picture)


def _paint(picture: np.ndarray, thing: Thing, x: float, y: float, radius: float) -> None:
    """Blend an object into the picture, which it changes; lengths in pixels."""
    size = picture.shape[0]
    outline = _OUTLINE * size
    reach = radius * 1.1 + outline + 1
    left, right = max(0, int(x - reach)), min(size, int(x + reach) + 2)
    top, bottom = max(0, int(y - reach)), min(size, int(y + reach) + 2)
    if left >= right or top >= bottom:
        return
    px = (np.arange(left, right, dtype=np.float32) + 0.5 - x)[None, :]
    py = (np.arange(top, bottom, dtype=np.float32) + 0.5 - y)[:, None]
    distance = _DISTANCE[thing.shape](px, py, radius)
    window = picture[top:bottom, left:right]
    shade = np.clip(0.5 - distance + outline, 0.0, 1.0)[..., None]
    window *= 1.0 - 0.85 * shade
    body = np.clip(0.5 - distance, 0.0, 1.0)[..., None]
    window += body * (_rgb(thing.colour) - window)


@cache
def _rgb(colour: str) -> np.ndarray:
    return np.array(RGB[colour], np.float32)


# Signed distances in pixels (negative inside) of shapes of radius r about the origin.


def _circle(x, y, r):
    return np.sqrt(x * x + y * y) - r


def _square(x, y, r):
    return np.maximum(np.abs(x), np.abs(y)) - 0.84 * r


def _triangle(x, y, r):
    lower = y - 0.62 * r
    sides = 0.866 * np.abs(x) - 0.5 * y - 0.56 * r
    return np.maximum(lower, sides)


def _ring(x, y, r):
    return np.abs(np.sqrt(x * x + y * y) - 0.74 * r) - 0.26 * r


def _cross(x, y, r):
    x, y = np.abs(x), np.abs(y)
    arm, width = 0.95 * r, 0.3 * r
    return np.minimum(np.maximum(x - arm, y - width), np.maximum(x - width, y - arm))


def _star(x, y, r):
    # Fold into one half of one of five points; then a single straight edge remains.
    step = 2 * np.pi / 5
    angle = np.arctan2(x, -y)
    angle = np.abs(angle - step * np.round(angle / step))
    radius = np.sqrt(x * x + y * y)
    u, v = radius * np.cos(angle), radius * np.sin(angle)
    tip, inner = 1.12 * r, 0.46 * r
    du, dv = inner * np.cos(step / 2) - tip, inner * np.sin(step / 2)
    return ((u - tip) * dv - v * du) / np.hypot(du, dv)


_DISTANCE = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "ring": _ring,
    "cross": _cross,
}
