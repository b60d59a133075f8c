from __future__ import annotations

import json
import pickle
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import videodistill
from tests.videodistill.engine.material import make_checkpoint
from tests.videodistill.tiny import tiny_clip
from videodistill import UserError, VideoDistill


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("loading") / "whole")


class _Exploit:
    """Pickled, it creates a file when it is loaded."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable, tuple[Path]]:
        return Path.touch, (self.mark,)


def _truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def _drop_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["sampler.score.weight"]
    save_file(weights, folder / "model.safetensors")


def _configure(**settings: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | settings))

    return change


def _lose_encoder(folder: Path) -> None:
    shutil.rmtree(folder / "encoder")
    _configure(encoder=str(folder / "elsewhere"))(folder)


def _only_pickle(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    payload = pickle.dumps(_Exploit(folder / "run by pickle"))
    (folder / "pytorch_model.bin").write_bytes(payload)


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda folder: (folder / "config.json").unlink(), ["has no config.json"]),
        (
            lambda folder: (folder / "config.json").write_text('{"width": '),
            ["config.json is damaged"],
        ),
        (
            lambda folder: (folder / "config.json").write_text("[1]"),
            ["config.json", "no VideoDistill"],
        ),
        (
            lambda folder: (folder / "config.json").write_bytes(b"\xff\xfe"),
            ["config.json is damaged"],
        ),
        (_configure(flavour="mint"), ["config.json", "no VideoDistill", "flavour"]),
        (_configure(width="wide"), ["config.json", "no VideoDistill", "width"]),
        (_configure(width=33), ["config.json", "no VideoDistill", "33"]),
        (_configure(answers=["yes", "no"]), ["model.safetensors does not fit", "classifier"]),
        (_configure(embed_dim=8), ["model.safetensors does not fit"]),
        (_truncate, ["model.safetensors is damaged"]),
        (
            lambda folder: (folder / "model.safetensors").write_bytes(b""),
            ["model.safetensors is damaged"],
        ),
        (_drop_weight, ["model.safetensors does not fit", "sampler.score.weight"]),
        (_only_pickle, ["has no model.safetensors"]),
        (_lose_encoder, ["no encoder folder", "--encoder"]),
        (
            lambda folder: (folder / "encoder" / "config.json").write_text("{"),
            ["encoder", "config.json"],
        ),
    ],
)
def test_a_damaged_checkpoint_is_named(
    whole: Path, tmp_path: Path, damage: Callable[[Path], None], named: list[str]
) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "copy"))
    damage(folder)
    with pytest.raises(UserError) as told:
        videodistill.load(folder)
    assert all(part in str(told.value) for part in [str(folder), *named]), str(told.value)
    assert "\n" not in str(told.value) and len(str(told.value)) < 500
    assert not (folder / "run by pickle").exists()


def test_a_checkpoint_for_another_encoder_is_refused(whole: Path, tmp_path: Path) -> None:
    other = videodistill.load_encoder(tiny_clip(tmp_path / "other", seed=1))
    own = videodistill.load_encoder(whole / "encoder")
    with pytest.raises(UserError) as told:
        videodistill.load(whole, encoder=tmp_path / "other")
    for part in (str(whole), own.fingerprint, str(tmp_path / "other"), other.fingerprint):
        assert part in str(told.value)
    assert "--zero-shot" in str(told.value)


def test_a_checkpoint_for_no_encoder_in_particular_needs_its_sizes(
    whole: Path, tmp_path: Path
) -> None:
    free = Path(shutil.copytree(whole, tmp_path / "free"))
    _configure(encoder_fingerprint="")(free)
    assert videodistill.load(free, encoder=tiny_clip(tmp_path / "same", seed=1)).trained
    with pytest.raises(UserError, match=r"embed_dim 16.* 32"):
        videodistill.load(free, encoder=tiny_clip(tmp_path / "wide", width=64))
    with pytest.raises(UserError, match=r"patch_grid \(4, 4\).* \(2, 2\)"):
        videodistill.load(free, encoder=tiny_clip(tmp_path / "coarse", patch=16))


def test_a_checkpoint_may_move_with_its_encoder(whole: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(whole, tmp_path / "moved")
    assert isinstance(videodistill.load(moved).model, VideoDistill)
    assert isinstance(videodistill.load(str(moved), device="cpu").model, VideoDistill)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"checkpoint": "no/such/folder"}, "checkpoint no/such/folder: no such folder"),
        ({"checkpoint": "conftest.py"}, "checkpoint conftest.py: no such folder"),
        ({"checkpoint": __file__}, "is a file: give the folder"),
        ({"checkpoint": "anything", "zero_shot": True}, "drop one of the two"),
        ({"device": "abacus"}, "--device abacus cannot be used"),
        ({"zero_shot": True, "encoder": "no/such/folder"}, "no/such/folder"),
    ],
)
def test_bad_arguments_are_named(arguments: dict, message: str) -> None:
    with pytest.raises(UserError) as told:
        videodistill.load(**arguments)
    assert message in str(told.value)


@pytest.mark.parametrize("arguments", [{}, {"zero_shot": True}])
def test_without_a_network_a_hub_id_is_refused(
    arguments: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unreachable)
    name = "somebody/some-model-that-is-not-cached"
    role = "encoder" if arguments else "checkpoint"
    with pytest.raises(UserError) as told:
        videodistill.load(**arguments, **{role: name})
    assert name in str(told.value) and "local" in str(told.value)


def test_without_an_encoder_inside_the_one_named_is_taken(whole: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "copy"))
    elsewhere = shutil.move(folder / "encoder", tmp_path / "elsewhere")
    _configure(encoder=str(elsewhere))(folder)
    assert videodistill.load(folder).encoder.name == str(elsewhere)
