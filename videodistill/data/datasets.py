"""All datasets by name: their files in a folder, how these are read, how answers are scored."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from videodistill.data.activitynetqa import read_activitynetqa
from videodistill.data.agqa import read_agqa
from videodistill.data.egomcq import read_egomcq
from videodistill.data.egoschema import read_egoschema
from videodistill.data.egotaskqa import read_egotaskqa
from videodistill.data.entries import Broken
from videodistill.data.files import read_json
from videodistill.data.msrvtt import read_msrvtt
from videodistill.data.msvd import read_msvd
from videodistill.data.nextqa import read_nextqa
from videodistill.data.own import read_own
from videodistill.data.procedural.read import load_questions
from videodistill.data.record import Question
from videodistill.data.star import read_star
from videodistill.errors import UserError

_SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Dataset:
    """How one dataset is kept on disk, and what is made of its answers."""

    name: str
    title: str
    rule: str
    """Name of its scoring rule in `videodistill.evaluation.scoring`."""
    reader: Callable[[Path, list[Broken] | None], list[Question]]
    """Of one split, from its main file; further files are looked for beside that one."""
    files: tuple[str, ...] = ()
    """Main file of a split, relative to the dataset's folder; the first that is there counts."""
    splits: tuple[str, ...] = _SPLITS
    finder: Callable[[Path], dict[str, Path]] | None = None
    """Main files of a folder by split, where they do not follow ``files`` and ``splits``."""
    vocabulary: int | None = None
    """How many of the commonest training answers can be right; ``None`` where any answer can."""

    def find(self, path: str | Path) -> dict[str, Path]:
        """The main file of each split.

        Args:
            path: The dataset's folder, or the main file of one split.

        Raises:
            UserError: There is no such path, or no file of the dataset in it.
        """
        path = Path(path)
        if path.is_file():
            return {self._split_of(path): path}
        if not path.is_dir():
            raise UserError(f"{path}: no such file or folder; give the folder of {self.title}")
        found = self.finder(path) if self.finder else self._by_pattern(path)
        if not found:
            wanted = ", ".join(self.files) or "a .csv or .jsonl file"
            raise UserError(f"{path}: no file of {self.title} there; it should hold {wanted}")
        return found

    def choose(self, path: str | Path, split: str | None) -> tuple[str, Path]:
        """Name and main file of the split that is meant; None: of the only one.

        Raises:
            UserError: As ``find``; there is no such split, or there are several to choose from.
        """
        found = self.find(path)
        if split is None and len(found) == 1:
            split = next(iter(found))
        if split not in found:
            which = "which split?" if split is None else f"no split {split};"
            raise UserError(f"{path}: {which} give --split with one of {', '.join(found)}")
        return split, found[split]

    def read(self, file: Path, broken: list[Broken] | None = None) -> list[Question]:
        """The questions of a split.

        Args:
            file: Its main file.
            broken: Takes annotations that cannot be read; without it the first one is raised.

        Raises:
            UserError: A file or an annotation is broken, or a question id is given twice.
        """
        return self.reader(file, broken)

    def training_file(self, split: str, path: str | Path) -> Path | None:
        """Main file of the training split that belongs to a split, where there is one.

        Args:
            split: One of those found at ``path``.
            path: What ``find`` was given.
        """
        path = Path(path)
        folder = path if path.is_dir() else path.parent
        try:
            found = self.find(folder)
        except UserError:
            return None
        return found.get(split.rpartition("/")[0] + split.rpartition("/")[1] + "train")

    def _by_pattern(self, folder: Path) -> dict[str, Path]:
        found = {}
        for split in self.splits:
            paths = [folder / pattern.format(split=split) for pattern in self.files]
            path = next((path for path in paths if path.is_file()), None)
            if path is not None:
                found[split] = path
        return found

    def _split_of(self, path: Path) -> str:
        names = {
            Path(pattern.format(split=split)).name: split
            for pattern in reversed(self.files)
            for split in reversed(self.splits)
        }
        return names.get(path.name, path.stem)


def get_dataset(name: str) -> Dataset:
    """A dataset by its name.

    Raises:
        UserError: There is none of that name.
    """
    if name not in DATASETS:
        raise UserError(f"no dataset {name}; there are {', '.join(DATASETS)}")
    return DATASETS[name]


def _beside(path: Path, name: str) -> Path | None:
    return path.with_name(name) if path.with_name(name).is_file() else None


def _nextqa_mc(path: Path, broken: list[Broken] | None) -> list[Question]:
    video_map = _beside(path, "map_vid_vidorID.json")
    questions = read_nextqa(path, video_map=video_map, broken=broken)
    if any(question.choices is None for question in questions):
        raise UserError(f"{path}: has no choices a0 to a4; if they are open-ended, it is nextqa-oe")
    return questions


