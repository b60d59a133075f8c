"""What the documents show can be made again, and shows what their text says."""

from __future__ import annotations

import importlib.util
from pathlib import Path

DOCS = Path(__file__).resolve().parent.parent / "docs"


def test_more_samples_help_the_exact_gradient_alone(tmp_path) -> None:
    spec = importlib.util.spec_from_file_location("topk_gradient", DOCS / "topk_gradient.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)

    def median(samples: int, rule: str) -> float:
        return script.cosines(samples, rule, many=8000).median().item()

    assert median(512, "exact") > median(32, "exact") + 0.2
    assert median(512, "diagonal") < 0.9 < median(512, "exact")
