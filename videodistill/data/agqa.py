"""AGQA 2.0 (Grunde-McLaughlin et al., 2021, 2022): questions about Charades videos.

A JSON object, in a file that may be named .txt: by question id an object with ``question``,
``answer``, ``video_id``, ``global`` (reasoning types), ``local``, ``ans_type`` "binary" or "open",
``steps``, ``semantic``, ``structural``, ``novel_comp``, ``more_steps``, ``sg_grounding`` and
``program``. The test file adds the flags ``nc_seq``, ``nc_sup``, ``nc_dur``, ``nc_objrel``,
``indirect``, ``i_obj``, ``i_rel``, ``i_act`` and ``i_temp``, and ``direct_equiv``, the id of the
same question with direct references.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from videodistill.data.entries import Broken, Entry, collect
from videodistill.data.files import read_json
from videodistill.data.record import Question

FLAGS = ("novel_comp", "nc_seq", "nc_sup", "nc_dur", "nc_objrel", "more_steps")
INDIRECT_FLAGS = ("i_obj", "i_rel", "i_act", "i_temp")


def read_agqa(path: str | Path, broken: list[Broken] | None = None) -> list[Question]:
    """The questions of one AGQA file, in its order.

    ``family`` is the structural type (query, compare, choose, logic, verify). ``tags`` are
    ``ans_type``, the reasoning types, the semantic and the structural type, and the names of the
    flags that are set. ``reference`` and ``direct_equivalent`` are those of the test file.

    Args:
        path: The JSON file.
        broken: Takes entries that cannot be read; without it the first one is raised.

    Raises:
        UserError: The file or an entry is broken.
    """
    path = Path(path)
    entries = read_json(path, dict, without="sg_grounding").items()
    rows = ((f"{path}: question {name}", (name, value)) for name, value in entries)
    return collect(rows, _question, broken, _family)


def _question(row: tuple[str, Any], where: str) -> Question:
    name, value = row
    entry = Entry(value, where)
    answer_type = entry.text("ans_type")
    if answer_type not in ("binary", "open"):
        raise entry.error("ans_type", "binary or open")
    structural = entry.text("structural")
    reference = None
    if "indirect" in entry:
        reference = "indirect" if _flag(entry, "indirect") else "direct"
    flags = (flag for flag in FLAGS + INDIRECT_FLAGS if _flag(entry, flag))
    return Question(
        question_id=name,
        video=f"{entry.name('video_id')}.mp4",
        question=entry.text("question"),
        answer=entry.text("answer"),
        family=structural,
        reference=reference,
        program=entry.text("program") if value.get("program") else None,
        tags=(answer_type, *entry.texts("global"), entry.text("semantic"), structural, *flags),
        direct_equivalent=entry.name("direct_equiv") if value.get("direct_equiv") else None,
    )


def _flag(entry: Entry, key: str) -> bool:
    if key not in entry:
        return False
    if entry.value[key] not in (0, 1, "0", "1"):
        raise entry.error(key, "0 or 1")
    return int(entry.value[key]) == 1


def _family(row: tuple[str, Any]) -> Any:
    return row[1].get("structural") if isinstance(row[1], dict) else None
