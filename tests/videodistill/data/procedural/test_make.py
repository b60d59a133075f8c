from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest

from videodistill.data.egotaskqa import read_egotaskqa
from videodistill.data.nextgqa import read_nextgqa
from videodistill.data.nextqa import read_nextqa
from videodistill.data.procedural import make
from videodistill.data.procedural.make import (
    EGOTASKQA_LABELS,
    NEXTQA_TYPES,
    Split,
    encode_mp4,
    make_dataset,
)
from videodistill.data.procedural.questions import FAMILIES
from videodistill.errors import UserError

SMALL = Split(videos=6, frames=(16, 24), size=48, questions=5)


def hashes(folder: Path) -> dict[str, str]:
    """Every file of a data set, leftovers included."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def pictures(path: Path) -> tuple[np.ndarray, list[float]]:
    with av.open(str(path)) as container:
        frames = list(container.decode(video=0))
    return np.stack([frame.to_ndarray(format="rgb24") for frame in frames]), [
        frame.time for frame in frames
    ]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of two splits, made in this process."""
    out = tmp_path_factory.mktemp("made")
    make_dataset(out, {"train": SMALL, "test": replace(SMALL, videos=2)}, seed=3, workers=1)
    return out


def test_files(made: Path) -> None:
    names = ["egotaskqa.json", "nextgqa.json", "nextqa_mc.csv", "nextqa_oe.csv"]
    for split, videos in (("train", 6), ("test", 2)):
        ids = [f"{split}-{number:06d}" for number in range(videos)]
        assert sorted(os.listdir(made / "videos" / split)) == [f"{name}.mp4" for name in ids]
        assert sorted(os.listdir(made / "parts" / split)) == [f"{name}.json" for name in ids]
        assert sorted(os.listdir(made / "annotations" / split)) == names
    dataset = json.loads((made / "dataset.json").read_text())
    assert dataset["seed"] == 3
    assert dataset["splits"]["train"]["arguments"]["frames"] == [16, 24]
    for split, known in dataset["splits"].items():
        for name in names:
            content = (made / "annotations" / split / name).read_bytes()
            assert known["sha256"][name] == hashlib.sha256(content).hexdigest()


def test_all_dialects_hold_the_same_questions(made: Path) -> None:
    folder = made / "annotations" / "train"
    ego = read_egotaskqa(folder / "egotaskqa.json")
    mc = read_nextqa(folder / "nextqa_mc.csv", folder / "nextgqa.json")
    oe = read_nextqa(folder / "nextqa_oe.csv")
    assert (
        len(ego) == json.loads((made / "dataset.json").read_text())["splits"]["train"]["questions"]
    )
    assert [q.question_id for q in ego] == [str(number) for number in range(len(ego))]
    for one, other, third in zip(ego, mc, oe, strict=True):
        for name in ("video", "question", "answer"):
            assert getattr(one, name) == getattr(other, name) == getattr(third, name)
        assert one.family in FAMILIES
        assert other.family == third.family == NEXTQA_TYPES[one.family]
        assert one.evidence == other.evidence
        assert one.reference in ("direct", "indirect")
        assert len(set(other.choices)) == 5
    grounded = [q for q in mc if q.evidence]
    assert read_nextgqa(folder / "nextgqa.json") == grounded
    assert grounded


def test_every_family_has_its_labels() -> None:
    assert set(NEXTQA_TYPES) == set(EGOTASKQA_LABELS) == set(FAMILIES)


def test_videos_are_what_the_annotations_say(made: Path) -> None:
    folder = made / "annotations" / "train"
    grounding = json.loads((folder / "nextgqa.json").read_text())
    counts = []
    for name, known in grounding.items():
        path = made / "videos" / "train" / f"{name}.mp4"
        images, times = pictures(path)
        assert images.shape[1:] == (48, 48, 3)
        np.testing.assert_allclose(times, np.arange(len(images)) / known["fps"], atol=1e-6)
        assert known["duration"] == len(images) / known["fps"]
        for pairs in known["location"].values():
            assert all(0 <= start < end <= known["duration"] for start, end in pairs)
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            assert (stream.codec_context.name, stream.pix_fmt) == ("h264", "yuv420p")
            assert "creation_time" not in container.metadata | stream.metadata
        counts.append(len(images))
    assert min(counts) >= 16
    assert max(counts) <= 24
    assert len(set(counts)) > 1


