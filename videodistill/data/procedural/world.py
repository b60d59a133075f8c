"""What happens in a procedural video.

A few *residents* drift about the middle of the picture while the camera pans. Short *events*
interrupt them, one after the other, each lasting 2 to 5% of the video:

``visit``   a visitor comes in from one side, waits near it and goes
``carry``   a visitor comes in and carries a small object
``strike``  a visitor comes in and touches a resident, which shrinks while it is touched
``change``  a resident takes another colour for a while
``hide``    a grey box covers a resident for a while (nobody asks about it: a distractor)

Lengths are fractions of the picture's side, the origin is its upper left corner, and times are
counted in frames. A world is a pure function of its seed and its configuration.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

DATA_VERSION = "1"
"""Changes whenever the same seed would give another video or another question."""

COLOURS = ("red", "green", "blue", "yellow", "purple", "orange", "cyan", "white")
SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")
SIZES = ("small", "big")
SIDES = ("left", "right", "top", "bottom")
MAX_COUNT = 3

RADIUS = {"small": 0.085, "big": 0.125}
RESIDENT_RADIUS = 0.11
CARRIED_RADIUS = 0.065
BOX = ("grey", "square")
SHORTEST, LONGEST = 0.02, 0.05
"""Length of an event as a share of the video's frames."""


@dataclass(frozen=True)
class WorldConfig:
    """Everything but the seed that decides a video.

    ``bias`` is the probability that an attribute follows from the words that a question would
    use to ask for it (a star is yellow, a red visitor comes from the left, ...), so that answers
    can be guessed from questions. ``reverse_bias`` uses the opposite rule instead.
    """

    frames: int = 64
    fps: float = 12.0
    bias: float = 0.0
    reverse_bias: bool = False


@dataclass(frozen=True)
class Thing:
    """A colour, a shape and a size: what a question can name."""

    colour: str
    shape: str
    size: str

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"


@dataclass(frozen=True)
class Event:
    """Something that happens from frame ``start`` until before frame ``stop``."""

    kind: str
    start: int
    stop: int
    visitor: Thing | None = None
    side: str | None = None
    along: float = 0.5
    """Where the visitor stands along its side, 0..1."""
    carried: Thing | None = None
    resident: int | None = None
    """Index of the resident that is struck, changed or hidden."""
    colour: str | None = None
    """What a changed resident turns to."""


@dataclass(frozen=True)
class Drawn:
    """One object as it is seen in one frame; lengths as fractions of the picture's side."""

    thing: Thing
    x: float
    y: float
    radius: float
    role: str
    """"resident", "visitor", "carried" or "box"."""
    side: str | None = None


