"""The head as captured CUDA graphs: one launch for a batch of questions instead of hundreds."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from typing import NamedTuple

import torch
from torch import Tensor

from videodistill.model.videodistill import (
    VideoDistill,
    VideoDistillOutput,
    even_times,
    questions_of_each,
)

_GRAPHS = 32
_OF_QUESTIONS = ("text_embed", "tokens", "token_mask", "score_bias")


class _Sizes(NamedTuple):
    """Of a bucket: V videos, Q questions about each, N frames, M tokens a question, K chosen."""

    videos: int
    questions: int
    frames: int
    tokens: int
    pick: int


class GraphRunner:
    """Calls a model in inference by replaying graphs of it.

    A graph serves a bucket of sizes: videos, questions a video, frames and tokens of a question are
    rounded up to powers of two, and what is added is masked or cut off again. The first call of a
    bucket captures its graph; after that the host copies the inputs and launches once. Nothing
    waits for the device. Graphs read the weights where they lie: change them in place or not at
    all.

    On a CPU the padded inputs go through the model itself, to the same results.

    Args:
        model: In eval mode, on the device of the inputs.
    """

    def __init__(self, model: VideoDistill):
        self.model = model
        self._buckets: OrderedDict[tuple, _Bucket] = OrderedDict()
        # Buckets take turns and results are copied before the next one's, so they share memory.
        self._pool: tuple[int, int] | None = None

    @torch.inference_mode()
    def __call__(
        self,
        frame_embed: Tensor,
        patches: Tensor,
        text_embed: Tensor,
        tokens: Tensor,
        token_mask: Tensor,
        *,
        frame_mask: Tensor | None = None,
        times: Tensor | None = None,
        pick: int | None = None,
        score_bias: Tensor | None = None,
    ) -> VideoDistillOutput:
        """As the model's own forward, whose arguments these are.

        Raises:
            ValueError: The model is in training mode; B is not a positive multiple of V; K is not
                in 1..N.
        """
        if self.model.training:
            raise ValueError("the model is in training mode: call eval() on it first")
        videos, frames = frame_embed.shape[:2]
        questions = questions_of_each(frame_embed, text_embed)
        pick = self.model.config.pick if pick is None else pick
        if not 1 <= pick <= frames:
            raise ValueError(f"pick must be between 1 and the {frames} frames, got {pick}")
        sizes = (videos, questions, frames, tokens.shape[1])
        rounded = _Sizes(*map(_power_of_two, sizes), pick)
        if times is None:
            times = even_times(frame_embed)
        if frame_mask is None and rounded.frames != frames:
            frame_mask = torch.ones_like(times, dtype=torch.bool)
        given = {
            "frame_embed": frame_embed,
            "patches": patches,
            "text_embed": text_embed,
            "tokens": tokens,
            "token_mask": token_mask,
            "frame_mask": frame_mask,
            "times": times,
            "score_bias": score_bias,
        }
        # Graphs are captured and replayed on torch's current device, whatever is in them.
        with torch.cuda.device(tokens.device) if tokens.is_cuda else contextlib.nullcontext():
            bucket = self._bucket(rounded, {n: x for n, x in given.items() if x is not None})
            bucket.fill(given)
            bucket.run()
            return bucket.results(videos, questions, frames)

    def _bucket(self, sizes: _Sizes, given: dict[str, Tensor]) -> _Bucket:
        kind = given["tokens"].device.type
        autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        key = (sizes, autocast, *((n, x.dtype, x.device, x.shape[2:]) for n, x in given.items()))
        if key not in self._buckets:
            if len(self._buckets) == _GRAPHS:
                self._buckets.popitem(last=False)
            bucket = _Bucket(self.model, sizes, given, autocast, self._pool)
            self._buckets[key] = bucket
            if bucket.graph is not None:
                self._pool = bucket.graph.pool()
        self._buckets.move_to_end(key)
        return self._buckets[key]


def _power_of_two(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


class _Bucket:
    """Inputs of fixed sizes in fixed places, and what the model makes of them."""

    def __init__(
        self,
        model: VideoDistill,
        sizes: _Sizes,
        given: dict[str, Tensor],
        autocast: torch.dtype | None,
        pool: tuple[int, int] | None,
    ):
        self.model, self.sizes, self.autocast = model, sizes, autocast
        second = {"tokens": sizes.tokens, "token_mask": sizes.tokens, "text_embed": None}
        self.inputs = {}
        """By video [V,N,...], by question [V,Q,...]."""
        for name, x in given.items():
            lead = [sizes.videos, *[sizes.questions] * (name in _OF_QUESTIONS)]
            along = second.get(name, sizes.frames)
            rest = x.shape[1:] if along is None else (along, *x.shape[2:])
            # Rows that no call fills have something real, as every row of a call has.
            self.inputs[name] = x.new_full((*lead, *rest), x.dtype == torch.bool)
        self.output: VideoDistillOutput | None = None
        self.graph: torch.cuda.CUDAGraph | None = None
        if given["tokens"].is_cuda:
            self._capture(pool)

    def _capture(self, pool: tuple[int, int] | None) -> None:
        """After two runs beside it, which load kernels and fill the libraries' workspaces."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                self._forward()
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, pool=pool):
            self._forward()

    def _forward(self) -> None:
        inputs = {
            name: x.flatten(0, 1) if name in _OF_QUESTIONS else x for name, x in self.inputs.items()
        }
        # Without its cache: a graph must not read casts of weights that were made outside of it.
        with torch.autocast(
            inputs["tokens"].device.type,
            self.autocast,
            enabled=self.autocast is not None,
            cache_enabled=False,
        ):
            self.output = self.model(**inputs, pick=self.sizes.pick)

    def fill(self, given: dict[str, Tensor | None]) -> None:
        videos = len(given["frame_embed"])
        for name, to in self.inputs.items():
            x = given[name]
            if name in _OF_QUESTIONS:
                x = x.unflatten(0, (videos, -1))
            if x.dtype == torch.bool:  # beyond the call's own sizes its rows are padding
                to[tuple(map(slice, x.shape[:-1]))] = False
            to[tuple(map(slice, x.shape))].copy_(x, non_blocking=True)

    def run(self) -> None:
        if self.graph is None:
            self._forward()
        else:
            self.graph.replay()

    def results(self, videos: int, questions: int, frames: int) -> VideoDistillOutput:
        """Copies of what belongs to the call: the next one overwrites the rest."""

        def rows(x: Tensor) -> Tensor:
            own = x.unflatten(0, self.sizes[:2])[:videos, :questions]
            return own.flatten(0, 1).clone()

        output, sample = self.output, self.output.sample
        return output._replace(
            answer_embed=rows(output.answer_embed),
            scores=rows(output.scores[:, :frames]),
            sample=sample._replace(
                weights=rows(sample.weights[..., :frames]),
                indices=rows(sample.indices),
                slot_mask=rows(sample.slot_mask),
            ),
            patch_gates=rows(output.patch_gates),
        )
