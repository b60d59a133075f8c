"""What is in a dataset: questions, videos, and how far one gets without looking."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from videodistill.data.datasets import Dataset
from videodistill.data.entries import Broken
from videodistill.data.record import Question
from videodistill.data.videos import find_videos
from videodistill.data.vocabulary import ceiling, commonest_answers, read_vocabulary
from videodistill.evaluation.priors import priors


def summarise(
    dataset: Dataset,
    path: str | Path,
    *,
    videos: str | Path | None = None,
    answers: str | Path | None = None,
) -> dict[str, Any]:
    """Count a dataset's questions and videos, and what its answers give away.

    Args:
        dataset: Which one.
        path: Its folder, or the main file of one split.
        videos: Folder to look for its videos in.
        answers: Text file of a vocabulary, one answer per line; by default the commonest answers
            of the training split.

    Returns:
        ``dataset``: its name. ``splits``: by name ``file``, ``questions``, ``videos`` (how many),
        ``types`` (questions by type), ``without_answer`` and ``without_text`` (how many),
        ``broken`` (what is wrong with annotations that cannot be read), ``ceiling`` (percent of
        the answers that are in the vocabulary; ``None`` without one, or with choices) and
        ``priors`` (see `videodistill.evaluation.priors.priors`; ``None`` without a training
        split). ``vocabulary``: ``source`` and ``answers`` (how many), or ``None``. ``videos``:
        ``folder``, ``found`` (how many) and ``missing`` (names), or ``None``.

    Raises:
        UserError: A file is missing or broken as a whole, or a question id is given twice.
    """
    found = dataset.find(path)
    splits: dict[str, list[Question]] = {}
    broken: dict[str, list[Broken]] = {}
    for split, file in found.items():
        broken[split] = []
        splits[split] = dataset.read(file, broken[split])
    given = read_vocabulary(answers) if answers is not None else None
    training: dict[Path, list[Question]] = {file: splits[split] for split, file in found.items()}
    report: dict[str, Any] = {"dataset": dataset.name, "splits": {}, "vocabulary": None}
    for split, questions in splits.items():
        train_file = dataset.training_file(split, path)
        if train_file is not None and train_file not in training:
            training[train_file] = dataset.read(train_file, [])
        train = training.get(train_file, [])
        known = sum(question.answer is not None for question in questions)
        seen = found[split] == train_file
        vocabulary = given or commonest_answers(train, dataset.vocabulary)
        open_ended = any(question.choices is None for question in questions)
        if open_ended and vocabulary:
            source = answers if given else train_file
            report["vocabulary"] = {"source": str(source), "answers": len(vocabulary)}
        report["splits"][split] = {
            "file": str(found[split]),
            "questions": len(questions),
            "videos": len(_videos(questions)),
            "types": dict(sorted(Counter(q.family or "no type" for q in questions).items())),
            "without_answer": len(questions) - known,
            "without_text": sum(not question.question for question in questions),
            "broken": [entry.message for entry in broken[split]],
            "ceiling": ceiling(questions, vocabulary)
            if open_ended and vocabulary and known and (given or not seen)
            else None,
            "priors": priors(train, questions, among_choices=True)
            if known and not seen and any(q.answer is not None for q in train)
            else None,
        }
    report["videos"] = None
    if videos is not None:
        names = sorted({name for questions in splits.values() for name in _videos(questions)})
        files = find_videos(videos, names)
        missing = [name for name, file in files.items() if file is None]
        found_count = len(files) - len(missing)
        report["videos"] = {"folder": str(videos), "found": found_count, "missing": missing}
    return report


def _videos(questions: Sequence[Question]) -> set[str]:
    return {name for question in questions for name in question.videos}
