"""All questions of a split, from features: the answers, and what becomes of a stopped run."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import videodistill
from tests.videodistill.training import small
from videodistill import Answerer, UserError
from videodistill.data.datasets import get_dataset
from videodistill.data.record import Clip, Question
from videodistill.encoders import load_encoder
from videodistill.evaluation import predict as predicting
from videodistill.evaluation.predict import predict, stretch_around_best
from videodistill.evaluation.predictions import read_predictions
from videodistill.model import VideoDistill

VIDEOS = [f"v{number}.mp4" for number in range(7)]


def make_checkpoint(folder: Path, **settings: Any) -> Path:
    encoder = load_encoder(small.make_encoder(folder / "encoder"))
    given = {"width": 16, "heads": 2, "frames": 8, "pick": 2, "answers": list(small.COLOURS)}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = VideoDistill.for_encoder(encoder, **(given | settings))
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> Answerer:
    return videodistill.load(checkpoint, device="cpu")


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    small.write_dataset(tmp_path / "data")
    return tmp_path / "data"


@pytest.fixture
def questions(dataset: Path) -> list[Question]:
    return get_dataset("own").read(dataset / "train.jsonl")


def lines_of(file: Path) -> dict[str, dict[str, Any]]:
    entries = [json.loads(line) for line in file.read_text().split("\n")[:-1]]
    assert len({entry["question_id"] for entry in entries}) == len(entries)
    return {entry.pop("question_id"): entry for entry in entries}


def alone(model: Answerer, question: Question, features: dict[str, Any]) -> dict[str, Any]:
    """A question's line, computed without batches."""
    found, text = features[question.video], model.encoder.encode_texts([question.question])
    start, end = question.interval or (0.0, found.duration)
    inside = (found.seconds >= start) & (found.seconds <= end)
    seconds = found.seconds[inside]
    with torch.inference_mode():
        output = model.model(
            found.frame_embed[None, inside].float(),
            found.patches[None, inside].float(),
            text.text_embed,
            text.tokens,
            text.mask,
            times=((seconds - start) / (end - start))[None],
            pick=min(2, len(seconds)),
        )
        if question.choices:
            choices = model.encoder.encode_texts(question.choices).text_embed
            answer = model.model.choice_logits(output.answer_embed, choices[None]).argmax().item()
        else:
            answer = small.COLOURS[model.model.vocabulary_logits(output.answer_embed).argmax()]
    stretch = stretch_around_best(output.scores[0], seconds, end, start)
    frames = seconds[output.sample.indices[0]].tolist()
    return {
        "prediction": answer,
        "evidence": pytest.approx(stretch, abs=2e-3),
        "frames": pytest.approx(frames, abs=2e-3),
    }


@pytest.mark.parametrize("workers", [0, 1])
def test_answers_are_those_of_one_question_at_a_time(
    workers: int, model: Answerer, questions: list[Question], tmp_path: Path
) -> None:
    features, shown = small.features_of(VIDEOS), []
    done = predict(
        model,
        questions,
        features,
        tmp_path / "out.jsonl",
        videos=3,
        workers=workers,
        progress=lambda done, total: shown.append((done, total)),
    )
    assert (done.answered, done.reused, done.unseen) == (len(questions), 0, {})
    lines = lines_of(tmp_path / "out.jsonl")
    assert lines == {q.question_id: alone(model, q, features) for q in questions}
    assert {type(line["prediction"]) for line in lines.values()} == {int, str}
    assert len({str(line["prediction"]) for line in lines.values()}) > 2
    assert any(q.interval for q in questions) and shown[-1][0] == shown[-1][1]
    assert not (tmp_path / "out.jsonl.partial").exists()


