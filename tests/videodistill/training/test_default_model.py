"""The bundled model's whole making, at a tiny size: every stage, the card, and an answer."""

from __future__ import annotations

import errno
import json
import shutil
from dataclasses import replace

import pytest

import videodistill
from videodistill.errors import UserError
from videodistill.training import default_model
from videodistill.training.card import model_card
from videodistill.training.clip import ClipRecipe
from videodistill.training.default_model import DefaultRecipe, train_default
from videodistill.training.head import HeadRecipe

TINY = DefaultRecipe(
    videos={"train": (6, 32), "train-long": (2, 64), "test": (3, 32)},
    candidates={"train-long": 32},
    clip=ClipRecipe(worlds=180, width=32, layers=1, text_layers=1, heads=2, epochs=0.5, batch=32),
    head=HeadRecipe(thinking_steps=2, observing=((2, 1),), steps=3, videos_per_batch=2),
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
    assert {
        "test",
        "test, K=4",
        "test, K=8",
        "blank video",
        "shuffled video",
        "uniform frames",
    } == set(results)
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


def test_features_of_videos_made_anew_are_forgotten(tmp_path):
    """Other data has videos of the same names: what is known of them by name must go."""
    recipe = replace(TINY, videos={"train": (1, 16), "test": (1, 16)})

    def remake(recipe: DefaultRecipe) -> list[str]:
        shutil.rmtree(tmp_path / "data", ignore_errors=True)
        default_model._make_data(recipe, tmp_path, workers=1)
        return sorted(path.stem for path in (tmp_path / "features").iterdir())

    (tmp_path / "features").mkdir()
    for name in ("train", "test"):
        (tmp_path / "features" / f"{name}.safetensors").touch()
    assert remake(recipe) == ["test", "train"]
    assert remake(recipe) == ["test", "train"]  # the same videos again
    longer = recipe.videos | {"test": (2, 16)}
    assert remake(replace(recipe, videos=longer)) == ["train"]
    assert remake(replace(recipe, seed=9)) == []


def test_a_record_speaks_for_its_own_settings_and_encoder_only(made):
    work, _, _ = made
    assert default_model._is_done(TINY, work, "videodistill")
    assert not default_model._is_done(TINY, work, "uniform")
    for other in (
        replace(TINY, seed=9),
        replace(TINY, head=replace(TINY.head, steps=4)),
        replace(TINY, model=TINY.model | {"pick": 4}),
    ):
        assert not default_model._is_done(other, work, "videodistill")


def test_a_damaged_record_counts_as_none(tmp_path):
    record = tmp_path / "record.json"
    assert default_model._read(record) == {}
    default_model._write(record, {"settings": 1})
    assert default_model._read(record) == {"settings": 1}
    record.write_text('{"settings": ')
    assert default_model._read(record) == {}
    assert [path.name for path in tmp_path.iterdir()] == ["record.json"]


def test_a_full_disk_is_one_line(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "work" / "x"))

    monkeypatch.setattr(default_model, "_make_data", full)
    with pytest.raises(UserError, match="work/x: No space left on device; free some space"):
        train_default(tmp_path / "work", tmp_path / "out", recipe=TINY, log=lambda line: None)
    assert not (tmp_path / "out").exists()


def test_the_card_shows_what_was_measured(made):
    _, _, record = made
    alone = model_card(record)
    assert "| family | VideoDistill (bundled) | bundled, shown uniform frames |" in alone
    assert "--controls" not in alone and "without" not in alone.partition("## Accuracy")[0]
    arm = record["arms"]["videodistill"]
    compared = model_card(record | {"arms": {"videodistill": arm, "unsupervised": arm}})
    assert "| the same, no evidence supervision |" in compared
    assert "the same model without." in compared and "train-default --controls" in compared
    described = arm["results"]["test"]["count"]["accuracy"]
    (row,) = [line for line in alone.splitlines() if line.startswith("| count |")]
    assert row.split(" | ")[1] == f"{described:.1f}"
