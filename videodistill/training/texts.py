"""Texts as the frozen encoder sees them, computed once and mapped from disk."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from videodistill.data.files import write_whole
from videodistill.encoders import ImageTextEncoder

_BATCH = 256


class TextStore:
    """Embeddings of U texts, and the tokens of those that are asked; made by :meth:`make`.

    Only real tokens are kept, and nothing is read before it is needed: texts of a corpus may take
    more space than there is memory.
    """

    def __init__(self, folder: Path, texts: Sequence[str]):
        self.numbers = {text: number for number, text in enumerate(texts)}
        """Of each text."""
        self._embed, self._tokens, self._ids, self._starts = (
            np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)
            for name in ("embed", "tokens", "ids", "starts")
        )

    @classmethod
    def make(
        cls,
        folder: Path,
        encoder: ImageTextEncoder,
        asked: Sequence[str],
        others: Sequence[str] = (),
        *,
        log: Callable[[str], None] | None = None,
    ) -> TextStore:
        """Texts in a folder, encoded anew unless it holds the same ones of the same encoder.

        Args:
            folder: Written beside its place and moved there when complete.
            encoder: The frozen encoder.
            asked: Texts whose tokens are wanted, at least one; each once.
            others: Texts whose embeddings are enough; none of ``asked``.
            log: Called with a line for each tenth of the work.

        Raises:
            OSError: The folder cannot be written.
        """
        texts = [*asked, *others]
        digest = hashlib.sha256(json.dumps([len(asked), texts]).encode()).hexdigest()
        origin = json.dumps({"encoder": encoder.fingerprint, "texts": digest})
        index = folder / "index.json"
        if not index.is_file() or index.read_text(encoding="utf-8") != origin:
            partial = folder.with_name(f".{folder.name}.partial")
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            try:
                _write(partial, encoder, texts, len(asked), log)
                write_whole(partial / "index.json", origin)
            except OSError:
                shutil.rmtree(partial, ignore_errors=True)
                raise
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(partial, folder)
        return cls(folder, texts)

    def embed(self, rows: np.ndarray) -> np.ndarray:
        """float32 [...,C_a] of texts by their numbers, of any shape."""
        return self._embed[rows]

    def tokens(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Tokens float32 [n,M,C_t], ids int64 [n,M] and mask bool [n,M] of n asked texts."""
        starts, ends = self._starts[rows], self._starts[rows + 1]
        shape = len(rows), int((ends - starts).max())
        tokens = np.zeros((*shape, self._tokens.shape[1]), np.float32)
        ids, mask = np.zeros(shape, np.int64), np.zeros(shape, bool)
        for row, (start, end) in enumerate(zip(starts, ends, strict=True)):
            tokens[row, : end - start] = self._tokens[start:end]
            ids[row, : end - start] = self._ids[start:end]
            mask[row, : end - start] = True
        return tokens, ids, mask


def _write(
    folder: Path,
    encoder: ImageTextEncoder,
    texts: Sequence[str],
    asked: int,
    log: Callable[[str], None] | None,
) -> None:
    ids, mask = [], []
    for first in range(0, len(texts), _BATCH):
        some_ids, some_mask, _ = encoder.tokenize(texts[first : first + _BATCH])
        ids.append(some_ids)
        mask.append(some_mask)
    lengths = np.concatenate([part.sum(1).numpy() for part in mask])
    lengths[asked:] = 0
    starts = np.concatenate([[0], np.cumsum(lengths)])
    total = int(starts[-1])
    np.save(folder / "starts.npy", starts)
    # Written from the start to the end, not through a map: on a full disk that ends in a signal.
    with (
        _array(folder / "embed.npy", np.float32, (len(texts), encoder.embed_dim)) as embed_file,
        _array(folder / "tokens.npy", np.float16, (total, encoder.token_dim)) as token_file,
        _array(folder / "ids.npy", np.int32, (total,)) as id_file,
    ):
        done = 0
        for some_ids, some_mask in zip(ids, mask, strict=True):
            embed, tokens = encoder.encode_ids(some_ids)
            embed_file.write(embed.cpu().numpy().astype(np.float32).tobytes())
            kept = some_mask[: max(0, asked - done)]
            token_file.write(tokens.cpu()[: len(kept)][kept].numpy().astype(np.float16).tobytes())
            id_file.write(some_ids[: len(kept)][kept].numpy().astype(np.int32).tobytes())
            before, done = done, done + len(some_ids)
            if log and 10 * done // len(texts) > 10 * before // len(texts):
                log(f"texts: {done}/{len(texts)} encoded")


def _array(path: Path, dtype: type, shape: tuple[int, ...]):
    """A .npy file that takes the bytes of such an array."""
    file = path.open("wb")
    header = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
    return file
