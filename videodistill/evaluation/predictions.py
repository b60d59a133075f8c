"""Predictions in the layouts that are about: ours, and those of published files."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from videodistill.data.files import read_entries, read_json, stretches
from videodistill.data.record import Stretch
from videodistill.errors import UserError

_IDS = ("question_id", "qid", "q_uid", "id")
_ANSWERS = ("prediction", "pred", "pred_answer", "predicted_answer", "answer")


@dataclass(frozen=True)
class Prediction:
    """What was answered to one question."""

    answer: int | str | None = None
    """A text, or the index of a choice."""
    evidence: Stretch | None = None
    """The stretch of the video that shows it, in seconds."""
    error: str | None = None
    """Why there is no answer, e.g. a video that could not be read."""


def read_predictions(path: str | Path) -> dict[str, Prediction]:
    """Predictions by question id.

    Understood are, as .json or, where it is a list, as .jsonl:

    - ``{id: answer}``, and ``{id: {"prediction": answer, ...}}`` as NExT-QA's published results;
    - ``{video: {qid: answer}}``, as NExT-QA's open-ended results, for the id "<video>_<qid>";
    - ``[{"question_id": id, "answer": answer, ...}, ...]``, as for ActivityNet-QA's evaluator, also
      with qid, q_uid or id, and with prediction, pred, pred_answer or predicted_answer, which count
      before answer: beside them that is the true one;
    - ``{type: [{...}, ...]}``, as for STAR's server.

    An answer is a text or the index of a choice. An object may also have ``evidence``, [start, end]
    in seconds, and ``error``, a text that tells why there is no answer.

    Raises:
        UserError: The file cannot be read, an entry is of another form, or an id comes twice.
    """
    path = Path(path)
    predictions: dict[str, Prediction] = {}
    for where, name, value in _values(path):
        if name in predictions:
            raise UserError(f"{where}: question {name} has a prediction already")
        predictions[name] = _prediction(value, where)
    return predictions


def read_evidence(path: str | Path) -> dict[str, Stretch]:
    """Predicted stretches by question id from ``{id: [start, end]}``, the layout of NExT-GQA.

    Raises:
        UserError: The file cannot be read, or an entry is of another form.
    """
    path = Path(path)
    return {
        name: stretches([pair], f"{path}: question {name}")[0]
        for name, pair in read_json(path, dict).items()
    }


def _values(path: Path) -> Iterator[tuple[str, str, Any]]:
    """(Where, id, what is predicted) of everything in a file."""
    if path.suffix == ".jsonl" or not _is_object(path):
        yield from (_with_id(value, where) for where, value in read_entries(path))
        return
    for name, value in read_json(path, dict).items():
        where = f"{path}: {name}"
        if isinstance(value, list):
            yield from (_with_id(entry, where) for entry in value)
        elif isinstance(value, dict) and not value.keys() & {*_ANSWERS, "evidence", "error"}:
            yield from ((f"{where}: {qid}", f"{name}_{qid}", entry) for qid, entry in value.items())
        else:
            yield where, name, value


def _is_object(path: Path) -> bool:
    try:
        with path.open(encoding="utf-8-sig") as file:
            return file.read(4096).lstrip().startswith("{")
    except (OSError, UnicodeDecodeError):
        return True  # reading it as one says what is wrong


def _with_id(value: Any, where: str) -> tuple[str, str, Any]:
    keys = [key for key in _IDS if key in value] if isinstance(value, dict) else []
    if not keys or not isinstance(value[keys[0]], int | str):
        raise UserError(f"{where}: no object with the id of its question as {', '.join(_IDS)}")
    return where, str(value[keys[0]]), value


def _prediction(value: Any, where: str) -> Prediction:
    if not isinstance(value, dict):
        return Prediction(_answer(value, where))
    key = next((key for key in _ANSWERS if key in value), None)
    evidence, error = value.get("evidence"), value.get("error")
    if key is None and error is None:
        raise UserError(f"{where}: no prediction; name it {', '.join(_ANSWERS)}, or give an error")
    return Prediction(
        _answer(value[key], where) if key is not None else None,
        stretches([evidence], f"{where}: evidence")[0] if evidence is not None else None,
        str(error) if error is not None else None,
    )


def _answer(value: Any, where: str) -> int | str | None:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int | str | None):
        raise UserError(f"{where}: a prediction must be a text or an index, not {value!r}")
    return value
