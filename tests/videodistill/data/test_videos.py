from __future__ import annotations

from pathlib import Path

import pytest

from videodistill.data.videos import find_videos
from videodistill.errors import UserError


def test_paths_suffixes_and_folders(tmp_path: Path) -> None:
    for name in ("a.mp4", "b.webm", "0001/c.mp4", "0001/d.mp4", "0002/d.mp4", "e.v2.mp4", "f.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    names = ["a.mp4", "b.mp4", "0001/c.mp4", "c.avi", "d.mp4", "0002/d.avi", "e.v2.avi", "e.mp4"]
    found = find_videos(tmp_path, [*names, "0009/a.mp4", "f.mp4", "g.mp4"])
    relative = {
        name: path and path.relative_to(tmp_path).as_posix() for name, path in found.items()
    }
    assert relative == {
        "a.mp4": "a.mp4",
        "b.mp4": "b.webm",
        "0001/c.mp4": "0001/c.mp4",
        "c.avi": "0001/c.mp4",
        "d.mp4": None,  # which of the two?
        "0002/d.avi": "0002/d.mp4",
        "e.v2.avi": "e.v2.mp4",
        "e.mp4": None,
        "0009/a.mp4": "a.mp4",
        "f.mp4": None,
        "g.mp4": None,
    }


def test_names_that_look_like_options_and_suffixes(tmp_path: Path) -> None:
    (tmp_path / "-mp4.pm4.mkv").write_bytes(b"")
    found = find_videos(tmp_path, ["-mp4.pm4.mp4"])
    assert found["-mp4.pm4.mp4"] == tmp_path / "-mp4.pm4.mkv"


def test_links_to_folders_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "a.mp4").write_bytes(b"")
    folder = tmp_path / "videos"
    folder.mkdir()
    (folder / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "up").symlink_to(folder)
    assert find_videos(folder, ["a.mp4"]) == {"a.mp4": folder / "link" / "a.mp4"}


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="none: no such folder"):
        find_videos(tmp_path / "none", [])
