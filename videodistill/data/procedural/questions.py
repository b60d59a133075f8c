"""Questions about a procedural world, with answers, choices and ground-truth evidence.

Eight families after EgoTaskQA and NExT-QA, one question of each per round:

``describe``  an attribute of a visitor            ``count``   how many visitors have a shape
``where``     the side that a visitor comes from   ``cause``   what makes a resident shrink
``before``    the visitor right before another     ``change``  what colour a resident turns
``after``     the visitor right after another      ``carry``   what a visitor carries

A phrase such as "the red ring" fits exactly one thing of the world, residents and carried objects
included. *Direct* questions name what they are about; *indirect* ones reach it through something
else ("the thing that carries the blue star", "the visitor right after the red ring").
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from videodistill.data.procedural.world import COLOURS, SHAPES, SIDES, Event, Thing, World

FAMILIES = ("describe", "where", "before", "after", "count", "cause", "change", "carry")
COUNTS = ("zero", "one", "two", "three")
ANSWERS = COLOURS + SHAPES + SIDES + COUNTS
"""Every answer that a question can have."""

CHOICES = (*ANSWERS, "middle", "four")
"""Everything that can be among a question's choices."""

_KINDS_OF_ANSWER = (COLOURS, SHAPES, (*SIDES, "middle"), (*COUNTS, "four"))
"""Sets that wrong choices are drawn from: at least five each."""


@dataclass(frozen=True)
class Asked:
    """A question with its answer and where in the video that answer shows."""

    question: str
    answer: str
    choices: tuple[str, ...]
    """Five answers of one kind, the right one among them."""
    family: str
    reference: str
    """"direct" or "indirect"."""
    evidence: tuple[tuple[float, float], ...]
    """Stretches in seconds that show the answer."""
    context: tuple[tuple[float, float], ...]
    """Further stretches that are needed to find the evidence, e.g. the event "before" refers to."""
    program: str
    """The question as nested functions."""


@dataclass(frozen=True)
class _Draft:
    text: str
    answer: str
    program: str
    evidence: tuple[Event, ...]
    context: tuple[Event, ...] = ()
    reference: str = "direct"


