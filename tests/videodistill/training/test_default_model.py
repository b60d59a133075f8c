"""The bundled model's whole making, at a tiny size: every stage, the card, and an answer."""

from __future__ import annotations

import json

import pytest

import videodistill
from videodistill.training.card import model_card
from videodistill.training.clip import ClipRecipe
from videodistill.training.default_model import DefaultRecipe, train_default
from videodistill.training.head import HeadRecipe

TINY = DefaultRecipe(
    videos={"train": (6, 32), "train-long": (2, 64), "test": (3, 32)},
    candidates={"train-long": 32},
    clip=ClipRecipe(worlds=900, width=32, layers=1, text_layers=1, heads=2, epochs=0.1, batch=32),
    head=HeadRecipe(steps=3, videos_per_batch=2),
    model={"width": 32, "heads": 2, "refiner_blocks": 1, "frames": 16, "pick": 5},
)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    work, out = tmp_path_factory.mktemp("work"), tmp_path_factory.mktemp("out")
    record = train_default(work, out, recipe=TINY, workers=1, log=lambda line: None)
    return work, out, record


def test_it_answers(made):
    work, out, _ = made
    model = videodistill.load(out)
    video = sorted((work / "data" / "videos" / "test").iterdir())[0]
    answers = model.answer(
        video, ["what colour does the red ring turn?", "how many stars come in?"]
    )
    assert [len(answer.frames) for answer in answers] == [5, 5]
    assert all(answer.answer in model.model.config.answers for answer in answers)


def test_the_record_is_complete(made):
    _, out, record = made
    assert json.loads((out / "training.json").read_text()) == record
    assert {path.name for path in (out / "encoder").iterdir()} >= {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "preprocessor_config.json",
    }
    results = record["arms"]["videodistill"]["results"]
    assert {"test", "test, K=4", "blank video", "shuffled video"} == set(results)
    assert results["test"]["all"]["questions"] == 24
    assert (out / "README.md").read_text() == model_card(record)
    assert record["blind"]["question_only"].keys() >= {"all", "count"}


def test_a_second_run_finds_its_work_done(made, tmp_path):
    work, out, record = made
    lines = []
    before = (work / "arms" / "videodistill" / "model.safetensors").stat().st_mtime_ns
    again = train_default(work, tmp_path / "again", recipe=TINY, workers=1, log=lines.append)
    assert again["arms"] == record["arms"]
    assert not any("step" in line for line in lines)
    assert (work / "arms" / "videodistill" / "model.safetensors").stat().st_mtime_ns == before
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (out / name).read_bytes()
