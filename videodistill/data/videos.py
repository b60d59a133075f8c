"""Which file of a folder is the video that a dataset names."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from videodistill.errors import UserError

SUFFIXES = frozenset((".mp4", ".avi", ".mkv", ".webm", ".mov", ".m4v", ".flv", ".gif", ".mpg"))


def find_videos(folder: str | Path, names: Iterable[str]) -> dict[str, Path | None]:
    """The file of each video, or ``None`` where there is none.

    A dataset names its videos by one layout and one container; downloads have others. A name stands
    for the file of that path, or of that path with another suffix, or, where there is neither, for
    the only file anywhere in the folder that is called so.

    Args:
        folder: Searched with all its subfolders, through links to folders too.
        names: Paths relative to the folder, as `Question.video` gives them.

    Raises:
        UserError: There is no such folder.
    """
    folder = Path(folder)
    by_path: dict[str, str] = {}
    by_stem: dict[str, list[str]] = {}
    for path in list_videos(folder):
        by_path.setdefault(_stem(path), path)
        by_stem.setdefault(_stem(PurePosixPath(path).name), []).append(path)

    def find(name: str) -> Path | None:
        if (folder / name).is_file():
            return folder / name
        path = by_path.get(_stem(name))
        if path is None:
            alike = by_stem.get(_stem(PurePosixPath(name).name), [])
            path = alike[0] if len(alike) == 1 else None
        return None if path is None else folder / path

    return {name: find(name) for name in names}


def list_videos(folder: str | Path) -> list[str]:
    """Paths, relative to a folder, of all files in it that are called like videos.

    Args:
        folder: Searched with all its subfolders, through links to folders too.

    Raises:
        UserError: There is no such folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give the one that holds the videos")
    found = []
    seen = set()
    for parent, folders, files in os.walk(folder, followlinks=True):
        if os.path.realpath(parent) in seen:  # a link to a folder above it
            folders.clear()
            continue
        seen.add(os.path.realpath(parent))
        folders.sort()
        for name in sorted(files):
            if Path(name).suffix.lower() in SUFFIXES:
                found.append((Path(parent) / name).relative_to(folder).as_posix())
    return found


def _stem(path: str) -> str:
    """A path without the suffix of a video: dots in a name are no suffix."""
    suffix = PurePosixPath(path).suffix
    return path.removesuffix(suffix) if suffix.lower() in SUFFIXES else path