def test_pictures_survive_the_encoder() -> None:
    ramp = np.arange(64, dtype=np.uint8) * 3
    frames = [np.stack([np.broadcast_to(ramp, (64, 64))] * 3, -1) + np.uint8(i) for i in range(20)]
    with av.open(io.BytesIO(encode_mp4(iter(frames), 64, 29.97))) as container:
        decoded = list(container.decode(video=0))
    assert len(decoded) == 20
    assert decoded[-1].time == pytest.approx(19 / 29.97, abs=1e-4)
    for frame, picture in zip(frames, decoded, strict=True):
        error = np.abs(picture.to_ndarray(format="rgb24").astype(int) - frame)
        assert error.mean() < 2


_ENCODE = """
import hashlib, sys
import numpy as np
from videodistill.data.procedural.make import encode_mp4
from videodistill.data.procedural.render import render
from videodistill.data.procedural.world import WorldConfig, sample_world
for seed in range(2):
    world = sample_world((seed,), WorldConfig(40))
    content = encode_mp4((render(world, i, 96) for i in range(40)), 96, 12.0)
    print(hashlib.sha256(content).hexdigest())
"""


def test_bytes_do_not_depend_on_what_memory_held() -> None:
    # glibc fills what it hands out with the value's complement: an encoder that reads what it
    # never wrote gives other bytes (x264's macroblock tree does).
    outputs = {
        subprocess.run(
            [sys.executable, "-c", _ENCODE],
            env={**os.environ, "MALLOC_PERTURB_": value},
            capture_output=True,
            check=True,
        ).stdout
        for value in ("85", "170")
    }
    assert len(outputs) == 1
    assert len(outputs.pop().split()) == 2


