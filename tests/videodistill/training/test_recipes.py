from __future__ import annotations

import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch

from videodistill.data.datasets import get_dataset
from videodistill.errors import UserError
from videodistill.evaluation.scoring import RULES
from videodistill.model import VideoDistill, VideoDistillConfig
from videodistill.training.config import read_config, recipes

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[3]
GIVEN = ("data.path=annotations", "data.features=features")
WANTED = {
    *("nextqa", "msvd", "msrvtt", "activitynet", "egotaskqa-direct", "egotaskqa-indirect"),
    *("agqa", "star", "egoschema", "grounded", "pretrain"),
}
VIT_L_14 = {"embed_dim": 768, "patch_dim": 1024, "token_dim": 768, "patch_grid": (16, 16)}


def test_all_recipes_are_there_and_distributed() -> None:
    assert set(recipes()) == WANTED
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    patterns = project["tool"]["setuptools"]["package-data"]["videodistill"]
    for path in recipes().values():
        inside = path.relative_to(ROOT / "videodistill").as_posix()
        assert any(fnmatch(inside, pattern) for pattern in patterns), inside


@pytest.mark.parametrize("name", sorted(WANTED))
def test_a_recipe_makes_a_model(name: str) -> None:
    config = read_config(name, GIVEN)
    dataset = get_dataset(config.data.dataset)
    assert config.encoder == "openai/clip-vit-large-patch14"
    if dataset.finder is None:
        assert {config.data.train, config.data.val} - {None} <= set(dataset.splits)
    assert config.validation.metric in ("all", "loss") and dataset.rule in RULES
    with torch.device("meta"):
        model = VideoDistill(VideoDistillConfig(**VIT_L_14, **config.model))
    assert 20e6 < sum(parameter.numel() for parameter in model.parameters()) < 80e6
    assert config.steps > 0 or name == "egoschema"


def test_what_a_recipe_needs_is_told() -> None:
    with pytest.raises(UserError, match=r"nextqa\.yaml: data\.path: is missing"):
        read_config("nextqa")
    with pytest.raises(UserError, match="nextqaa: no such file, and no recipe of that name; did"):
        read_config("nextqaa")
