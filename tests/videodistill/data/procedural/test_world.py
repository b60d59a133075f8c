"""Is every procedural question true of what is drawn, unambiguous, and unguessable?"""

from __future__ import annotations

import re
from collections import Counter, defaultdict

import numpy as np
import pytest

from videodistill.data.procedural.questions import ANSWERS, COUNTS, FAMILIES, ask
from videodistill.data.procedural.render import RGB, render
from videodistill.data.procedural.world import (
    COLOURS,
    LONGEST,
    RESIDENT_RADIUS,
    SHAPES,
    SIDES,
    WorldConfig,
    sample_world,
)


def worlds(count: int, **settings):
    return [sample_world((7, number), WorldConfig(**settings)) for number in range(count)]


class Seen:
    """A video as one sees it: objects frame by frame. Knows nothing of the world's events."""

    def __init__(self, world):
        self.frames = [world.objects_at(index) for index in range(world.frames)]
        self.visits = []
        """(visitor, what it carries, the resident it shrinks, side), in order of time."""
        before = None
        for frame in self.frames:
            visitor = next((d for d in frame if d.role == "visitor"), None)
            if visitor is not None and before is None:
                carried = next((d.thing for d in frame if d.role == "carried"), None)
                residents = [d for d in frame if d.role == "resident"]
                shrunken = next((d.thing for d in residents if d.radius < RESIDENT_RADIUS), None)
                self.visits.append((visitor.thing, carried, shrunken, visitor.side))
            before = visitor

    def usual_residents(self):
        """What each resident looks like most of the time."""
        return [Counter(f[i].thing for f in self.frames).most_common(1)[0][0] for i in (0, 1)]

    def answer(self, program: str) -> str:
        """Evaluate a question's program on what is seen; fails when it is ambiguous."""
        if match := re.fullmatch(r"count\(visitor\((\w+)\)\)", program):
            return COUNTS[sum(visit[0].shape == match[1] for visit in self.visits)]
        what, inner = re.fullmatch(r"query_(\w+)\((.*)\)", program).groups()
        if match := re.fullmatch(r"change\((.*)\)", inner):
            (index,) = [i for i, t in enumerate(self.usual_residents()) if t.name == match[1]]
            colours = {frame[index].thing.colour for frame in self.frames}
            (turned,) = colours - {match[1].split()[0]}
            return turned
        visitor, carried, _, side = self.visit(inner)
        if what == "side":
            return side
        thing = carried if inner.startswith("carried_by") else visitor
        return getattr(thing, what)

    def visit(self, expression: str):
        if expression == "first(visitor)":
            return self.visits[0]
        if expression == "last(visitor)":
            return self.visits[-1]
        if match := re.fullmatch(r"(before|after)\(visitor\((.*)\)\)", expression):
            (place,) = [i for i, visit in enumerate(self.visits) if visit[0].name == match[2]]
            return self.visits[place + (1 if match[1] == "after" else -1)]
        rules = {
            r"visitor\((\w+)\)": lambda visit, x: x in (visit[0].colour, visit[0].shape),
            r"visitor\((\w+ \w+)\)": lambda visit, x: visit[0].name == x,
            r"carried_by\((.*)\)": lambda visit, x: visit[0].name == x,
            r"carrier\((.*)\)": lambda visit, x: visit[1] is not None and visit[1].name == x,
            r"cause\(shrink\((.*)\)\)": lambda visit, x: (
                visit[2] is not None and visit[2].name == x
            ),
        }
        for pattern, fits in rules.items():
            if match := re.fullmatch(pattern, expression):
                (visit,) = [visit for visit in self.visits if fits(visit, match[1])]
                return visit
        raise AssertionError(f"no rule for {expression}")


@pytest.mark.parametrize("frames", [16, 64, 1024])
def test_answers_hold_of_what_is_drawn(frames):
    for world in worlds(60 if frames < 1024 else 8, frames=frames):
        seen = Seen(world)
        asked = ask(world)
        assert sorted({one.family for one in asked}) == sorted(FAMILIES)
        for one in asked:
            assert seen.answer(one.program) == one.answer, one
            assert one.answer in ANSWERS
            assert one.choices.count(one.answer) == 1
            assert len(set(one.choices)) == 5


def test_evidence_is_short_and_inside_the_video():
    for world in worlds(50, frames=256):
        for one in ask(world):
            assert bool(one.evidence) == (one.answer != "zero")
            for start, end in one.evidence + one.context:
                assert 0 <= start < end <= world.duration
                assert (end - start) / world.duration <= LONGEST + 1 / world.frames


def test_events_are_apart():
    for frames in (16, 17, 64, 1024):
        for world in worlds(50, frames=frames):
            stops = [event.stop for event in world.events]
            starts = [event.start for event in world.events]
            assert all(start > stop for start, stop in zip(starts[1:], stops, strict=False))
            assert starts[0] >= 0
            assert stops[-1] <= frames


def test_names_are_unique():
    for world in worlds(200):
        names = [thing.name for thing in world.residents]
        names += [event.visitor.name for event in world.visits]
        names += [event.carried.name for event in world.visits if event.carried]
        assert len(names) == len(set(names))


def test_families_and_answers_are_balanced():
    """No answer can be preferred: within a kind of answer all are about equally frequent."""
    families, answers = Counter(), defaultdict(Counter)
    for world in worlds(1500):
        for one in ask(world):
            families[one.family] += 1
            kind = next(kind for kind in (COLOURS, SHAPES, SIDES, COUNTS) if one.answer in kind)
            answers[one.family, kind][one.answer] += 1
    total = sum(families.values())
    assert all(0.1 <= count / total <= 0.2 for count in families.values())
    for (_, kind), counted in answers.items():
        if (total := sum(counted.values())) > 500:
            spread = 5 * np.sqrt(total / len(kind))
            assert all(abs(counted[answer] - total / len(kind)) < spread for answer in kind)


@pytest.mark.parametrize("reverse", [False, True])
def test_bias_makes_answers_follow_from_words(reverse):
    """Full bias: a star is yellow (or, reversed, another colour); no bias: any colour."""
    shift = len(COLOURS) // 2 if reverse else 0

    def share(bias: float) -> float:
        follows = []
        for world in worlds(150, bias=bias, reverse_bias=reverse):
            for event in world.visits:
                preferred = COLOURS[(SHAPES.index(event.visitor.shape) + shift) % len(COLOURS)]
                follows.append(event.visitor.colour == preferred)
        return float(np.mean(follows))

    assert share(0.0) < 0.2
    assert share(1.0) > 0.6  # two things of one shape cannot both have its colour


def test_same_seed_same_video():
    first, again = worlds(3), worlds(3)
    for one, two in zip(first, again, strict=True):
        assert ask(one) == ask(two)
        assert np.array_equal(render(one, 5, 48), render(two, 5, 48))
    assert not np.array_equal(render(first[0], 5, 48), render(first[1], 5, 48))


@pytest.mark.parametrize("size", [48, 96, 200])
def test_painted_colours_are_where_the_objects_are(size):
    for world in worlds(10):
        for event in world.events:
            picture = render(world, event.start, size)
            assert picture.shape == (size, size, 3)
            drawn = world.objects_at(event.start)[-1]
            x, y = int(drawn.x * size), int(drawn.y * size)
            if drawn.thing.shape == "ring" or not (0 <= x < size and 0 <= y < size):
                continue
            assert np.abs(picture[y, x].astype(int) - RGB[drawn.thing.colour]).max() <= 2


def test_too_short():
    with pytest.raises(ValueError, match="frames must be at least 16, not 15"):
        sample_world((0,), WorldConfig(frames=15))
