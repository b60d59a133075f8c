"""The feature cache: nothing is computed twice or lost, and nothing damaged is believed."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import resource
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, safe_open

from tests.videodistill.engine.material import make_video
from tests.videodistill.tiny import tiny_clip
from videodistill.encoders import load_encoder
from videodistill.engine import feature_cache
from videodistill.engine.feature_cache import FeatureCache, extract_corpus
from videodistill.errors import UserError
from videodistill.video import FrameReader

ROOT = Path(__file__).resolve().parents[3]
FRAMES = 4


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_clip(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("material")
    for number in range(3):
        make_video(folder / f"{number}.avi", frames=8 + number)
    shutil.copy(folder / "0.avi", folder / "copy.avi")
    make_video(folder / "short.avi", frames=2)
    (folder / "broken.avi").write_bytes(b"this is no video\n" * 100)
    return folder


@pytest.fixture
def corpus(material: Path, tmp_path: Path) -> Path:
    return shutil.copytree(material, tmp_path / "corpus")


@pytest.fixture
def extract(corpus: Path, encoder: Path, tmp_path: Path) -> Callable:
    def run(*names: str, **settings: object) -> feature_cache.Extracted:
        videos = {name: corpus / f"{name}.avi" for name in names or ("0", "1", "2")}
        given = {"encoder": encoder, "frames": FRAMES, "folder": tmp_path / "out", "workers": 1}
        return extract_corpus(videos, **(given | settings))

    return run


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


@contextmanager
def small_shards(monkeypatch: pytest.MonkeyPatch, videos: int = 1) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setattr(feature_cache, "SHARD_VIDEOS", videos)
        yield


def counts(done: feature_cache.Extracted) -> tuple[int, int, int, int]:
    return done.encoded, done.reused, done.duplicates, len(done.failed)


def shards(out: Path) -> list[str]:
    return sorted(path.name for path in out.glob("*.safetensors"))


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 4
    path.write_bytes(data)


def assert_equal(one: feature_cache.VideoFeatures, other: feature_cache.VideoFeatures) -> None:
    assert all(map(torch.equal, one[:3], other[:3]))
    assert one.duration == other.duration


def test_features_are_what_the_encoder_gives(
    extract: Callable, out: Path, encoder: Path, corpus: Path
) -> None:
    assert counts(extract("0", "1", "short")) == (3, 0, 0, 0)
    eyes = load_encoder(encoder)
    cache = FeatureCache.open(out, eyes.fingerprint)
    assert (cache.videos, cache.failed, cache.frames) == (("0", "1", "short"), {}, FRAMES)
    assert list(cache) == ["0", "1", "short"] and len(cache) == 3
    assert "1" in cache and "2" not in cache
    for name, frames in (("1", FRAMES), ("short", 2)):
        with FrameReader(corpus / f"{name}.avi") as reader:
            sampled = reader.sample(frames)
            seen = eyes.encode_frames(sampled.images)
            assert cache[name].duration == reader.duration
        assert torch.equal(cache[name].frame_embed, seen.frame_embed.half())
        assert torch.equal(cache[name].patches, seen.patches.half())
        assert cache[name].seconds.dtype == torch.float32
        assert cache[name].seconds.tolist() == pytest.approx(sampled.times.tolist())
    with pytest.raises(UserError, match=r"2: was not extracted; extract it into .*out"):
        cache["2"]


def test_others_can_read_it_in_a_few_lines(extract: Callable, out: Path) -> None:
    extract()
    lines = [json.loads(line) for line in (out / "index.jsonl").open()]
    content = next(line["content"] for line in lines if line.get("video") == "1")
    shard = next(line["shard"] for line in lines if content in line.get("videos", {}))
    with safe_open(out / shard, "pt") as file:
        assert torch.equal(
            file.get_tensor(f"{content}/patches"), FeatureCache.open(out)["1"].patches
        )


def test_those_who_may_read_the_index_may_read_the_features(extract: Callable, out: Path) -> None:
    extract()
    modes = {(out / name).stat().st_mode for name in shards(out)}
    assert modes == {(out / "index.jsonl").stat().st_mode}


def test_a_second_run_finds_its_work_done(
    extract: Callable, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with small_shards(monkeypatch, 2):
        assert counts(extract("0", "1")) == (2, 0, 0, 0)
        before = (out / "index.jsonl").read_bytes()
        monkeypatch.setattr(feature_cache, "start_encoder", None)  # nothing is started
        assert counts(extract("0", "1")) == (0, 2, 0, 0)
    assert (out / "index.jsonl").read_bytes() == before
    assert shards(out) == ["00000.safetensors"]


def test_any_number_of_workers_writes_the_same(
    extract: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written, lines = [], []
    with small_shards(monkeypatch, 2):
        for workers in (1, 2):
            folder = tmp_path / f"of {workers}"
            done = extract("0", "1", "broken", "2", "copy", folder=folder, workers=workers)
            assert counts(done) == (3, 0, 1, 1)
            written.append({name: (folder / name).read_bytes() for name in shards(folder)})
            lines.append(sorted((folder / "index.jsonl").read_text().splitlines()))
    assert list(written[0]) == ["00000.safetensors", "00001.safetensors"]
    assert written[0] == written[1]
    assert lines[0] == lines[1]


def test_equal_files_are_encoded_once(
    extract: Callable, out: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert counts(extract("0", "copy", "1")) == (2, 0, 1, 0)
    shutil.copy(corpus / "1.avi", corpus / "later.avi")
    monkeypatch.setattr(feature_cache, "start_encoder", None)
    assert counts(extract("0", "copy", "later")) == (0, 2, 1, 0)
    cache = FeatureCache.open(out)
    assert set(cache.videos) == {"0", "1", "copy", "later"}
    assert_equal(cache["copy"], cache["0"])
    assert_equal(cache["later"], cache["1"])


def test_a_changed_file_is_encoded_anew_and_a_touched_one_is_not(
    extract: Callable, out: Path, corpus: Path
) -> None:
    extract()
    before = FeatureCache.open(out)
    os.utime(corpus / "0.avi", ns=(1, 1))
    shutil.copy(corpus / "short.avi", corpus / "1.avi")
    assert counts(extract()) == (1, 2, 0, 0)
    after = FeatureCache.open(out)
    assert_equal(after["0"], before["0"])
    assert len(before["1"].seconds) == FRAMES and len(after["1"].seconds) == 2
    assert counts(extract()) == (0, 3, 0, 0)


def test_features_of_a_file_that_is_gone_stay(extract: Callable, out: Path, corpus: Path) -> None:
    extract()
    (corpus / "1.avi").unlink()
    assert counts(extract()) == (0, 3, 0, 0)
    assert "1" in FeatureCache.open(out)


def test_broken_and_missing_videos_are_recorded_and_left_alone(
    extract: Callable, out: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("0", "broken", "none", "1")
    shutil.copy(corpus / "broken.avi", corpus / "alike.avi")
    done = extract(*names, "alike")
    assert counts(done) == (2, 0, 0, 3)
    assert done.failed["broken"].startswith("is not a video that can be read")
    assert done.failed["alike"] == done.failed["broken"]
    assert done.failed["none"] == "no such file: check the path"
    cache = FeatureCache.open(out)
    assert cache.videos == ("0", "1") and cache.failed == done.failed
    with pytest.raises(UserError, match="broken: is not a video that can be read"):
        cache["broken"]
    with monkeypatch.context() as patch:
        patch.setattr(feature_cache, "start_encoder", None)  # nothing is tried
        assert extract(*names, "alike") == feature_cache.Extracted(reused=2, failed=done.failed)
    tried = []
    real = feature_cache.encode_video
    monkeypatch.setattr(
        feature_cache, "encode_video", lambda job: tried.append(Path(job[0]).stem) or real(job)
    )
    assert counts(extract(*names, retry=True)) == (0, 2, 0, 2)
    assert tried == ["broken"]
    for name in ("broken", "none"):  # repaired, they need no --retry
        shutil.copy(corpus / "2.avi", corpus / f"{name}.avi")
    assert counts(extract(*names)) == (1, 2, 1, 0)
    assert FeatureCache.open(out).failed == {"alike": done.failed["alike"]}


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nand more"),
        RuntimeError("cuBLAS error"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    ],
    ids=lambda error: str(error)[:4],
)
def test_a_failing_device_is_no_videos_fault(
    error: Exception, extract: Callable, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = feature_cache.encode_video

    def fail(job: tuple[str, int]) -> object:
        if "/1" in job[0]:
            raise error
        return encode(job)

    with monkeypatch.context() as patch:
        patch.setattr(feature_cache, "encode_video", fail)
        with pytest.raises(UserError, match=r"out: cpu failed or has too little memory \(.*fewer"):
            extract()
    assert FeatureCache.open(out).videos == ("0",) and not FeatureCache.open(out).failed
    assert counts(extract()) == (2, 1, 0, 0)


def test_whatever_one_video_does_the_others_go_on(
    extract: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = feature_cache.encode_video

    def encode(job: tuple[str, int]) -> object:
        if job[0].endswith("1.avi"):
            raise RuntimeError("a decoder's mishap")
        return real(job)

    with monkeypatch.context() as patch:
        patch.setattr(feature_cache, "encode_video", encode)
        assert extract().failed == {"1": "RuntimeError: a decoder's mishap"}
    assert counts(extract()) == (1, 2, 0, 0), "it may have been a mishap of that day"


def test_a_file_that_changes_while_it_is_read_is_tried_again(
    extract: Callable, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = feature_cache.encode_video

    def encode(job: tuple[str, int]) -> object:
        encoded = real(job)
        if job[0].endswith("1.avi"):
            shutil.copy(corpus / "2.avi", job[0])
        return encoded

    with monkeypatch.context() as patch:
        patch.setattr(feature_cache, "encode_video", encode)
        done = extract("0", "1")
    assert counts(done) == (1, 0, 0, 1) and "changed while it was read" in done.failed["1"]
    assert counts(extract("0", "1")) == (1, 1, 0, 0)


def test_what_a_damaged_video_lacks_is_told(extract: Callable, corpus: Path) -> None:
    whole = make_video(corpus / "whole.avi", frames=60, width=320, height=240).read_bytes()
    (corpus / "cut.avi").write_bytes(whole[: len(whole) // 2])
    done = extract("cut")
    assert counts(done) == (1, 0, 0, 0)
    assert "cut.avi" in done.notices["cut"][0]


# What is damaged


def test_features_of_another_encoder_are_refused(
    extract: Callable, out: Path, tmp_path: Path, encoder: Path
) -> None:
    extract("0")
    other = tiny_clip(tmp_path / "other", seed=1)
    fingerprint = load_encoder(other).fingerprint
    with pytest.raises(UserError, match=f"not of {fingerprint}; use that encoder"):
        FeatureCache.open(out, fingerprint)
    before = (out / "index.jsonl").read_bytes()
    with pytest.raises(UserError, match=r"index.jsonl: is of the encoder .* another folder"):
        extract("0", encoder=other)
    with pytest.raises(UserError, match=f"at {FRAMES} frames in fp32, not of .* at 5"):
        extract("0", frames=5)
    with pytest.raises(UserError, match=f"in fp32, not of .* at {FRAMES} frames in bf16; extract"):
        extract("0", precision="bf16")
    assert (out / "index.jsonl").read_bytes() == before
    (out / "index.jsonl").unlink()
    with pytest.raises(UserError, match=r"00000.safetensors: is of the encoder"):
        extract("0", encoder=other)


def test_features_in_bfloat16_are_nearly_the_same(extract: Callable, out: Path) -> None:
    extract("0")
    exact = FeatureCache.open(out)
    extract("0", precision="bf16", folder=out / "bf16")
    rounded = FeatureCache.open(out / "bf16")
    assert (exact.precision, rounded.precision) == ("fp32", "bf16")
    assert exact.encoder == rounded.encoder
    for name in ("frame_embed", "patches"):
        one, other = getattr(exact["0"], name).float(), getattr(rounded["0"], name).float()
        assert 0 < (one - other).norm() < 0.02 * one.norm()


def test_a_cache_that_names_no_precision_is_of_float32(extract: Callable, out: Path) -> None:
    extract("0")
    index = out / "index.jsonl"
    header, _, rest = index.read_bytes().partition(b"\n")
    header = {key: json.loads(header)[key] for key in ("format", "encoder", "frames")}
    index.write_bytes(feature_cache._line(header) + rest)
    assert FeatureCache.open(out).precision == "fp32"
    assert counts(extract("0")) == (0, 1, 0, 0)


def test_there_must_be_a_cache(tmp_path: Path) -> None:
    for name in ("none", ""):
        with pytest.raises(UserError, match="holds no features; make them with"):
            FeatureCache.open(tmp_path / name)
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match=r"file/index.jsonl: Not a directory"):
        FeatureCache.open(tmp_path / "file")


def test_a_flipped_bit_is_found_by_reading_and_by_verify(
    extract: Callable, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with small_shards(monkeypatch):
        extract()
    cache = FeatureCache.open(out)
    cache.verify()
    intact = cache["1"]
    intact = intact._replace(patches=intact.patches.clone(), frame_embed=intact.frame_embed.clone())
    flip(out / "00001.safetensors", -5)
    told = "00001.safetensors: is damaged .*; delete this file and run the same videodistill"
    for reading in (lambda: cache["1"], cache.verify):
        with pytest.raises(UserError, match=told):
            reading()
    assert cache["0"].duration == 0.8
    header = (out / "00002.safetensors").read_bytes().index(b"data_offsets")
    flip(out / "00002.safetensors", header)
    with pytest.raises(UserError, match=r"2 shards are missing or damaged .00001.*, 00002.*delete"):
        cache.verify()
    for shard in ("00001.safetensors", "00002.safetensors"):  # the remedy
        (out / shard).unlink()
    with pytest.raises(UserError, match=r"00001.safetensors: is missing; put it back, or run"):
        cache["1"]
    lines: list[str] = []
    assert counts(extract(log=lines.append)) == (2, 1, 0, 0)
    assert lines == [
        f"0000{n}.safetensors is missing: its 1 videos must be encoded anew" for n in (1, 2)
    ]
    mended = FeatureCache.open(out)
    mended.verify()
    assert_equal(mended["1"], intact)
    assert shards(out) == ["00000.safetensors", "00003.safetensors"]


@pytest.mark.parametrize("left", [0, 5, 0.5, -1])
def test_a_truncated_shard_is_refused(extract: Callable, out: Path, left: float) -> None:
    extract()
    path = out / "00000.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[: int(left * len(whole)) if left == 0.5 else left])
    told = "00000.safetensors: is damaged .*; delete this file"
    with pytest.raises(UserError, match=told):
        FeatureCache.open(out)["1"]
    with pytest.raises(UserError, match=told):
        extract()
    path.unlink()
    assert counts(extract()) == (3, 0, 0, 0)
    FeatureCache.open(out).verify()


@pytest.mark.parametrize("line", [0, 1, 2])
def test_a_damaged_index_is_refused_and_made_anew(
    extract: Callable, out: Path, line: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    extract("0", "copy", "1")
    before = FeatureCache.open(out)
    path = out / "index.jsonl"
    lines = path.read_bytes().split(b"\n")
    for damage in (lambda text: text[:-9], lambda text: text.replace(b"0", b"1", 1)):
        damaged = [damage(text) if number == line else text for number, text in enumerate(lines)]
        path.write_bytes(b"\n".join(damaged))
        for reading in (lambda: FeatureCache.open(out), lambda: extract("0")):
            with pytest.raises(UserError, match=f"index.jsonl:{line + 1}: is damaged; delete this"):
                reading()
    path.unlink()  # the remedy
    told: list[str] = []
    monkeypatch.setattr(feature_cache, "start_encoder", None)
    assert counts(extract("0", "copy", "1", log=told.append)) == (0, 2, 1, 0)
    assert told == ["00000.safetensors was not in the index: 2 videos found again"]
    after = FeatureCache.open(out)
    assert set(after.videos) == {"0", "copy", "1"}
    assert_equal(after["copy"], before["copy"])


def test_an_index_of_a_later_version_is_refused(extract: Callable, out: Path) -> None:
    extract("0")
    path = out / "index.jsonl"
    _, *lines = path.read_bytes().splitlines(keepends=True)
    header = feature_cache._line({"format": 2, "encoder": "x", "frames": 4})
    path.write_bytes(b"".join([header, *lines]))
    with pytest.raises(UserError, match="format 2, which this version does not know"):
        FeatureCache.open(out)


# What stops a run


KILLED = """
import os, signal, sys
from pathlib import Path
import transformers
from transformers import AutoTokenizer, CLIPConfig, CLIPModel  # once, for all children
from videodistill.engine import answerer, feature_cache

