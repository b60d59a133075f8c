"""Does a model look? Its accuracy with the right video, with another one, and with none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from videodistill.data.record import Question
from videodistill.evaluation.predictions import Prediction
from videodistill.evaluation.scoring import score


@dataclass(frozen=True)
class ShortcutReport:
    """Percent right over all questions."""

    video: float
    """With each question's own video."""
    shuffled: float
    """With the video of another question."""
    blank: float
    """With a blank video."""
    direct: float | None
    """With the video, of the questions with direct references; ``None`` if there are none."""
    indirect: float | None
    """With the video, of those with indirect references."""

    @property
    def looked(self) -> float:
        """Points that seeing the right video adds to the better one of the others."""
        return self.video - max(self.shuffled, self.blank)

    @property
    def gap(self) -> float | None:
        """Points that indirect references cost: a model that goes by words loses more."""
        if self.direct is None or self.indirect is None:
            return None
        return self.direct - self.indirect


def shortcut_report(
    rule: str,
    questions: Sequence[Question],
    video: Mapping[str, Prediction],
    shuffled: Mapping[str, Prediction],
    blank: Mapping[str, Prediction],
    **options: Any,
) -> ShortcutReport:
    """Compare three sets of predictions to the same questions.

    Args:
        rule, questions, options: As of `videodistill.evaluation.scoring.score`.
        video, shuffled, blank: Predictions by question id.

    Raises:
        UserError: One of the sets cannot be scored.
    """

    def percent(made: Mapping[str, Prediction], asked: Sequence[Question] = questions) -> float:
        return score(rule, asked, made, **options).metrics["all"].percent

    def percent_of(reference: str) -> float | None:
        asked = [question for question in questions if question.reference == reference]
        ids = {question.question_id for question in asked}
        made = {name: prediction for name, prediction in video.items() if name in ids}
        return percent(made, asked) if asked else None

    return ShortcutReport(
        video=percent(video),
        shuffled=percent(shuffled),
        blank=percent(blank),
        direct=percent_of("direct"),
        indirect=percent_of("indirect"),
    )
