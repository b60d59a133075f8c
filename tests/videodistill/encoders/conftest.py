"""One tiny CLIP and one tiny SigLIP directory for the whole run; tests that change one copy it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.videodistill.tiny import tiny_clip, tiny_siglip
from videodistill.encoders import ImageTextEncoder, load_encoder


@pytest.fixture(scope="session")
def clip_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="session")
def siglip_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_siglip(tmp_path_factory.mktemp("siglip"))


@pytest.fixture(scope="session")
def clip(clip_dir: Path) -> ImageTextEncoder:
    return load_encoder(clip_dir)


@pytest.fixture(scope="session")
def siglip(siglip_dir: Path) -> ImageTextEncoder:
    return load_encoder(siglip_dir)