@dataclass(frozen=True)
class World:
    """A video before it is painted."""

    config: WorldConfig
    residents: tuple[Thing, ...]
    anchors: np.ndarray
    """Where each resident drifts about, [residents, 2]."""
    drift: np.ndarray
    """Amplitude, cycles and phase of each resident's drift, [residents, 2, 3]."""
    events: tuple[Event, ...]
    counted_shape: str
    """The shape whose visits are worth counting: it visits 0 to 3 times, evenly often."""
    camera: np.ndarray
    """Amplitude, cycles and phase of the camera's pan, [2, 3]."""
    backdrop: np.ndarray
    """Base colour, its slope along x and along y, then blobs: see ``render``, [6, 6]."""

    @property
    def frames(self) -> int:
        return self.config.frames

    @property
    def fps(self) -> float:
        return self.config.fps

    @property
    def duration(self) -> float:
        """Seconds."""
        return self.frames / self.fps

    @property
    def visits(self) -> tuple[Event, ...]:
        """Events that bring a visitor, in order of time."""
        return tuple(event for event in self.events if event.visitor is not None)

    def pan(self, frame: int) -> tuple[float, float]:
        """Offset of the picture's content through the camera's motion."""
        dx, dy = _wave(self.camera, frame / self.frames)
        return float(dx), float(dy)

    def event_at(self, frame: int) -> Event | None:
        for event in self.events:
            if event.start <= frame < event.stop:
                return event
        return None

    def objects_at(self, frame: int) -> list[Drawn]:
        """What is seen in a frame, in the order of painting."""
        event = self.event_at(frame)
        pan = np.array(self.pan(frame))
        places = self.anchors + _wave(self.drift, frame / self.frames) + pan
        drawn = []
        for index, (thing, (x, y)) in enumerate(zip(self.residents, places, strict=True)):
            radius = RESIDENT_RADIUS
            if event is not None and event.resident == index:
                if event.kind == "change":
                    thing = replace(thing, colour=event.colour)
                elif event.kind == "strike":
                    radius *= 0.55
            drawn.append(Drawn(thing, float(x), float(y), radius, "resident"))
        if event is None:
            return drawn
        if event.kind == "hide":
            x, y = places[event.resident]
            box = Thing(*BOX, "big")
            drawn.append(Drawn(box, float(x), float(y), RESIDENT_RADIUS * 1.4, "box"))
        if event.visitor is not None:
            drawn += self._visit(event, frame, places)
        return drawn

    def _visit(self, event: Event, frame: int, places: np.ndarray) -> list[Drawn]:
        radius = RADIUS[event.visitor.size]
        inward = {"left": (1, 0), "right": (-1, 0), "top": (0, 1), "bottom": (0, -1)}[event.side]
        inward = np.array(inward, dtype=float)
        across = 0.22 + 0.56 * event.along
        wall = np.array([0.0 if inward[0] > 0 else 1.0, across])
        if event.side in ("top", "bottom"):
            wall = np.array([across, 0.0 if inward[1] > 0 else 1.0])
        # A visitor slides in during the first quarter of its stay and out during the last one;
        # it is never less than half inside, so that one frame is enough to see it.
        phase = (frame - event.start + 0.5) / (event.stop - event.start)
        arrived = min(1.0, 0.5 + 2.0 * min(phase, 1.0 - phase))
        place = wall + inward * (0.04 + radius) * (2.0 * arrived - 1.0)
        if event.kind == "strike":
            # Where it touches the (shrunken) resident, coming from its side.
            touching = places[event.resident] - inward * (radius + RESIDENT_RADIUS * 0.55)
            place = place + (touching - place) * (2.0 * arrived - 1.0)
        drawn = [Drawn(event.visitor, *map(float, place), radius, "visitor", event.side)]
        if event.carried is not None:
            x, y = place + inward * (radius + CARRIED_RADIUS)
            drawn.append(Drawn(event.carried, float(x), float(y), CARRIED_RADIUS, "carried"))
        return drawn


def _wave(parameters: np.ndarray, at: float) -> np.ndarray:
    """Amplitude · sin(2π(cycles · at + phase)) over the last axis."""
    amplitude, cycles, phase = np.moveaxis(parameters, -1, 0)
    return amplitude * np.sin(2 * np.pi * (cycles * at + phase))


class _Draw:
    """Random choices of one world, biased towards a rule when the configuration asks for it."""

    def __init__(self, seed: tuple[int, ...], config: WorldConfig):
        self.rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed)))
        self.config = config

    def one(self, options: tuple[str, ...], key: int | None = None) -> str:
        """One of the options; ``key`` tells which one the rule prefers."""
        if key is not None and self.config.bias and self.rng.random() < self.config.bias:
            shift = len(options) // 2 if self.config.reverse_bias else 0
            return options[(key + shift) % len(options)]
        return options[self.rng.integers(len(options))]

    def new_thing(
        self, taken: set[tuple[str, str]], shapes: tuple[str, ...], size: str, rule: bool = False
    ) -> Thing:
        """A thing whose colour and shape together are not in ``taken``; adds them to it.

        With ``rule`` a biased world lets its colour follow from its shape.
        """
        shape = self.one(shapes)
        colour = self.one(COLOURS, key=SHAPES.index(shape) if rule else None)
        while (colour, shape) in taken:
            colour, shape = self.one(COLOURS), self.one(shapes)
        taken.add((colour, shape))
        return Thing(colour, shape, size)

    def schedule(self, count: int) -> list[tuple[int, int]]:
        """``count`` disjoint (start, stop) in frames, ascending, at least one frame apart."""
        frames = self.config.frames
        lengths = np.maximum(1, np.rint(self.rng.uniform(SHORTEST, LONGEST, count) * frames))
        lengths = lengths.astype(int)
        free = frames - int(lengths.sum()) - (count - 1)
        cuts = np.sort(self.rng.integers(0, free + 1, count))
        starts = cuts + np.concatenate([[0], np.cumsum(lengths + 1)[:-1]])
        return [(int(s), int(s + n)) for s, n in zip(starts, lengths, strict=True)]


