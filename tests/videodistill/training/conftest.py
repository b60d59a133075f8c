"""One small dataset, its features and an encoder for the whole run of tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.videodistill.training import small
from videodistill.encoders import ImageTextEncoder, load_encoder
from videodistill.training.config import TrainConfig


@pytest.fixture(scope="session")
def encoder_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.make_encoder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="session")
def small_encoder(encoder_dir: Path) -> ImageTextEncoder:
    return load_encoder(encoder_dir)


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    small.write_dataset(tmp_path / "data")
    return tmp_path / "data"


@pytest.fixture
def features(dataset: Path) -> dict[str, Any]:
    return small.features_of([f"v{number}.mp4" for number in range(7)])


@pytest.fixture
def configure(dataset: Path, encoder_dir: Path, tmp_path: Path) -> Callable[..., TrainConfig]:
    """A run by the name of its folder and overrides."""

    def made(name: str, *overrides: str) -> TrainConfig:
        return small.config_for(dataset, encoder_dir, tmp_path / name, *overrides)

    return made
