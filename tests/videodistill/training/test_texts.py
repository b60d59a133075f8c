from __future__ import annotations

import errno
from pathlib import Path

import numpy as np
import pytest
import torch

from videodistill.encoders import ImageTextEncoder
from videodistill.training import texts
from videodistill.training.texts import TextStore

ASKED = ["what colour is it?", "who?", "a red ring left after the blue square moved"]
OTHERS = ["yes", "no"]


def test_the_store_holds_what_the_encoder_says(
    small_encoder: ImageTextEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(texts, "_BATCH", 2)  # padded to other lengths than all at once
    lines: list[str] = []
    store = TextStore.make(tmp_path / "texts", small_encoder, ASKED, OTHERS, log=lines.append)
    assert lines == ["texts: 2/5 encoded", "texts: 4/5 encoded", "texts: 5/5 encoded"]
    expected = small_encoder.encode_texts([*ASKED, *OTHERS])
    assert [store.numbers[text] for text in (*ASKED, *OTHERS)] == [0, 1, 2, 3, 4]
    rows = np.array([[4, 0], [3, 2]])
    assert np.allclose(store.embed(rows), expected.text_embed[rows].numpy(), atol=1e-5)
    rows = np.array([2, 0, 2])
    tokens, ids, mask = store.tokens(rows)
    assert torch.equal(torch.from_numpy(mask), expected.mask[rows])
    wanted = expected.tokens[rows] * expected.mask[rows][..., None]
    assert np.allclose(tokens, wanted.numpy(), atol=5e-3)
    again, _, _ = small_encoder.tokenize([ASKED[2]])
    assert ids[0].tolist() == again[0].tolist()


def test_texts_are_encoded_once_and_anew_when_they_change(
    small_encoder: ImageTextEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "texts"
    (tmp_path / ".texts.partial").mkdir()  # of a run that was killed
    TextStore.make(folder, small_encoder, ASKED)
    assert [path.name for path in tmp_path.iterdir()] == ["texts"]
    calls = []
    written = texts._write
    monkeypatch.setattr(texts, "_write", lambda *given: (calls.append(given), written(*given)))
    TextStore.make(folder, small_encoder, ASKED)
    assert not calls
    store = TextStore.make(folder, small_encoder, ASKED[:2], OTHERS)
    assert len(calls) == 1 and store.tokens(np.array([1]))[2].any()


def test_a_full_disk_leaves_what_was_there(
    small_encoder: ImageTextEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "texts"
    TextStore.make(folder, small_encoder, ASKED)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(texts, "_array", full)
    with pytest.raises(OSError, match="No space left"):
        TextStore.make(folder, small_encoder, OTHERS)
    assert [path.name for path in tmp_path.iterdir()] == ["texts"]
    assert TextStore.make(folder, small_encoder, ASKED).numbers[ASKED[0]] == 0
