from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import videodistill
from tests.videodistill.engine.material import VOCABULARY, make_checkpoint, make_video
from tests.videodistill.tiny import tiny_clip, tiny_siglip
from videodistill import Answered, Answerer, UserError
from videodistill.engine.answerer import seen_region
from videodistill.engine.checks import GENERAL_ANSWERS
from videodistill.video import FrameReader, VideoWarning

QUESTIONS = ["What colour is it?", "Where does the square go?", "Is it red?", "何が見えますか"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("engine")


@pytest.fixture(scope="module")
def video(folder: Path) -> Path:
    return make_video(folder / "square.mp4")


@pytest.fixture(scope="module")
def checkpoint(folder: Path) -> Path:
    return make_checkpoint(folder / "checkpoint")


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> Answerer:
    return videodistill.load(checkpoint, device="cpu")


def assert_same(one: Answered, other: Answered) -> None:
    for a, b in zip(one, other, strict=True):
        assert (a.question, a.answer) == (b.question, b.answer)
        assert [text for text, _ in a.top] == [text for text, _ in b.top]
        np.testing.assert_allclose([p for _, p in a.top], [p for _, p in b.top], atol=1e-5)
        assert [frame.index for frame in a.frames] == [frame.index for frame in b.frames]
        np.testing.assert_allclose(a.scores, b.scores, atol=1e-5)
        np.testing.assert_allclose(a.gates, b.gates, atol=1e-5)


def test_an_answer_says_what_it_rests_on(model: Answerer, video: Path) -> None:
    result = model.answer(video, QUESTIONS[0])
    (answer,) = result
    assert answer.answer in VOCABULARY
    assert answer.top[0] == (answer.answer, answer.confidence)
    assert len(answer.top) == 5 and answer.top == tuple(sorted(answer.top, key=lambda t: -t[1]))
    with FrameReader(video) as reader:
        looked_at = reader.sample_indices(16)
        np.testing.assert_array_equal(result.video.indices, looked_at)
        np.testing.assert_array_equal(result.video.times, reader.times[looked_at])
    # Inference takes the four best, in order of time.
    best = sorted(np.argsort(-answer.scores)[:4])
    assert [frame.index for frame in answer.frames] == looked_at[best].tolist()
    assert [frame.score for frame in answer.frames] == answer.scores[best].tolist()
    assert [frame.time for frame in answer.frames] == result.video.times[best].tolist()
    assert answer.gates.shape == (4, 4, 4) and (answer.gates > 0).all() and (answer.gates < 1).all()
    assert result.timings.decode > 0 and result.timings.encode > 0 and result.timings.head > 0


def test_answers_in_bfloat16_are_nearly_the_same(
    model: Answerer, checkpoint: Path, video: Path
) -> None:
    rounded = videodistill.load(checkpoint, device="cpu", precision="bf16")
    assert rounded.model.refiner.frame.weight.dtype == torch.bfloat16
    assert rounded.model.refiner.norms[0].weight.dtype == torch.float32
    for options in ({}, {"choices": ["red", "green", "a blue square"]}):
        exact = model.answer(video, QUESTIONS, **options)
        for one, other in zip(exact, rounded.answer(video, QUESTIONS, **options), strict=True):
            assert one.answer == other.answer
            assert one.confidence == pytest.approx(other.confidence, abs=0.02)
            np.testing.assert_allclose(one.scores, other.scores, atol=0.1)
            np.testing.assert_allclose(one.gates, other.gates, atol=0.02)
            assert (one.scores != other.scores).any()


def test_all_probabilities_sum_to_one(model: Answerer, video: Path) -> None:
    (answer,) = model.answer(video, QUESTIONS[0], choices=["red", "green", "a blue square"])
    assert sum(p for _, p in answer.top) == pytest.approx(1, abs=1e-6)


def test_several_questions_answer_as_one_at_a_time(model: Answerer, video: Path) -> None:
    together = model.answer(video, QUESTIONS)
    apart = [model.answer(video, question)[0] for question in QUESTIONS]
    assert_same(together, apart)
    assert len({a.scores.tobytes() for a in together}) == len(QUESTIONS)  # the question matters


def test_many_questions_cross_the_batch_limit(model: Answerer, video: Path) -> None:
    seen = model.watch(video)
    many = model.answer(seen, [f"question {i % 5}?" for i in range(70)])
    assert len(many) == 70
    assert_same(many[:5], many[65:])


def test_several_questions_share_one_decode_and_one_encoding(
    model: Answerer, video: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = {"read": 0, "encode_frames": 0, "encode_texts": 0}

    def counted(owner: type, name: str) -> None:
        original = getattr(owner, name)

        def wrapper(*args, **kwargs):
            calls[name] += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, wrapper)

    counted(FrameReader, "read")
    counted(type(model.encoder), "encode_frames")
    counted(type(model.encoder), "encode_texts")
    model.answer(video, QUESTIONS)
    assert calls == {"read": 1, "encode_frames": 1, "encode_texts": 1}


def test_a_video_is_watched_once_for_many_calls(model: Answerer, video: Path) -> None:
    seen = model.watch(video, frames=8, start=1, end=2)
    assert seen.times.min() >= 1 - 0.1 and seen.times.max() < 2 and len(seen.times) == 8
    assert_same(
        model.answer(seen, QUESTIONS), model.answer(video, QUESTIONS, frames=8, start=1, end=2)
    )
    with pytest.raises(TypeError, match="watch"):
        model.answer(seen, QUESTIONS, frames=4)


def test_decoding_in_parts_changes_nothing(
    model: Answerer, video: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = model.answer(video, QUESTIONS)
    monkeypatch.setattr("videodistill.engine.answerer._DECODED_BYTES", 3 * 64 * 48 * 5)
    assert_same(whole, model.answer(video, QUESTIONS))


def test_answer_lists_and_choices_are_the_same_thing(
    model: Answerer, video: Path, tmp_path: Path
) -> None:
    words = ["cat", "dog", "red ball"]
    file = tmp_path / "answers.txt"
    file.write_text("\ufeffcat\r\n\r\n dog \nred   ball\n", encoding="utf-8")
    by_choices = model.answer(video, QUESTIONS, choices=words)
    assert_same(by_choices, model.answer(video, QUESTIONS, answers=words))
    assert_same(by_choices, model.answer(video, QUESTIONS, answers=file))


def test_the_template_of_the_config_wraps_choices(folder: Path, video: Path) -> None:
    path = make_checkpoint(folder / "template", choice_template="a photo of {}")
    plain = make_checkpoint(folder / "plain")
    with_template = videodistill.load(path).answer(video, "what?", choices=["cat", "dog {x}"])
    by_hand = videodistill.load(plain).answer(
        video, "what?", choices=["a photo of cat", "a photo of dog {x}"]
    )
    assert with_template[0].confidence == pytest.approx(by_hand[0].confidence, abs=1e-6)
    assert with_template[0].top[0][0] in ("cat", "dog {x}")


def test_zero_shot_is_the_encoder_alone(folder: Path, video: Path) -> None:
    model = videodistill.load(zero_shot=True, encoder=tiny_clip(folder / "clip"), device="cpu")
    choices = ["a red square", "a dog", "nothing"]
    (answer,) = model.answer(video, QUESTIONS[0], choices=choices, frames=12, pick=3)

    encoder = model.encoder
    with FrameReader(video) as reader:
        frames = F.normalize(encoder.encode_frames(reader.sample(12).images).frame_embed, dim=-1)
    question = F.normalize(encoder.encode_texts([QUESTIONS[0]]).text_embed, dim=-1)
    nearest = (frames @ question[0]).topk(3).indices
    assert [frame.index for frame in answer.frames] == [
        int(model.watch(video, frames=12).indices[n]) for n in sorted(nearest.tolist())
    ]
    seen = F.normalize(frames[nearest].mean(0), dim=-1)
    texts = F.normalize(encoder.encode_texts(choices).text_embed, dim=-1)
    expected = (encoder.logit_scale * texts @ seen).softmax(-1)
    got = dict(answer.top)
    np.testing.assert_allclose([got[c] for c in choices], expected.numpy(), atol=1e-5)


def test_zero_shot_needs_no_choices(folder: Path, video: Path) -> None:
    model = videodistill.load(zero_shot=True, encoder=tiny_clip(folder / "clip"))
    result = model.answer(video, QUESTIONS)
    words = GENERAL_ANSWERS.read_text(encoding="utf-8").splitlines()
    assert 900 <= len(words) == len(set(words)) <= 1_100
    assert {answer.answer for answer in result} <= set(words)
    assert not result.trained


def test_zero_shot_repeats_itself(folder: Path, video: Path) -> None:
    path, state = tiny_siglip(folder / "siglip"), torch.get_rng_state()
    first, second = (
        videodistill.load(zero_shot=True, encoder=path).answer(video, "what?", choices=["a", "b"])
        for _ in range(2)
    )
    assert_same(first, second)
    assert torch.equal(state, torch.get_rng_state())


def test_a_video_shorter_than_pick_gives_all_it_has(model: Answerer, folder: Path) -> None:
    short = make_video(folder / "short.mp4", frames=2)
    (answer,) = model.answer(short, "what?")
    assert [frame.index for frame in answer.frames] == [0, 1]
    with pytest.raises(UserError, match=r"--pick 3 is more than the 2 frame"):
        model.answer(short, "what?", pick=3)


def test_long_questions_and_answers_are_cut_with_a_notice(model: Answerer, video: Path) -> None:
    result = model.answer(video, ["word " * 10_000, "short?"], choices=["yes", "no " * 50])
    assert len(result.notices) == 2
    assert '"no no' in result.notices[0] and "24 tokens" in result.notices[0]
    assert "(10,000 words)" in result.notices[1]
    assert result[0].question == "word " * 10_000
    assert not model.answer(video, "short?").notices


def test_what_is_wrong_with_a_video_becomes_a_notice(model: Answerer, folder: Path) -> None:
    whole = make_video(folder / "whole.mkv", frames=60).read_bytes()
    cut = folder / "cut.mkv"
    cut.write_bytes(whole[: len(whole) * 6 // 10])
    with pytest.warns(VideoWarning), FrameReader(cut) as reader:
        expected = tuple(f"{cut}: {notice}" for notice in reader.notices)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert model.answer(cut, "what?").notices == expected


def test_the_result_goes_into_json(model: Answerer, video: Path) -> None:
    told = json.loads(json.dumps(model.answer(video, QUESTIONS).to_dict()))
    assert [answer["question"] for answer in told["answers"]] == QUESTIONS
    assert told["video"]["frames_looked_at"] == 16 and told["video"]["frame_count"] == 30
    assert set(told["seconds"]) == {"decode", "encode", "head"}
    assert set(told["answers"][0]["frames"][0]) == {"time", "index", "score"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"questions": ""}, "the question is empty"),
        ({"questions": ["what?", " \n"]}, "question 2 of 2 is empty"),
        ({"questions": []}, "no question"),
        ({"choices": ["yes"]}, "only 'yes' to choose from"),
        ({"choices": ["yes", "no", "yes"]}, "'yes' is given twice"),
        ({"choices": ["yes", "no", "YES "]}, "'yes' and 'YES' are the same"),
        ({"choices": ["yes", ""]}, "number 2 is empty"),
        ({"choices": ["a", "b"], "answers": ["c", "d"]}, "drop one"),
        ({"answers": ["a"]}, "answers: only 'a'"),
        ({"frames": 0}, "--frames 0"),
        ({"pick": 0}, "--pick 0"),
        ({"pick": 17}, "--pick 17 is more than the 16 frame"),
        ({"start": 9.0}, "9 s lies outside"),
        ({"start": 2.0, "end": 1.0}, "--start 2 is not before --end 1"),
        ({"start": -1.0}, "--start -1"),
        ({"end": float("nan")}, "--end nan"),
    ],
)
def test_bad_arguments_are_named(
    model: Answerer, video: Path, arguments: dict, message: str
) -> None:
    with pytest.raises(UserError) as told:
        model.answer(video, **({"questions": "what?"} | arguments))
    assert message in str(told.value) and "\n" not in str(told.value)


def test_the_encoder_sees_the_central_square_or_the_whole_frame(
    model: Answerer, folder: Path
) -> None:
    assert seen_region(model.encoder, 64, 48) == (8, 0, 48, 48)
    assert seen_region(model.encoder, 48, 64) == (0, 8, 48, 48)
    siglip = videodistill.load_encoder(tiny_siglip(folder / "whole"))
    assert seen_region(siglip, 64, 48) == (0, 0, 64, 48)