def sample_world(seed: tuple[int, ...], config: WorldConfig) -> World:
    """Draw a world.

    Args:
        seed: Non-negative integers, e.g. (dataset seed, split, video number).
        config: Number of frames (at least 16), frame rate and bias.

    Raises:
        ValueError: Fewer than 16 frames.
    """
    if config.frames < 16:
        raise ValueError(f"frames must be at least 16, not {config.frames}")
    draw = _Draw(seed, config)
    rng = draw.rng

    counted = draw.one(SHAPES)
    others = tuple(shape for shape in SHAPES if shape != counted)
    taken: set[tuple[str, str]] = set()
    residents = tuple(draw.new_thing(taken, others, "big") for _ in range(2))

    kinds = ["carry", "strike"]
    kinds += [str(rng.choice(["visit", "carry", "strike"], p=[0.6, 0.2, 0.2])) for _ in range(2)]
    kinds += ["visit"] * int(rng.integers(0, 2))
    # Each resident is struck at most once and changes at most once: "the red ring turns ..."
    # has one answer.
    while kinds.count("strike") > len(residents):
        kinds[kinds.index("strike")] = "visit"
    visitors = len(kinds)
    kinds += ["change"] * int(rng.integers(1, 3))
    if config.frames >= 32 and rng.random() < 0.4:
        kinds.append("hide")

    count = int(rng.integers(0, MAX_COUNT + 1))
    is_counted = rng.permutation(visitors) < count
    struck, changed = iter(rng.permutation(2)), iter(rng.permutation(2))

    events = []
    for number, kind in enumerate(kinds):
        event = Event(kind, 0, 0)
        if number < visitors:
            shapes = (counted,) if is_counted[number] else others
            visitor = draw.new_thing(taken, shapes, draw.one(SIZES), rule=True)
            side = draw.one(SIDES, key=COLOURS.index(visitor.colour))
            event = replace(event, visitor=visitor, side=side, along=float(rng.random()))
        if kind == "carry":
            event = replace(event, carried=draw.new_thing(taken, others, "small"))
        elif kind == "strike":
            event = replace(event, resident=int(next(struck)))
        elif kind == "change":
            resident = int(next(changed))
            before = residents[resident].colour
            options = tuple(colour for colour in COLOURS if colour != before)
            colour = draw.one(options, key=COLOURS.index(before))
            event = replace(event, resident=resident, colour=colour)
        elif kind == "hide":
            event = replace(event, resident=int(rng.integers(2)))
        events.append(event)

    order = rng.permutation(len(events))
    times = draw.schedule(len(events))
    events = tuple(
        replace(events[i], start=start, stop=stop)
        for i, (start, stop) in zip(order, times, strict=True)
    )

    # Two residents on opposite sides of the middle, at a random angle.
    angle = rng.uniform(0, 2 * np.pi)
    away = np.array([np.cos(angle), np.sin(angle)]) * 0.15
    anchors = np.array([0.5 + away, 0.5 - away])
    drift = np.stack(
        [
            rng.uniform(0.01, 0.03, (2, 2)),
            rng.uniform(0.5, 3.0, (2, 2)),
            rng.uniform(0.0, 1.0, (2, 2)),
        ],
        axis=-1,
    )
    camera = np.stack(
        [rng.uniform(0.0, 0.03, 2), rng.uniform(0.3, 1.5, 2), rng.uniform(0.0, 1.0, 2)], axis=-1
    )
    backdrop = rng.random((6, 6))
    return World(config, residents, anchors, drift, events, counted, camera, backdrop)
