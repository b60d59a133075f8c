"""A model trained without the video: what a data set gives away through its questions' words."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from videodistill.data.record import Question


def question_only(
    train: Sequence[Question], test: Sequence[Question], *, steps: int = 1500, seed: int = 0
) -> dict[str, float]:
    """Accuracy in percent of a model trained on the questions' words, by family and over "all".

    A perceptron over the words of a question and its runs of two, three and four words: all that
    a question of a handful of words can give away. Answers that training lacks count as wrong.
    The number of steps is chosen on a tenth of the training questions.

    Args:
        train: At least two questions.
        test: At least one.
        steps: Of training, 256 questions each.
        seed: Of the weights and batches.
    """
    generator = torch.Generator().manual_seed(seed)
    counted = Counter(gram for question in train for gram in _grams(question.question))
    frequent = sorted(gram for gram, count in counted.items() if count > 1)
    number = {gram: i for i, gram in enumerate(frequent)}
    answers = sorted({question.answer for question in train})
    label = {answer: i for i, answer in enumerate(answers)}

    def encode(questions: Sequence[Question]) -> tuple[list[torch.Tensor], torch.Tensor]:
        rows = [
            torch.tensor([number[g] for g in _grams(q.question) if g in number], dtype=torch.long)
            for q in questions
        ]
        return rows, torch.tensor([label.get(question.answer, -1) for question in questions])

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(
            _Bag(len(number) + 1, 128), nn.GELU(), nn.Dropout(0.2), nn.Linear(128, len(answers))
        )
        rows, truth = encode(train)
        order = torch.randperm(len(rows), generator=generator).tolist()
        tenth = max(1, len(order) // 10)
        held_out, kept = order[:tenth], order[tenth:]
        optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
        best, best_weights = -1.0, None
        for step in range(steps):
            chosen = torch.randint(len(kept), (256,), generator=generator).tolist()
            batch = [kept[i] for i in chosen]
            loss = F.cross_entropy(model([rows[i] for i in batch]), truth[batch])
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
            if (step + 1) % 150 == 0 or step + 1 == steps:
                right = _right(model, [rows[i] for i in held_out], truth[held_out])
                if (accuracy := right.float().mean().item()) > best:
                    best = accuracy
                    best_weights = {k: v.clone() for k, v in model.state_dict().items()}
        model.load_state_dict(best_weights)
    right = _right(model, *encode(test)).tolist()
    families = sorted({question.family or "" for question in test})
    report = {
        family: _percent(
            [ok for ok, asked in zip(right, test, strict=True) if (asked.family or "") == family]
        )
        for family in families
    }
    return report | {"all": _percent(right)}


class _Bag(nn.Module):
    """The mean embedding of lists of numbers."""

    def __init__(self, size: int, width: int):
        super().__init__()
        self.embed = nn.EmbeddingBag(size, width, mode="mean")

    def forward(self, rows: list[torch.Tensor]) -> torch.Tensor:
        lengths = torch.tensor([0, *(len(row) for row in rows[:-1])])
        return self.embed(torch.cat(rows), lengths.cumsum(0))


def _grams(question: str) -> list[str]:
    words = ["<", *re.findall(r"\w+", question.lower()), ">"]
    return [" ".join(words[i : i + n]) for n in range(1, 5) for i in range(len(words) - n + 1)]


@torch.no_grad()
def _right(model: nn.Module, rows: list[torch.Tensor], truth: torch.Tensor) -> torch.Tensor:
    model.eval()
    guesses = torch.cat([model(rows[i : i + 1024]).argmax(-1) for i in range(0, len(rows), 1024)])
    model.train()
    return guesses == truth


def _percent(values: Sequence[bool]) -> float:
    return round(100.0 * sum(values) / max(1, len(values)), 2)
