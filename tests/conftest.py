"""Fixtures that tests of both packages share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real annotations and real videos, or a skip that says where it should be."""
    folder = Path(os.environ.get("VD_SHARED_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}; set VD_SHARED_DATA to the folder that holds it")
    return folder
