"""The registry: every dataset finds its files in a folder and reads them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.videodistill.data import (
    test_activitynetqa,
    test_agqa,
    test_egomcq,
    test_egoschema,
    test_egotaskqa,
    test_msrvtt,
    test_msvd,
    test_nextqa,
    test_star,
)
from videodistill.data.datasets import DATASETS, get_dataset
from videodistill.data.entries import Broken
from videodistill.errors import UserError
from videodistill.evaluation.scoring import RULES

MC = f"{test_nextqa.HEADER}\n{test_nextqa.ROW}\n"
OE = f"{test_nextqa.HEADER.partition(',a0')[0]}\n7,1,1,1,why,home,6,CW\n"
GQA = f"video_id{MC.removeprefix('video')}".replace(",2,", ",three,")
LAYOUTS = {
    "nextqa-mc": {
        "train.csv": MC,
        "val.json": [test_nextqa.SEVILA],
        "map_vid_vidorID.json": {"7": "0/7"},
    },
    "nextqa-oe": {"test.csv": OE, "add_reference_answer_test.json": {"7": {"6": "house"}}},
    "nextgqa": {"val.csv": GQA, "gsub_val.json": {"7": {"location": {"6": [[1, 2]]}}}},
    "msvd-qa": {"test_qa.json": [test_msvd.ENTRY], "youtube_mapping.txt": "name vid7\n"},
    "msrvtt-qa": {"train_qa.json": [test_msrvtt.NATIVE], "test.jsonl": [test_msrvtt.LINE]},
    "activitynet-qa": {
        "dataset/val_q.json": [test_activitynetqa.ASKED],
        "dataset/val_a.json": [test_activitynetqa.ANSWER],
    },
    "egotaskqa": {
        "direct/train_qas.json": [test_egotaskqa.PUBLISHED],
        "indirect/test_qas.json": [test_egotaskqa.PUBLISHED],
    },
    "agqa": {"AGQA_balanced/test_balanced.txt": {"a": test_agqa.TEST}},
    "star": {"STAR_val.json": [test_star.ENTRY]},
    "egoschema": {"questions.json": [test_egoschema.ENTRY], "subset_answers.json": {"a-1": 1}},
    "egomcq": {"egomcq.json": {"0": test_egomcq.ENTRY}},
    "own": {"mine.csv": "video,question\na.mp4,what?\n"},
}


def lay_out(folder: Path, files: dict) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True, parents=True)
        if not isinstance(content, str):
            dump = json.dumps(content)
            content = "\n".join(map(json.dumps, content)) if name.endswith(".jsonl") else dump
        path.write_text(content)
    return folder


def test_every_dataset_has_a_rule_and_a_layout_here() -> None:
    assert {dataset.rule for dataset in DATASETS.values()} == set(RULES)
    assert {*LAYOUTS, "procedural"} == set(DATASETS)
    assert all(dataset.name == name for name, dataset in DATASETS.items())


SPLITS = {
    "nextqa-mc": ["train", "val"],
    "msrvtt-qa": ["train", "test"],
    "egotaskqa": ["direct/train", "indirect/test"],
    "nextqa-oe": ["test"],
    "msvd-qa": ["test"],
    "agqa": ["test"],
    "egoschema": ["test"],
    "egomcq": ["test"],
    "own": ["mine"],
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_folder_and_file(name: str, tmp_path: Path) -> None:
    dataset = get_dataset(name)
    found = dataset.find(lay_out(tmp_path, LAYOUTS[name]))
    assert list(found) == SPLITS.get(name, ["val"])
    for split, file in found.items():
        (question,) = dataset.read(file)
        assert dataset.read(file, []) == [question]
        (alone,) = dataset.find(file)
        assert alone == split.rpartition("/")[2]


def test_what_lies_beside_the_main_file_is_read(tmp_path: Path) -> None:
    def only(name: str, split: str):
        folder = lay_out(tmp_path / name, LAYOUTS[name])
        dataset = get_dataset(name)
        return dataset.read(dataset.find(folder)[split])[0]

    assert only("nextqa-mc", "train").video == only("nextqa-mc", "val").video == "0/7.mp4"
    assert only("nextqa-oe", "test").references == ("house",)
    assert only("nextgqa", "val").evidence == ((1.0, 2.0),)
    assert only("msvd-qa", "test").video == "name.avi"
    assert only("activitynet-qa", "val").answer == "no"
    assert only("egoschema", "test").answer == "c does 1"


def test_broken_annotations_are_handed_on(tmp_path: Path) -> None:
    for name, layout in LAYOUTS.items():
        folder = lay_out(tmp_path / name, layout)
        dataset = get_dataset(name)
        file = next(iter(dataset.find(folder).values()))
        text = file.read_text().replace('"question":', '"questoin":').replace('"clip_text"', '"t"')
        file.write_text(text + ("four,cells,are,wrong\n" if file.suffix == ".csv" else ""))
        if name == "egoschema":
            file.write_text(text.replace("option 3", "option x"))
        broken: list[Broken] = []
        questions = dataset.read(file, broken)
        assert len(broken) == 1, name
        assert str(file) in broken[0].message
        assert len(questions) == (file.suffix == ".csv")
        with pytest.raises(UserError):
            dataset.read(file)


def test_the_training_split_that_belongs_to_a_split(tmp_path: Path) -> None:
    ego = get_dataset("egotaskqa")
    folder = lay_out(tmp_path / "ego", LAYOUTS["egotaskqa"])
    assert ego.training_file("direct/test", folder) == folder / "direct" / "train_qas.json"
    assert ego.training_file("indirect/test", folder) is None
    assert ego.training_file("test", folder / "direct") == folder / "direct" / "train_qas.json"
    mc = get_dataset("nextqa-mc")
    folder = lay_out(tmp_path / "mc", LAYOUTS["nextqa-mc"])
    assert mc.training_file("val", folder / "val.json") == folder / "train.csv"


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no dataset nextqa; there are nextqa-mc, nextqa-oe"):
        get_dataset("nextqa")
    with pytest.raises(UserError, match="none: no such file or folder; give the folder of STAR"):
        get_dataset("star").find(tmp_path / "none")
    with pytest.raises(UserError, match=r"no file of STAR there; .* STAR_\{split\}\.json"):
        get_dataset("star").find(tmp_path)
    lay_out(tmp_path, {"a.csv": "", "a.jsonl": []})
    with pytest.raises(UserError, match=r"both a\.csv and a\.jsonl"):
        get_dataset("own").find(tmp_path)


def test_open_ended_and_multiple_choice_are_told_apart(tmp_path: Path) -> None:
    lay_out(tmp_path, {"train.csv": MC, "val.csv": OE})
    with pytest.raises(UserError, match=r"train\.csv: has choices.* nextqa-mc"):
        get_dataset("nextqa-oe").read(tmp_path / "train.csv")
    with pytest.raises(UserError, match=r"val\.csv: has no choices.* nextqa-oe"):
        get_dataset("nextqa-mc").read(tmp_path / "val.csv")
