from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from videodistill.errors import UserError
from videodistill.model import VideoDistill, VideoDistillConfig
from videodistill.training import checkpoint
from videodistill.training.checkpoint import (
    export_model,
    load_checkpoint,
    newest_checkpoint,
    read_state,
    save_checkpoint,
)


def made(steps: int = 2) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    optimiser = torch.optim.AdamW(module.parameters(), lr=0.1)
    for _ in range(steps):
        optimiser.zero_grad()
        module[0](torch.ones(2, 3)).square().sum().backward()  # the second layer is not used
        optimiser.step()
    return module, optimiser


def test_what_is_loaded_is_what_was_saved(tmp_path: Path) -> None:
    module, optimiser = made()
    folder = save_checkpoint(tmp_path, 12, module, optimiser, {"best": 0.5, "config": {"a": [1]}})
    assert folder.name == "step-00000012"
    assert read_state(folder) == {"step": 12, "best": 0.5, "config": {"a": [1]}}
    other, other_optimiser = made(steps=0)
    load_checkpoint(folder, other, other_optimiser)
    for one, two in zip(module.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)
        state, loaded = optimiser.state.get(one, {}), other_optimiser.state.get(two, {})
        assert state.keys() == loaded.keys()
        assert all(torch.equal(state[key], loaded[key]) for key in state)
    assert not other_optimiser.state.get(other[1].weight)


def test_those_who_may_read_one_file_may_read_all(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    folder = save_checkpoint(tmp_path / "checkpoints", 1, *made(), {})
    settings = {"embed_dim": 4, "patch_dim": 4, "token_dim": 4, "width": 8, "heads": 2}
    export_model(VideoDistill(VideoDistillConfig(**settings)), tmp_path / "best", {})
    files = [*folder.iterdir(), *(tmp_path / "best").iterdir()]
    assert len(files) == 6
    assert {file.stat().st_mode for file in files} == {(tmp_path / "plain").stat().st_mode}


def test_the_newest_whole_one_counts_and_older_ones_go(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path / "none") is None
    module, optimiser = made()
    for step in (9, 10):
        save_checkpoint(tmp_path / str(step), step, module, optimiser, {})
        (tmp_path / str(step) / f"step-{step:08}").rename(tmp_path / f"step-{step:08}")
        (tmp_path / str(step)).rmdir()
    (tmp_path / ".step-00000011.partial").mkdir()
    assert newest_checkpoint(tmp_path).name == "step-00000010"
    save_checkpoint(tmp_path, 100_000_000, module, optimiser, {})
    assert [path.name for path in tmp_path.iterdir()] == ["step-100000000"]


@pytest.mark.parametrize("moment", ["save_file", "sync"])
def test_a_failure_while_saving_leaves_the_last_one(
    moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, optimiser = made()
    save_checkpoint(tmp_path, 1, module, optimiser, {})

    def fail(*_: object) -> None:
        raise OSError("no")

    monkeypatch.setattr(checkpoint, moment, fail)
    with pytest.raises(OSError, match="no"):
        save_checkpoint(tmp_path, 2, module, optimiser, {})
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


@pytest.mark.parametrize("name", ["weights.safetensors", "optimiser.safetensors"])
def test_a_damaged_checkpoint_is_named(name: str, tmp_path: Path) -> None:
    module, optimiser = made()
    folder = save_checkpoint(tmp_path, 1, module, optimiser, {})
    (folder / name).write_bytes((folder / name).read_bytes()[:-9])
    with pytest.raises(UserError, match=r"step-00000001 is damaged \(.+\): start again in another"):
        load_checkpoint(folder, module, optimiser)