def _nextqa_oe(path: Path, broken: list[Broken] | None) -> list[Question]:
    questions = read_nextqa(
        path,
        video_map=_beside(path, "map_vid_vidorID.json"),
        references=_beside(path, f"add_reference_answer_{path.stem}.json"),
        broken=broken,
    )
    if any(question.choices is not None for question in questions):
        raise UserError(f"{path}: has choices; if that is meant, it is nextqa-mc")
    return questions


def _nextgqa(path: Path, broken: list[Broken] | None) -> list[Question]:
    return read_nextqa(
        path,
        gsub=_beside(path, f"gsub_{path.stem}.json"),
        video_map=_beside(path, "map_vid_vidorID.json"),
        broken=broken,
    )


def _msvd(path: Path, broken: list[Broken] | None) -> list[Question]:
    return read_msvd(path, _beside(path, "youtube_mapping.txt"), broken)


def _activitynetqa(path: Path, broken: list[Broken] | None) -> list[Question]:
    name = path.name.replace("_q.", "_a.")
    return read_activitynetqa(path, _beside(path, name) if name != path.name else None, broken)


def _egoschema(path: Path, broken: list[Broken] | None) -> list[Question]:
    return read_egoschema(path, _beside(path, "subset_answers.json"), broken)


def _own_files(folder: Path) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in sorted([*folder.glob("*.csv"), *folder.glob("*.jsonl")]):
        if path.stem in found:
            raise UserError(f"{folder}: both {found[path.stem].name} and {path.name}; keep one")
        found[path.stem] = path
    return found


def _procedural_files(folder: Path) -> dict[str, Path]:
    if not (folder / "dataset.json").is_file():
        return {}
    splits = read_json(folder / "dataset.json", dict).get("splits", {})
    return {split: folder / "annotations" / split / "egotaskqa.json" for split in splits}


def _procedural(path: Path, broken: list[Broken] | None) -> list[Question]:
    return load_questions(path.parents[2], path.parent.name)


_NEXTQA_FILES = ("{split}.csv", "{split}.json", "{split}.jsonl")

DATASETS = {
    dataset.name: dataset
    for dataset in (
        Dataset("nextqa-mc", "NExT-QA (multiple choice)", "nextqa-mc", _nextqa_mc, _NEXTQA_FILES),
        Dataset("nextqa-oe", "NExT-QA (open-ended)", "nextqa-oe", _nextqa_oe, ("{split}.csv",)),
        Dataset("nextgqa", "NExT-GQA", "nextgqa", _nextgqa, ("{split}.csv",)),
        Dataset("msvd-qa", "MSVD-QA", "family", _msvd, ("{split}_qa.json",), vocabulary=1000),
        Dataset(
            "msrvtt-qa",
            "MSRVTT-QA",
            "family",
            read_msrvtt,
            ("{split}_qa.json", "{split}.jsonl", "{split}_qa.jsonl"),
            vocabulary=1000,
        ),
        Dataset(
            "activitynet-qa",
            "ActivityNet-QA",
            "activitynet-qa",
            _activitynetqa,
            ("{split}_q.json", "dataset/{split}_q.json"),
            vocabulary=1000,
        ),
        Dataset(
            "egotaskqa",
            "EgoTaskQA",
            "egotaskqa",
            read_egotaskqa,
            ("{split}_qas.json",),
            (*_SPLITS, *(f"{kind}/{name}" for kind in ("direct", "indirect") for name in _SPLITS)),
            vocabulary=4000,
        ),
        Dataset(
            "agqa",
            "AGQA 2.0",
            "agqa",
            read_agqa,
            tuple(
                f"{folder}{{split}}_balanced.{suffix}"
                for folder in ("", "AGQA_balanced/")
                for suffix in ("txt", "json")
            ),
        ),
        Dataset("star", "STAR", "star", read_star, ("STAR_{split}.json",)),
        Dataset("egoschema", "EgoSchema", "family", _egoschema, ("questions.json",), ("test",)),
        Dataset("egomcq", "EgoMCQ", "family", read_egomcq, ("egomcq.json",), ("test",)),
        Dataset("own", "your own data", "family", read_own, finder=_own_files),
        Dataset(
            "procedural",
            "the procedural benchmark",
            "procedural",
            _procedural,
            ("annotations/{split}/egotaskqa.json",),
            finder=_procedural_files,
        ),
    )
}
"""Every dataset by the name that commands know it by."""