corpus, encoder, out = sys.argv[1:4]
feature_cache.SHARD_VIDEOS = 1
videos = {name: Path(corpus, name + ".avi") for name in ("0", "1", "2")}
for when in sys.argv[4:]:
    child = os.fork()
    if not child:
        real, calls = getattr(feature_cache, when), []

        def deadly(*arguments):
            calls.append(arguments)
            if len(calls) == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments)

        setattr(feature_cache, when, deadly)
        feature_cache.extract_corpus(videos, encoder, 4, Path(out, when), workers=1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
"""
# How many videos a kill in the third call must leave: that waits, after the first shard and the
# folder, until the line of that shard is on the disk; the others are of the third video.
KILLS = {"encode_video": 2, "save_file": 2, "sync": 1}


@pytest.fixture(scope="module")
def killed(material: Path, encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what killed runs have left: one process, as importing takes seconds."""
    folder = tmp_path_factory.mktemp("killed")
    script = [sys.executable, "-c", KILLED, material, encoder, folder, *KILLS]
    subprocess.run(script, cwd=ROOT, check=True)
    return folder


@pytest.mark.parametrize("when", KILLS)
def test_a_killed_run_goes_on(killed: Path, extract: Callable, out: Path, when: str) -> None:
    shutil.copytree(killed / when, out)
    kept = KILLS[when]
    assert len(FeatureCache.open(out)) == kept
    assert counts(extract()) == (3 - kept, kept, 0, 0)
    cache = FeatureCache.open(out)
    cache.verify()
    assert set(cache) == {"0", "1", "2"}


def test_a_kill_between_shard_and_index_loses_nothing(
    extract: Callable, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = out / "index.jsonl"
    extract("0")
    before = index.read_bytes()
    extract("0", "1")
    # What a kill leaves: a shard without its line, half a line, half a shard.
    index.write_bytes(before + index.read_bytes()[len(before) :][:40])
    (out / ".unfinished").mkdir()
    (out / ".unfinished" / "00002.safetensors").write_bytes(b"the first bytes")
    assert FeatureCache.open(out).videos == ("0",)
    with monkeypatch.context() as patch:
        patch.setattr(feature_cache, "start_encoder", None)
        assert counts(extract("0", "1")) == (0, 2, 0, 0)
    assert shards(out) == ["00000.safetensors", "00001.safetensors"]
    assert not (out / ".unfinished").exists()
    FeatureCache.open(out).verify()


def test_a_shard_without_its_line_is_checked(extract: Callable, out: Path) -> None:
    extract("0")
    (out / "index.jsonl").unlink()
    flip(out / "00000.safetensors", -5)
    with pytest.raises(UserError, match=r"00000.safetensors: is damaged .*; delete this file"):
        extract("0")


def test_what_is_ready_is_kept_when_a_run_is_stopped(
    extract: Callable, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = feature_cache.encode_video

    def encode(job: tuple[str, int]) -> object:
        if job[0].endswith("2.avi"):
            raise KeyboardInterrupt
        return real(job)

    with monkeypatch.context() as patch:
        patch.setattr(feature_cache, "encode_video", encode)
        with pytest.raises(KeyboardInterrupt):
            extract()
    assert counts(extract()) == (1, 2, 0, 0)


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """No file can grow beyond so many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_shard_that_cannot_be_written_leaves_the_cache_as_it_was(
    extract: Callable, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extract("0")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with largest_file(2000), pytest.raises(UserError, match="File too large"):
        extract()
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert counts(extract()) == (2, 1, 0, 0)
    FeatureCache.open(out).verify()


def test_a_line_that_cannot_be_written_leaves_the_index_as_it_was(
    extract: Callable, out: Path, corpus: Path
) -> None:
    extract("0")
    before = (out / "index.jsonl").read_bytes()
    with largest_file(len(before) + 30), pytest.raises(UserError, match="File too large"):
        extract("0", "broken")
    assert (out / "index.jsonl").read_bytes() == before
    assert counts(extract("0", "broken")) == (0, 1, 0, 1)


def test_a_full_disk_is_one_line(
    extract: Callable, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(tensors: object, path: Path, metadata: object) -> None:
        path.write_bytes(b"the first bytes")
        raise SafetensorError(f"I/O error: {os.strerror(errno.ENOSPC)} (os error {errno.ENOSPC})")

    monkeypatch.setattr(feature_cache, "save_file", full)
    told = r"out/00000.safetensors: No space left on device; free some space and run the same"
    with pytest.raises(UserError, match=told):
        extract()
    assert sorted(path.name for path in out.iterdir()) == [".lock", "index.jsonl"]


def test_a_killed_worker_is_one_line_and_costs_nothing_that_was_ready(
    extract: Callable, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = feature_cache.map_in_processes

    @contextmanager
    def one_result(*arguments: object) -> Iterator[Iterator]:
        def results() -> Iterator:
            yield next(all_results)
            raise BrokenProcessPool

        with real(*arguments) as all_results:
            yield results()

    with monkeypatch.context() as patch:
        patch.setattr(feature_cache, "map_in_processes", one_result)
        with pytest.raises(UserError, match="a worker was killed"):
            extract()
    assert counts(extract()) == (2, 1, 0, 0)


def test_a_second_run_at_once_is_refused(
    extract: Callable, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, busy, go = feature_cache.encode_video, threading.Event(), threading.Event()

    def encode(job: tuple[str, int]) -> object:
        busy.set()
        assert go.wait(60)
        return real(job)

    monkeypatch.setattr(feature_cache, "encode_video", encode)
    first = threading.Thread(target=extract)
    first.start()
    try:
        assert busy.wait(60)
        with pytest.raises(UserError, match="another run is writing into it; wait"):
            extract()
    finally:
        go.set()
        first.join()
    assert counts(extract()) == (0, 3, 0, 0)


def test_numbers_out_of_range(extract: Callable, out: Path) -> None:
    for setting in ("workers", "frames"):
        with pytest.raises(UserError, match=f"{setting} 0: use at least 1"):
            extract(**{setting: 0})
    assert not out.exists()


# Readers


def _sum(cache: FeatureCache) -> dict[str, float]:
    return {name: cache[name].patches.double().sum().item() for name in cache}


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_processes_share_a_cache(extract: Callable, out: Path, method: str) -> None:
    extract()
    cache = FeatureCache.open(out)
    expected = _sum(cache)
    with multiprocessing.get_context(method).Pool(1) as pool:
        assert pool.apply(_sum, [cache]) == expected


def test_reading_does_not_fill_the_memory(extract: Callable, out: Path) -> None:
    """What was read and let go is not kept: a corpus may be larger than the memory."""
    extract()
    cache = FeatureCache.open(out)
    for name in cache:
        cache[name]
    with open("/proc/self/maps") as maps:
        assert not [line for line in maps if str(out) in line]


def test_a_reader_sees_whole_lines_while_a_run_writes(
    extract: Callable, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    real = feature_cache.encode_video

    def encode(job: tuple[str, int]) -> object:
        seen.append(len(FeatureCache.open(out)))
        return real(job)

    monkeypatch.setattr(feature_cache, "encode_video", encode)
    with small_shards(monkeypatch):
        extract()
    assert seen == [0, 1, 2]
