"""The small CLIP's training material: phrases that are true, frames as a video file would give."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.videodistill.tiny import tiny_clip
from videodistill.data.procedural.world import Drawn, Thing, WorldConfig, sample_world
from videodistill.encoders import load_encoder
from videodistill.training import clip
from videodistill.training.clip import CONCEPTS, ClipRecipe, make_stills, true_phrases


def drawn(colour: str, shape: str, role: str, radius: float = 0.11, side: str | None = None):
    return Drawn(Thing(colour, shape, "big"), 0.5, 0.5, radius, role, side)


def test_phrases_of_a_carrier_and_its_victim() -> None:
    ring = drawn("red", "ring", "visitor", side="left")
    resident = drawn("blue", "star", "resident")
    phrases = true_phrases([resident, ring, drawn("green", "cross", "carried", 0.065)])
    assert {"red", "ring", "red ring", "big red ring", "left", "red ring at the left"} <= phrases
    assert {"red ring carrying green cross", "carried green cross", "blue star"} <= phrases
    assert "hitting" not in phrases and "big blue star" not in phrases
    shrunken = drawn("blue", "star", "resident", 0.0605)
    phrases = true_phrases([shrunken, ring])
    assert {"red ring hitting blue star", "shrunken blue star"} <= phrases
    assert "carrying" not in phrases


def test_every_phrase_names_what_is_there() -> None:
    for number in range(30):
        world = sample_world((3, number), WorldConfig())
        for frame in range(0, 64, 3):
            objects = world.objects_at(frame)
            phrases = true_phrases(objects)
            words = {word for d in objects for word in (d.thing.colour, d.thing.shape, d.side)}
            for concept in CONCEPTS:
                if concept in phrases:
                    assert set(concept.split()) <= words


@pytest.mark.parametrize("worlds", [7, 130])
def test_stills_of_any_number_of_worlds(worlds: int) -> None:
    recipe = ClipRecipe(worlds=worlds, stills_per_world=2, render_size=48, image_size=24)
    pixels, phrases = make_stills(recipe, workers=1)
    assert pixels.shape == (2 * worlds, 3, 24, 24) and pixels.dtype == torch.uint8
    assert len(phrases) == 2 * worlds and all(phrases)
    assert pixels.flatten(1).float().std(1).min() > 1  # each of them was painted


def test_halved_chroma_keeps_grey_and_blurs_colour() -> None:
    frames = np.full((1, 16, 16, 3), 90, np.uint8)
    assert (clip._as_decoded(frames, 16) == 90).all()
    frames[:, :, ::2] = (200, 0, 0)
    decoded = clip._as_decoded(frames, 16)[0]
    stripe, between = decoded[:, 8, 8].int(), decoded[:, 8, 9].int()
    assert stripe[0] < 200 - 20 and between[0] > between[1] + 20


def test_area_under_the_curve_by_hand() -> None:
    scores = torch.tensor([[0.9, 0.1], [0.4, 0.3]])
    truth = torch.tensor([[True, False], [False, True]])
    # (0.9 > 0.1), (0.9 > 0.4), (0.3 > 0.1) are in order, (0.3 > 0.4) is not.
    assert clip._auc(scores, truth) == 0.75
    assert clip._auc(scores, ~truth) == 0.25


def test_states_learn_which_word_they_are(tmp_path) -> None:
    """Without pictures: a few steps of the loss tell "before" from "after"."""
    encoder = load_encoder(tiny_clip(tmp_path / "clip"))
    model, tokenizer = encoder.model.requires_grad_(True), encoder.tokenizer
    texts = ["right before the red ring", "right after the red ring"]

    def apart() -> float:
        before, after = encoder.encode_texts(texts).tokens
        return ((before - after).norm(dim=-1) / before.norm(dim=-1)).max().item()

    optimiser = torch.optim.Adam(model.text_model.parameters(), lr=1e-2)
    first, was_apart = clip.word_loss(model, tokenizer, texts).item(), apart()
    for _ in range(30):
        optimiser.zero_grad()
        clip.word_loss(model, tokenizer, texts).backward()
        optimiser.step()
    assert clip.word_loss(model, tokenizer, texts).item() < 0.1 * first
    assert apart() > 1 > was_apart