class _Asker:
    def __init__(self, world: World, rng: np.random.Generator):
        self.world = world
        self.rng = rng
        things = [event.visitor for event in world.visits]
        things += [event.carried for event in world.visits if event.carried]
        things += world.residents
        self.shapes = Counter(thing.shape for thing in things)
        self.colours = Counter(thing.colour for thing in things)

    def one(self, options):
        return options[self.rng.integers(len(options))]

    def attribute(self, thing: Thing) -> tuple[str, str]:
        """(What to ask for, its value): colour or shape."""
        return ("colour", thing.colour) if self.rng.random() < 0.5 else ("shape", thing.shape)

    def events(self, kind: str) -> list[Event]:
        return [event for event in self.world.events if event.kind == kind]

    def describe(self) -> _Draft:
        visits = self.world.visits
        named = [
            (event, what)
            for event in visits
            for what, count in (
                ("colour", self.shapes[event.visitor.shape]),
                ("shape", self.colours[event.visitor.colour]),
            )
            if count == 1
        ]
        if named and self.rng.random() < 0.6:
            event, what = self.one(named)
            if what == "colour":
                known, answer = event.visitor.shape, event.visitor.colour
                text = self.one(
                    (
                        "what colour is the {} that comes in?",
                        "what is the colour of the visiting {}?",
                    )
                ).format(known)
            else:
                known, answer = event.visitor.colour, event.visitor.shape
                text = self.one(
                    ("what shape is the {} thing that comes in?", "what shape is the {} visitor?")
                ).format(known)
            return _Draft(text, answer, f"query_{what}(visitor({known}))", (event,))
        which = self.one(("first", "last"))
        event = visits[0 if which == "first" else -1]
        what, answer = self.attribute(event.visitor)
        text = self.one(("what {} is the {} visitor?", "what {} is the thing that comes in {}?"))
        program = f"query_{what}({which}(visitor))"
        return _Draft(text.format(what, which), answer, program, (event,), reference="indirect")

    def where(self) -> _Draft:
        # A striker stands by its victim, wherever that is: only waiting visitors tell a side.
        waiting = [event for event in self.world.visits if event.kind != "strike"]
        event = self.one(waiting)
        name = event.visitor.name
        program, reference = f"query_side(visitor({name}))", "direct"
        if event.carried is not None and self.rng.random() < 0.5:
            name = f"thing that carries the {event.carried.name}"
            program = f"query_side(carrier({event.carried.name}))"
            reference = "indirect"
        text = self.one(
            ("from which side does the {} come in?", "on which side is the {} when it comes in?")
        )
        return _Draft(text.format(name), event.side, program, (event,), reference=reference)

    def before(self) -> _Draft:
        return self._beside("before", -1)

    def after(self) -> _Draft:
        return self._beside("after", +1)

    def _beside(self, word: str, step: int) -> _Draft:
        visits = self.world.visits
        first = int(self.rng.integers(len(visits) - 1))
        target, known = (first, first + 1) if step < 0 else (first + 1, first)
        what, answer = self.attribute(visits[target].visitor)
        name = visits[known].visitor.name
        text = self.one(
            (
                "what {} is the visitor right {} the {}?",
                "what is the {} of the thing that comes in just {} the {}?",
            )
        )
        return _Draft(
            text.format(what, word, name),
            answer,
            f"query_{what}({word}(visitor({name})))",
            (visits[target],),
            (visits[known],),
            "indirect",
        )

    def count(self) -> _Draft:
        shape = self.world.counted_shape
        events = tuple(event for event in self.world.visits if event.visitor.shape == shape)
        plural = {"cross": "crosses"}.get(shape, shape + "s")
        text = self.one(("how many {} come in?", "how many visitors are {}?")).format(plural)
        return _Draft(text, COUNTS[len(events)], f"count(visitor({shape}))", events)

    def cause(self) -> _Draft:
        event = self.one(self.events("strike"))
        victim = self.world.residents[event.resident].name
        what, answer = self.attribute(event.visitor)
        text = self.one(
            (
                "what {} is the thing that makes the {} shrink?",
                "what is the {} of what hits the {}?",
            )
        )
        program = f"query_{what}(cause(shrink({victim})))"
        return _Draft(text.format(what, victim), answer, program, (event,))

    def change(self) -> _Draft:
        event = self.one(self.events("change"))
        victim = self.world.residents[event.resident].name
        text = self.one(("what colour does the {} turn?", "which colour does the {} change to?"))
        program = f"query_colour(change({victim}))"
        return _Draft(text.format(victim), event.colour, program, (event,))

    def carry(self) -> _Draft:
        event = self.one(self.events("carry"))
        name = event.visitor.name
        what, answer = self.attribute(event.carried)
        text = self.one(
            ("what {} is the thing that the {} carries?", "what is the {} of what the {} brings?")
        )
        program = f"query_{what}(carried_by({name}))"
        return _Draft(text.format(what, name), answer, program, (event,))

    def choices(self, answer: str) -> tuple[str, ...]:
        kind = next(answers for answers in _KINDS_OF_ANSWER if answer in answers)
        wrong = [other for other in kind if other != answer]
        chosen = [answer, *self.rng.permutation(wrong)[:4]]
        return tuple(str(choice) for choice in self.rng.permutation(chosen))


def ask(world: World, count: int = len(FAMILIES)) -> list[Asked]:
    """Ask ``count`` different questions, the families in turn.

    A world gives one question of each family at least; asked for more than it has to offer, it
    gives fewer. The questions depend on the world and on ``count`` alone.
    """
    # The world's own randomness seeds its questions: no second seed to keep in step.
    seed = [int(value * 2**32) for value in world.backdrop[0]]
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed)))
    asker = _Asker(world, rng)
    makers: dict[str, Callable[[], _Draft]] = {name: getattr(asker, name) for name in FAMILIES}
    order = [str(name) for name in rng.permutation(FAMILIES)]

    def seconds(events: tuple[Event, ...]) -> tuple[tuple[float, float], ...]:
        return tuple((event.start / world.fps, event.stop / world.fps) for event in events)

    asked, seen = [], set()
    for attempt in range(4 * count):
        if len(asked) == count:
            break
        family = order[attempt % len(order)]
        draft = makers[family]()
        if draft.program in seen:
            continue
        seen.add(draft.program)
        asked.append(
            Asked(
                draft.text,
                draft.answer,
                asker.choices(draft.answer),
                family,
                draft.reference,
                seconds(draft.evidence),
                seconds(draft.context),
                draft.program,
            )
        )
    return asked