def test_any_number_of_workers_gives_the_same_files(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(make, "_FRAMES_PER_TASK", 16)  # one video a task: both workers get some
    counts = []
    make_dataset(
        tmp_path,
        {"train": SMALL, "test": replace(SMALL, videos=2)},
        seed=3,
        workers=2,
        progress=lambda *count: counts.append(count),
    )
    assert hashes(tmp_path) == hashes(made)
    assert sorted(counts) == [("test", n, 2) for n in range(3)] + [
        ("train", n, 6) for n in range(7)
    ]


def test_splits_can_be_made_in_turn(made: Path, tmp_path: Path) -> None:
    make_dataset(tmp_path, {"test": replace(SMALL, videos=2)}, seed=3, workers=1)
    make_dataset(tmp_path, {"train": SMALL}, seed=3, workers=1)
    assert hashes(tmp_path) == hashes(made)


def test_a_seed_or_a_name_gives_other_videos(made: Path, tmp_path: Path) -> None:
    make_dataset(tmp_path, {"train": replace(SMALL, videos=2)}, seed=4, workers=1)
    folders = (made / "videos" / "train", made / "videos" / "test", tmp_path / "videos" / "train")
    assert len({file.read_bytes() for folder in folders for file in folder.iterdir()}) == 6 + 2 + 2


def test_what_is_missing_is_made_again_and_nothing_else(made: Path, tmp_path: Path) -> None:
    splits = {"train": SMALL, "test": replace(SMALL, videos=2)}
    make_dataset(tmp_path, splits, seed=3, workers=1)
    videos, parts = tmp_path / "videos" / "train", tmp_path / "parts" / "train"
    (videos / "train-000000.mp4").unlink()
    (videos / "train-000001.mp4").write_bytes(b"cut short")
    (parts / "train-000002.json").unlink()
    (parts / "train-000003.json").write_text('{"bytes"')
    (videos / ".train-000000.mp4.tmp").write_bytes(b"of a killed run")
    (tmp_path / "annotations" / "test" / "nextqa_mc.csv").unlink()
    untouched = (videos / "train-000004.mp4").stat().st_mtime_ns
    counts = []
    make_dataset(tmp_path, splits, seed=3, workers=1, progress=lambda *count: counts.append(count))
    assert hashes(tmp_path) == hashes(made)
    assert (videos / "train-000004.mp4").stat().st_mtime_ns == untouched
    assert counts == [("train", 2, 6), ("test", 2, 2), ("train", 6, 6)]


_KILLED = """
import os, signal, sys
from videodistill.data.procedural import make
def kill_self(split, done, total):
    if done >= 3:
        os.kill(os.getpid(), signal.SIGKILL)
if __name__ == "__main__":
    make._FRAMES_PER_TASK = 16
    split = make.Split(videos=60, frames=(16, 16), size=32)
    make.make_dataset(sys.argv[1], {"train": split}, workers=2, progress=kill_self)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL on this system")
def test_a_killed_run_leaves_no_workers_goes_on_and_ends_the_same(tmp_path: Path) -> None:
    script = tmp_path / "killed.py"
    script.write_text(_KILLED)
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    # The pipe closes when the last process that inherited it, worker or not, is gone.
    ended = subprocess.run(
        [sys.executable, str(script), str(killed)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        timeout=120,
    )
    assert ended.returncode == -signal.SIGKILL
    assert 3 <= len(list((killed / "parts" / "train").iterdir())) < 60
    split = Split(videos=60, frames=(16, 16), size=32)
    make_dataset(killed, {"train": split}, workers=1)
    make_dataset(whole, {"train": split}, workers=1)
    assert hashes(killed) == hashes(whole)


@pytest.mark.parametrize(
    ("change", "seed", "difference"),
    [
        ({}, 4, "seed is 3 there, 4 here"),
        ({"videos": 7}, 3, "train: videos is 6 there, 7 here"),
        ({"frames": (16, 16)}, 3, "train: frames is [16, 24] there, [16, 16] here"),
        ({"bias": 0.5}, 3, "train: bias is 0.0 there, 0.5 here"),
    ],
)
def test_other_arguments_are_refused(made: Path, change: dict, seed: int, difference: str) -> None:
    before = hashes(made)
    with pytest.raises(UserError) as error:
        make_dataset(made, {"train": replace(SMALL, **change)}, seed=seed, workers=1)
    assert difference in str(error.value)
    assert "choose another folder" in str(error.value)
    assert hashes(made) == before


def test_videos_of_unknown_origin_are_refused(tmp_path: Path) -> None:
    make_dataset(tmp_path, {"train": replace(SMALL, videos=1)}, workers=1)
    (tmp_path / "dataset.json").unlink()
    with pytest.raises(UserError, match=r"no dataset\.json"):
        make_dataset(tmp_path, {"train": replace(SMALL, videos=1)}, workers=1)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"videos": 0}, "0 videos"),
        ({"frames": (15, 64)}, "frames 15-64"),
        ({"frames": (64, 1025)}, "frames 64-1025"),
        ({"frames": (64, 63)}, "frames 64-63"),
        ({"size": 97}, "size 97"),
        ({"size": 0}, "size 0"),
        ({"fps": 0.0}, "fps 0.0"),
        ({"fps": float("nan")}, "fps nan"),
        ({"bias": 1.5}, "bias 1.5"),
        ({"questions": 0}, "questions 0"),
    ],
)
def test_bad_argument_leaves_nothing(tmp_path: Path, change: dict, named: str) -> None:
    with pytest.raises(UserError, match=named):
        make_dataset(tmp_path / "out", {"train": replace(SMALL, **change)})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("splits", "options", "named"),
    [
        ({"train": SMALL}, {"workers": -1}, "workers -1"),
        ({"train": SMALL}, {"workers": 0}, "workers 0"),
        ({"train": SMALL}, {"seed": -1}, "seed -1"),
        ({"../train": SMALL}, {}, "split name '../train'"),
        ({"": SMALL}, {}, "split name ''"),
        ({}, {}, "no split to make"),
    ],
)
def test_bad_call_leaves_nothing(tmp_path: Path, splits: dict, options: dict, named: str) -> None:
    with pytest.raises(UserError, match=named):
        make_dataset(tmp_path / "out", splits, **options)
    assert not (tmp_path / "out").exists()


def test_out_is_a_file(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.write_text("something")
    with pytest.raises(UserError, match="out: File exists; choose another folder"):
        make_dataset(out, {"train": SMALL}, workers=1)
    with pytest.raises(UserError, match="Not a directory; choose another folder"):
        make_dataset(out / "below", {"train": SMALL}, workers=1)
    assert out.read_text() == "something"


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write everywhere")
def test_no_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="Permission denied; choose another folder"):
        make_dataset(tmp_path / "out", {"train": SMALL}, workers=1)


def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_bytes = Path.write_bytes

    def full(path: Path, content: bytes) -> int:
        if path.name.endswith(".mp4.tmp"):
            write_bytes(path, content[: len(content) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return write_bytes(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(UserError, match=r"No space left on device; free some space") as error:
            make_dataset(tmp_path / "out", {"train": SMALL}, workers=1)
    assert "\n" not in str(error.value)
    assert list(hashes(tmp_path / "out")) == ["dataset.json"]
    make_dataset(tmp_path / "out", {"train": SMALL}, workers=1)
    make_dataset(tmp_path / "whole", {"train": SMALL}, workers=1)
    assert hashes(tmp_path / "out") == hashes(tmp_path / "whole")
