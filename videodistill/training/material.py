"""What a run is about: questions and their videos' features, texts, the vocabulary, the model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from videodistill.data.datasets import Dataset, get_dataset
from videodistill.data.entries import Broken
from videodistill.data.files import read_lines
from videodistill.data.record import Question
from videodistill.data.vocabulary import ceiling, commonest_answers, read_vocabulary
from videodistill.encoders import ImageTextEncoder
from videodistill.engine.feature_cache import FeatureCache
from videodistill.engine.loading import check_pair, checkpoint_folder, load_head
from videodistill.errors import UserError
from videodistill.evaluation.predictions import Prediction
from videodistill.evaluation.scoring import RULES, Scores, score
from videodistill.evaluation.wups import WordNet
from videodistill.model import VideoDistill
from videodistill.training.config import TrainConfig
from videodistill.training.dataset import Examples, PairSettings, text_of
from videodistill.training.texts import TextStore


@dataclass
class SplitQuestions:
    """Questions of a split, apart by whether they can be asked."""

    asked: list[Question] = field(default_factory=list)
    """About videos with features."""
    unseen: list[Question] = field(default_factory=list)
    """About videos without."""
    broken: list[Broken] = field(default_factory=list)
    """Annotations that cannot be read; of the validation split alone."""

    @property
    def grounded(self) -> int:
        """How many questions have evidence."""
        return sum(bool(question.evidence) for question in (*self.asked, *self.unseen))


@dataclass
class Material:
    """Questions to learn from and to validate on; the model that does."""

    dataset: Dataset
    train: SplitQuestions
    val: SplitQuestions
    vocabulary: list[str]
    digest: str
    """Of everything that decides what is learnt, beside the configuration."""
    _wups: dict[str, Any] = field(default_factory=dict)

    def score(self, predictions: Mapping[str, Prediction]) -> Scores:
        """Of the validation questions, by id; those of unseen videos count as wrong."""
        predictions = dict(predictions)
        for question in self.val.unseen:
            predictions[question.question_id] = Prediction(error=f"no features of {question.video}")
        return score(
            self.dataset.rule,
            [*self.val.asked, *self.val.unseen],
            predictions,
            broken=self.val.broken,
            vocabulary=self.vocabulary or None,
            **self._wups,
        )


def read_material(
    config: TrainConfig,
    features: Mapping[str, Any],
    encoder: ImageTextEncoder,
    log: Callable[[str], None],
) -> Material:
    """Read the questions, and say what of them cannot be used.

    Args:
        config: The run.
        features: By video; see :class:`Examples`.
        encoder: That they were made with.
        log: Called with lines of notice.

    Raises:
        UserError: A split is missing, an annotation file is broken, no question is left, or the
            features are not this encoder's.
    """
    data, pretraining = config.data, any(config.losses.pretraining.values())
    dataset = get_dataset(data.dataset)
    found = dataset.find(data.path)
    train = _read(dataset, found, data.train, data.path, features, None)
    val = _read(dataset, found, data.val, data.path, features, [])
    if data.holdout:
        train, val = _hold_out(train, data.holdout)
    if not pretraining:
        train.asked = [question for question in train.asked if question.answer is not None]
        val.asked = [question for question in val.asked if question.answer is not None]
        val.unseen = [question for question in val.unseen if question.answer is not None]
    for name, split in (("train", train), ("validation", val)):
        _tell(name, split, log)
    if config.steps and not train.asked:
        raise UserError(
            f"{data.path}: no question of split {data.train} has an answer and features of its "
            f"video in {data.features}; cache the videos of this split first"
        )
    if not config.steps and not val.asked:
        raise UserError(
            f"{data.path}: without steps the model is only measured, and no question of split "
            f"{data.val} has an answer and features of its video in {data.features}"
        )
    told = config.losses.evidence or any(p.evidence_first for p in config.phases.values())
    grounded = any(question.evidence or question.context for question in train.asked)
    if config.steps and told and not grounded:
        raise UserError(
            f"{data.path}: no question of split {data.train} has evidence, as losses.evidence and "
            "evidence_first of phases need it: drop these"
        )
    _check_sizes(features, (train.asked or val.asked)[:1], encoder, data.features)
    vocabulary = [] if pretraining else _vocabulary(config, dataset, train.asked)
    for name, split in (("train", train), ("validation", val)):
        questions = [question for question in split.asked if question.choices is None]
        if vocabulary and questions:
            share = ceiling(questions, vocabulary)
            effect = "give no loss" if name == "train" else "count as wrong"
            log(
                f"{name}: {share:.1f}% of the open answers are among the {len(vocabulary)} of the "
                f"classifier; others {effect}"
            )
    digest = hashlib.sha256(json.dumps([encoder.fingerprint, vocabulary]).encode())
    for q in (*train.asked, *val.asked):
        fact = (q.question_id, q.video, q.question, q.answer, q.choices, q.interval, q.evidence)
        digest.update(json.dumps((*fact, q.context)).encode())
    if isinstance(features, FeatureCache):
        videos = dict.fromkeys(q.video for q in (*train.asked, *val.asked))
        digest.update(json.dumps([features.checksum(video) for video in videos]).encode())
    wups: dict[str, Any] = {}
    if RULES[dataset.rule].by_wups and val.asked:
        stop_words = read_lines(found[data.val or data.train].with_name("stopwords.txt"))
        wups = {"lexicon": WordNet(), "stop_words": stop_words}
    return Material(dataset, train, val, vocabulary, digest.hexdigest()[:16], wups)


def _read(
    dataset: Dataset,
    found: Mapping[str, Path],
    split: str | None,
    path: str,
    features: Mapping[str, Any],
    broken: list[Broken] | None,
) -> SplitQuestions:
    """A split; its broken annotations are put into ``broken``, without which one is an error."""
    questions = SplitQuestions(broken=[] if broken is None else broken)
    if split is None:
        return questions
    if split not in found:
        raise UserError(f"{path}: no split {split} of {dataset.title}; it has {', '.join(found)}")
    for question in dataset.read(found[split], broken):
        if question.clips:
            raise UserError(f"{dataset.title} chooses between videos, which cannot be trained here")
        seen = question.video in features
        (questions.asked if seen else questions.unseen).append(question)
    return questions


def _hold_out(whole: SplitQuestions, share: float) -> tuple[SplitQuestions, SplitQuestions]:
    """Training and validation questions: by a hash of the video's name, the same in every run."""
    train, val = SplitQuestions(), SplitQuestions()
    for name in ("asked", "unseen"):
        for question in getattr(whole, name):
            digest = hashlib.sha256(question.video.encode()).digest()
            held = int.from_bytes(digest[:8], "big") < share * 2**64
            getattr(val if held else train, name).append(question)
    return train, val