def test_a_stopped_run_goes_on(
    model: Answerer, questions: list[Question], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    features, out = small.features_of(VIDEOS), tmp_path / "out.jsonl"
    questions[0] = replace(questions[0], question_id="q\u20280")  # not an end of a line
    predict(model, questions, features, out)
    assert read_predictions(out).keys() == {q.question_id for q in questions}
    whole, partial = lines_of(out), tmp_path / "out.jsonl.partial"
    answer = predicting._answer

    def stop(*arguments: Any) -> Any:
        for number, line in enumerate(answer(*arguments)):
            if number == 5:
                raise KeyboardInterrupt
            yield line

    def begin() -> None:
        with monkeypatch.context() as patch:
            patch.setattr(predicting, "_answer", stop)
            with pytest.raises(KeyboardInterrupt):
                predict(model, questions, features, out)

    begin()
    partial.write_text(partial.read_text() + '{"question_id": "q1", "pre')  # a kill within a line
    done = predict(model, questions, features, out)
    assert (done.answered, done.reused) == (len(questions) - 5, 5)
    assert lines_of(out) == whole
    # Of another model, other questions, other answers, another K: nothing is taken over.
    reworded = [replace(questions[0], question="why?"), *questions[1:]]
    for asked, settings in (
        (reworded, {}),
        (questions[1:], {}),
        (questions, {"pick": 1}),
        (questions, {"answers": ["red", "blue"]}),
    ):
        begin()
        told: list[str] = []
        done = predict(model, asked, features, out, log=told.append, **settings)
        assert (done.answered, done.reused) == (len(asked), 0)
        assert told == [f"{partial}: is of another model, other questions or features: begun anew"]


def test_a_full_gpu_is_told_in_a_line(
    model: Answerer, questions: list[Question], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **settings: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(model, "_head", fail)
    with pytest.raises(UserError, match=r"out.jsonl: the GPU has too little memory; .* --videos"):
        predict(model, questions, small.features_of(VIDEOS), tmp_path / "out.jsonl")


def test_what_cannot_be_answered_is_written_with_its_reason(
    model: Answerer, questions: list[Question], tmp_path: Path
) -> None:
    features, out = small.features_of(VIDEOS[1:]), tmp_path / "out.jsonl"
    done = predict(model, questions, features, out)
    lost = {q.question_id: "no features of v0.mp4" for q in questions if q.video == "v0.mp4"}
    assert lost and done.unseen == lost
    assert done.answered == len(questions) - len(lost)
    found = read_predictions(out)
    assert {name: p.error for name, p in found.items() if p.error} == lost
    assert found.keys() == {q.question_id for q in questions}
    assert all(found[name].evidence for name in found.keys() - lost.keys())
    nothing = predict(model, questions[:1], {}, out)
    assert nothing.answered == 0 and list(lines_of(out)) == [questions[0].question_id]


def test_answers_can_be_listed(model: Answerer, questions: list[Question], tmp_path: Path) -> None:
    features, out = small.features_of(VIDEOS), tmp_path / "out.jsonl"
    predict(model, questions, features, out, answers=["teal", "a  grey ring"])
    told = [line["prediction"] for line in lines_of(out).values()]
    assert {x for x in told if isinstance(x, str)} <= {"teal", "a grey ring"}
    fresh = videodistill.load(
        zero_shot=True, encoder=Path(model.encoder.name), device="cpu"
    )  # without a vocabulary: everyday words
    predict(fresh, questions, features, out)
    words = set(videodistill.engine.checks.read_answers(videodistill.engine.checks.GENERAL_ANSWERS))
    told = [line["prediction"] for line in lines_of(out).values()]
    assert {x for x in told if isinstance(x, str)} <= words


@pytest.mark.parametrize(
    ("change", "settings", "said"),
    [
        ({}, {"out": "answers.json"}, "answers.json: name it .jsonl"),
        ({}, {"pick": 0}, "pick"),
        ({}, {"answers": ["red"]}, "at least two"),
        ({"clips": (Clip("a.mp4", 0.0, 1.0),)}, {}, "choose between videos"),
    ],
)
def test_bad_input_is_refused(
    change: dict[str, Any],
    settings: dict[str, Any],
    said: str,
    model: Answerer,
    questions: list[Question],
    tmp_path: Path,
) -> None:
    out = tmp_path / settings.pop("out", "out.jsonl")
    asked = [replace(questions[0], **change), *questions[1:]]
    with pytest.raises(UserError, match=said):
        predict(model, asked, small.features_of(VIDEOS), out, **settings)
    assert not list(tmp_path.glob("*.json*"))


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def command(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as end:
            main_of(arguments)
        told = capsys.readouterr()
        return end.value.code or 0, told.out, told.err

    def main_of(arguments: tuple[object, ...]) -> None:
        from videodistill.cli import app

        app([str(argument) for argument in arguments])

    return command


def test_the_command_answers_and_its_answers_can_be_scored(
    run: Callable, checkpoint: Path, dataset: Path, tmp_path: Path
) -> None:
    encoder = load_encoder(checkpoint / "encoder")
    small.write_cache(tmp_path / "features", encoder, VIDEOS[:6], 8)
    out = tmp_path / "val.jsonl"
    given = ["predict", "own", dataset, "--features", tmp_path / "features", "--out", out]
    given += ["--checkpoint", checkpoint, "--workers", 0]
    status, _, error = run(*given)
    assert status == 2 and "which split? give --split with one of train, val" in error
    status, told, _ = run(*given, "--split", "val")
    lost = sum("v6" in line for line in (dataset / "val.jsonl").read_text().splitlines())
    assert status == 1 and f"questions without an answer: {lost}" in told
    assert "no features of v6.mp4" in told
    status, told, _ = run("score", "own", dataset, out, "--split", "val", "--json")
    assert status == 0
    assert len(json.loads(told)["unanswered"]) == lost
    (tmp_path / "data" / "val.jsonl").write_text(
        (dataset / "train.jsonl").read_text().splitlines()[0] + "\n"
    )
    status, told, _ = run(*given, "--split", "val", "--precision", "bf16", "--json")
    assert status == 0 and json.loads(told)["answered"] == 1
    other = make_checkpoint(tmp_path / "other", width=16)
    settings = json.loads((other / "encoder" / "preprocessor_config.json").read_text())
    settings["image_mean"] = [0.5, 0.5, 0.5]
    (other / "encoder" / "preprocessor_config.json").write_text(json.dumps(settings))
    status, _, error = run(*given, "--split", "val", "--zero-shot", "--encoder", other / "encoder")
    assert status == 2 and "drop one of the two" in error
    options = [x for x in given if x not in ("--checkpoint", checkpoint)]
    status, _, error = run(
        *options, "--split", "val", "--zero-shot", "--encoder", other / "encoder"
    )
    assert status == 2 and "holds features of the encoder" in error


def test_stretch_around_the_best_frame():
    seconds, scores = torch.arange(6.0), torch.tensor([-1.0, 1.5, 2.0, 1.0, -2.0, 1.9])
    assert stretch_around_best(scores, seconds, 6.0) == (1.0, 4.0)
    assert stretch_around_best(scores.flip(0), seconds, 6.0) == (2.0, 5.0)
    assert stretch_around_best(torch.zeros(6), seconds, 6.5) == (0.0, 6.5)
    last = torch.tensor([0.0, 0.0, -3.0, -1.0, 1.0, 3.0])
    assert stretch_around_best(last, seconds, 6.5) == (5.0, 6.5)
