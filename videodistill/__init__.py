"""VideoDistill: language-aware video question answering.

    import videodistill

    model = videodistill.load()
    for answer in model.answer("video.mp4", ["What happens first?", "Who is there?"]):
        print(answer.question, answer.answer, answer.confidence)

Names are imported when they are first used, so that `import videodistill` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vd_kernels._version import __version__ as __version__
    from videodistill.encoders import load_encoder as load_encoder
    from videodistill.engine.answerer import Answer as Answer
    from videodistill.engine.answerer import Answered as Answered
    from videodistill.engine.answerer import Answerer as Answerer
    from videodistill.engine.loading import load as load
    from videodistill.errors import UserError as UserError
    from videodistill.model import VideoDistill as VideoDistill
    from videodistill.model import VideoDistillConfig as VideoDistillConfig
    from videodistill.video import FrameReader as FrameReader

_HOMES = {
    "load": "videodistill.engine.loading",
    "Answerer": "videodistill.engine.answerer",
    "Answered": "videodistill.engine.answerer",
    "Answer": "videodistill.engine.answerer",
    "VideoDistill": "videodistill.model",
    "VideoDistillConfig": "videodistill.model",
    "FrameReader": "videodistill.video",
    "load_encoder": "videodistill.encoders",
    "UserError": "videodistill.errors",
    "__version__": "vd_kernels._version",
}

__all__ = [
    "Answer",
    "Answered",
    "Answerer",
    "FrameReader",
    "UserError",
    "VideoDistill",
    "VideoDistillConfig",
    "__version__",
    "load",
    "load_encoder",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