def _tell(name: str, split: SplitQuestions, log: Callable[[str], None]) -> None:
    videos = len({question.video for question in split.asked})
    if split.asked:
        log(f"{name}: {len(split.asked)} questions about {videos} videos")
    effect = "left out" if name == "train" else "counted as wrong"
    if split.unseen:
        missing = sorted({question.video for question in split.unseen})
        log(
            f"{name}: {len(split.unseen)} questions about {len(missing)} videos without features, "
            f"{missing[0]} first: {effect}"
        )
    if split.broken:
        log(
            f"{name}: {len(split.broken)} annotations cannot be read: counted as wrong; the first: "
            f"{split.broken[0].message}"
        )


def _check_sizes(
    features: Mapping[str, Any],
    some: Sequence[Question],
    encoder: ImageTextEncoder,
    folder: str,
) -> None:
    for question in some:
        found = features[question.video]
        rows, columns = encoder.grid
        expected = ((encoder.embed_dim,), (rows * columns, encoder.patch_dim))
        shapes = tuple(found.frame_embed.shape[1:]), tuple(found.patches.shape[1:])
        if shapes != expected:
            raise UserError(
                f"{folder}: features have sizes {shapes}, encoder {encoder.name} gives {expected}; "
                "set encoder to the one that they were made with"
            )


def _vocabulary(config: TrainConfig, dataset: Dataset, questions: Sequence[Question]) -> list[str]:
    data = config.data
    if data.answers is not None:
        return read_vocabulary(data.answers)
    if data.train is None and config.init is not None:
        return load_head(checkpoint_folder(config.init)).config.answers
    open_ended = (question for question in questions if question.choices is None)
    return commonest_answers(open_ended, data.vocabulary or dataset.vocabulary)


def make_model(
    config: TrainConfig, encoder: ImageTextEncoder, vocabulary: Sequence[str]
) -> VideoDistill:
    """The model as it begins: from the encoder alone, or from ``config.init``.

    Raises:
        UserError: A setting is out of range, or the checkpoint is of another encoder or size.
    """
    torch.manual_seed(config.seed)
    try:
        model = VideoDistill.for_encoder(encoder, answers=list(vocabulary), **config.model)
    except ValueError as error:
        raise UserError(f"model: {error}") from error
    if Path(encoder.name).is_dir():
        model.config.encoder = str(Path(encoder.name).resolve())  # for any working directory
    if config.init is None:
        return model
    folder = checkpoint_folder(config.init)
    begun = load_head(folder)
    check_pair(begun, encoder, folder)
    weights, ours = begun.state_dict(), model.state_dict()
    if begun.config.answers != model.config.answers:
        weights = {k: v for k, v in weights.items() if not k.startswith("answering.classifier.")}
    for key, value in weights.items():
        if key not in ours or ours[key].shape != value.shape:
            raise UserError(
                f"init: {folder} has other sizes than model ({key} first): set model's fields to "
                f"those in its config.json"
            )
    model.load_state_dict(weights, strict=False)
    missing = [key for key in ours.keys() - weights.keys() if "classifier" not in key]
    if missing:
        raise UserError(
            f"init: {folder} has other sizes than model (no {min(missing)}): set model's fields to "
            "those in its config.json"
        )
    return model


def make_examples(
    config: TrainConfig,
    material: Material,
    features: Mapping[str, Any],
    encoder: ImageTextEncoder,
    model: VideoDistill,
    log: Callable[[str], None] | None,
) -> tuple[Examples | None, Examples | None]:
    """Examples to learn from and to validate on; None where there are no questions.

    Their texts are encoded once, into the folder of the run.
    """
    losses, template = config.losses, model.config.choice_template
    pretraining = any(losses.pretraining.values())
    questions = [*material.train.asked, *material.val.asked]
    if not questions:
        return None, None
    asked = list(dict.fromkeys(text_of(question, pretraining) for question in questions))
    options = dict.fromkeys(
        template.replace("{}", choice)
        for question in questions
        for choice in question.choices or ()
    )
    known = frozenset(asked)
    others = [text for text in options if text not in known]
    texts = TextStore.make(Path(config.out) / "texts", encoder, asked, others, log=log)
    pairs = None
    if pretraining:
        special = encoder.tokenizer.all_special_ids
        blanks = encoder.tokenizer("_", add_special_tokens=False)["input_ids"]
        pairs = PairSettings(
            losses.masked_share, encoder.max_tokens, tuple(special), int(blanks[-1])
        )
    return tuple(
        Examples(
            split.asked,
            features,
            texts,
            material.vocabulary,
            frames=model.config.frames,
            template=template,
            pairs=pairs,
        )
        if split.asked
        else None
        for split in (material.train, material.val)
    )
