from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch

from vd_kernels import TopKSample
from videodistill.engine.graphs import GraphRunner
from videodistill.model import VideoDistill, VideoDistillConfig, VideoDistillOutput
from videodistill.precision import keep_for_products, product_autocast

CONFIG = VideoDistillConfig(
    embed_dim=16, patch_dim=24, token_dim=20, patch_grid=(2, 3), width=32, heads=4, frames=8, pick=3
)
ON_GPU = pytest.param(
    "cuda",
    marks=[
        pytest.mark.gpu,
        pytest.mark.skipif(not torch.cuda.device_count(), reason="torch sees no CUDA device"),
    ],
)
devices = pytest.mark.parametrize("device", ["cpu", ON_GPU])


def model_on(device: str, **settings: Any) -> VideoDistill:
    """With random weights also where training starts at zero, so that everything shows."""
    torch.manual_seed(0)
    model = VideoDistill(VideoDistillConfig(**(vars(CONFIG) | settings)))
    for weight in (model.answering.adapt[-1].weight, model.sampler.score.weight):
        torch.nn.init.normal_(weight, std=0.2)
    return model.to(device).eval()


def inputs(
    device: str, videos: int, questions: int, frames: int, tokens: int, *, masked: bool = False
) -> dict[str, Any]:
    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    generator = torch.Generator().manual_seed(frames * 31 + tokens)
    rows = videos * questions
    given = {
        "frame_embed": draw(videos, frames, 16),
        "patches": draw(videos, frames, 6, 24),
        "text_embed": draw(rows, 16),
        "tokens": draw(rows, tokens, 20),
        "token_mask": torch.arange(tokens, device=device).expand(rows, tokens) < max(1, tokens - 2),
    }
    if masked:
        count = torch.arange(videos, device=device)[:, None] + frames - videos
        given["frame_mask"] = torch.arange(frames, device=device) < count
    return given


def assert_near(found: VideoDistillOutput, expected: VideoDistillOutput) -> None:
    assert torch.equal(found.sample.indices, expected.sample.indices)
    assert torch.equal(found.sample.slot_mask, expected.sample.slot_mask)
    assert torch.equal(found.sample.weights, expected.sample.weights)
    for name in ("answer_embed", "scores", "patch_gates"):
        torch.testing.assert_close(
            getattr(found, name), getattr(expected, name), atol=2e-5, rtol=1e-4, msg=name
        )


SIZES = [(1, 1, 8, 4), (1, 5, 8, 7), (3, 2, 11, 5), (2, 1, 3, 1), (1, 3, 9, 6), (1, 1, 8, 4)]


@devices
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"frame_choice": "uniform"},
        {"frame_choice": "mean"},
        {"gate": "channel"},
        {"mixing": "cross_attention"},
    ],
    ids=str,
)
def test_padding_changes_nothing(device: str, settings: dict[str, Any]) -> None:
    """Calls of several sizes in turn, so that a bucket holds what an earlier one left in it."""
    model = model_on(device, **settings)
    runner = GraphRunner(model)
    for masked in (False, True):
        for sizes in SIZES:
            given = inputs(device, *sizes, masked=masked)
            with torch.inference_mode():
                expected = model(**given)
            assert_near(runner(**given), expected)


@devices
def test_in_bfloat16_with_weights_kept_so(device: str) -> None:
    exact, given = model_on(device), inputs(device, 2, 4, 8, 4)  # a bucket's own sizes
    model = model_on(device)
    keep_for_products(model, "bf16")
    with torch.inference_mode(), product_autocast(torch.device(device), "bf16"):
        expected, found = model(**given), GraphRunner(model)(**given)
    assert torch.equal(found.sample.indices, expected.sample.indices)
    with torch.inference_mode():
        full = exact(**given)
    for name in ("answer_embed", "scores", "patch_gates"):
        values, true = getattr(found, name).float(), getattr(full, name)
        torch.testing.assert_close(values, getattr(expected, name).float(), atol=2e-2, rtol=2e-2)
        assert 0 < (values - true).norm() < 0.05 * true.norm()


@devices
def test_results_stay_when_the_next_call_comes(device: str) -> None:
    runner = GraphRunner(model_on(device))
    first = runner(**inputs(device, 1, 2, 8, 4))
    kept = first.answer_embed.clone()
    runner(**inputs(device, 1, 2, 8, 3))
    assert torch.equal(first.answer_embed, kept)


@devices
def test_changed_weights_and_times_count(device: str) -> None:
    model, given = model_on(device), inputs(device, 1, 2, 8, 4)
    runner = GraphRunner(model)
    runner(**given)
    with torch.no_grad():
        model.sampler.score.weight.mul_(-3)
    times = torch.linspace(0, 0.4, 8, device=device)[None]
    with torch.inference_mode():
        expected = model(**given, times=times, pick=5)
    assert_near(runner(**given, times=times, pick=5), expected)


@devices
def test_sizes_share_buckets_and_old_buckets_go(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("videodistill.engine.graphs._GRAPHS", 2)
    runner = GraphRunner(model_on(device))
    for tokens in (5, 6, 7, 8):
        runner(**inputs(device, 1, 3, 8, tokens))
    assert len(runner._buckets) == 1
    for frames in (3, 20, 40):
        runner(**inputs(device, 1, 1, frames, 4))
    assert len(runner._buckets) == 2


def test_bad_calls_are_refused() -> None:
    model = model_on("cpu")
    runner = GraphRunner(model)
    with pytest.raises(ValueError, match="5 questions cannot be shared evenly by 2 videos"):
        runner(**(inputs("cpu", 2, 3, 8, 4) | {"text_embed": torch.randn(5, 16)}))
    with pytest.raises(ValueError, match="pick must be between 1 and the 8 frames, got 9"):
        runner(**inputs("cpu", 1, 1, 8, 4), pick=9)
    with pytest.raises(ValueError, match="training mode"):
        GraphRunner(model.train())(**inputs("cpu", 1, 1, 8, 4))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.device_count(), reason="torch sees no CUDA device")
def test_nothing_waits_for_the_device() -> None:
    runner, given = GraphRunner(model_on("cuda")), inputs("cuda", 1, 3, 11, 5)
    runner(**given)
    torch.cuda.set_sync_debug_mode("error")
    try:
        runner(**given)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_graphs_are_captured_and_replayed_on_the_models_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """While another is current. Fakes stand for the GPUs: tensors say that they are on one."""
    current, seen = ["another"], []

    @contextlib.contextmanager
    def device(wanted: torch.device) -> Iterator[None]:
        current.append(wanted.type)
        yield
        current.pop()

    def note(what: str) -> Callable[..., MagicMock]:
        def call(*_: Any, **__: Any) -> MagicMock:
            seen.append((what, current[-1]))
            return MagicMock()

        return call

    class Graph:
        pool = replay = note("replay")

    captured = ("Stream", "current_stream", "stream", "graph")
    for name in captured:
        monkeypatch.setattr(torch.cuda, name, note(name))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "device", device)
    x, given = torch.zeros(2, 8), inputs("cpu", 1, 2, 8, 4)
    model = MagicMock(training=False, config=CONFIG)
    model.return_value = VideoDistillOutput(x, x, TopKSample(x, x, x), x)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True, raising=False)
    GraphRunner(model)(**given)
    assert {what for what, _ in seen} == {*captured, "replay"}
    assert {where for _, where in seen} == {"cpu"}
