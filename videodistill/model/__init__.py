"""VideoDistill: think (sampler), observe (refiner), answer; see docs/model.md."""

from videodistill.model.config import VideoDistillConfig
from videodistill.model.videodistill import VideoDistill, VideoDistillOutput

__all__ = ["VideoDistill", "VideoDistillConfig", "VideoDistillOutput"]
