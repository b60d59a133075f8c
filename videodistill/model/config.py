"""Everything that decides a VideoDistill model but its weights."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class VideoDistillConfig:
    """Sizes, choices and the encoder that a head was made for.

    The defaults are the reference configuration of the benchmarks, on CLIP ViT-B/16.

    Raises:
        ValueError: A field is out of range, or two do not go together.
    """

    embed_dim: int = 512
    """Width of the encoder's joint space (C_a)."""
    patch_dim: int = 768
    """Width of its patches (C_v)."""
    token_dim: int = 512
    """Width of its question tokens (C_t)."""
    patch_grid: tuple[int, int] = (14, 14)
    """Rows and columns of patches in a frame."""

    width: int = 768
    heads: int = 12
    sampler_blocks: int = 2
    time_prior: float = 3.0
    """How much each head of the sampler prefers frames at a distance of its own before training,
    in units of attention scores; see ``RotaryTime.look_aside``. 0: not at all."""
    refiner_blocks: int = 2
    ffn_ratio: int = 4
    merge: int = 1
    """The refiner sees ``merge`` × ``merge`` neighbouring patches as one token."""
    mixing: str = "gate"
    """How the question meets vision: "gate", or the control "cross_attention", which adds what the
    question's tokens say to the visual ones."""
    gate: str = "scalar"
    """"scalar": one gate per token and head; "channel": one per channel."""

    frames: int = 32
    """Candidate frames that a video is sampled at (N) unless the caller says otherwise."""
    pick: int = 8
    """Frames that the sampler keeps (K)."""
    frame_choice: str = "learned"
    """"learned", or the controls it is compared with: "uniform", "random", and "mean", which takes
    the mean of all candidates for one frame."""
    sampling: str = "perturbed"
    """How frames are drawn in training: "perturbed", "gumbel", "lapsum", or "hard", which takes the
    K best as inference does and sends the sampler no gradient from the answer. "soft" mixes frames
    by K Gumbel-softmax draws with replacement, in inference, too (Gao et al. 2023, MIST)."""
    gradient: str = "exact"
    """Of "perturbed": "exact", or "diagonal" as published code has it; see ``topk_sample``."""
    sigma: float = 0.1
    """Size of the draw's noise, in units of the standard deviation of a video's frame scores."""
    num_samples: int = 64
    temperature: float = 1.0
    """Of "gumbel", "lapsum" and "soft", in units of sigma."""

    logit_scale: float = 100.0
    """Turns cosines with answers into logits: the encoder's own."""
    choice_template: str = "{}"
    """What an answer is put into before the encoder's text tower sees it."""
    answers: list[str] = field(default_factory=list)
    """The vocabulary of open-ended answers that the classifier was trained on; may be empty."""

    encoder: str = ""
    """Hub id, or folder beside config.json, of the encoder; empty when none is named."""
    encoder_fingerprint: str = ""
    """What its weights must hash to; empty accepts any encoder of the right sizes."""

    def __post_init__(self) -> None:
        for name in (
            "embed_dim",
            "patch_dim",
            "token_dim",
            "width",
            "heads",
            "sampler_blocks",
            "refiner_blocks",
            "ffn_ratio",
            "frames",
            "pick",
            "merge",
            "num_samples",
        ):
            if not _is_count(getattr(self, name)):
                raise ValueError(f"{name} must be a positive integer, not {getattr(self, name)!r}")
        for name in ("sigma", "temperature", "logit_scale"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or not 0 < value < float("inf"):
                raise ValueError(f"{name} must be a positive number, not {value!r}")
        prior = self.time_prior
        if not isinstance(prior, (int, float)) or not 0 <= prior < float("inf"):
            raise ValueError(f"time_prior must be a number of at least 0, not {prior!r}")
        self.patch_grid = tuple(self.patch_grid)
        if len(self.patch_grid) != 2 or not all(map(_is_count, self.patch_grid)):
            raise ValueError(f"patch_grid must be two positive integers, not {self.patch_grid!r}")
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        if self.width // self.heads % 2:
            raise ValueError(f"width {self.width} over heads {self.heads} is odd: make it even")
        if any(side % self.merge for side in self.patch_grid):
            raise ValueError(f"merge {self.merge} does not divide patch_grid {self.patch_grid}")
        allowed = {
            "mixing": ("gate", "cross_attention"),
            "gate": ("scalar", "channel"),
            "frame_choice": ("learned", "uniform", "random", "mean"),
            "sampling": ("perturbed", "gumbel", "lapsum", "soft", "hard"),
            "gradient": ("exact", "diagonal"),
        }
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                raise ValueError(f"{name} must be one of {values}, not {getattr(self, name)!r}")


def _is_count(value: object) -> bool:
    return isinstance(value, int) and value >= 1
