"""The bundled model's card, written from what was measured."""

from __future__ import annotations

from typing import Any

from videodistill.data.procedural.questions import FAMILIES

_ARMS = {
    "videodistill": "VideoDistill (bundled)",
    "unsupervised": "the same, no evidence supervision",
    "uniform": "the same, trained on uniform frames",
}
_SHOWN = {
    "uniform frames": "bundled, shown uniform frames",
    "blank video": "bundled, shown a blank video",
    "shuffled video": "bundled, shown another video",
}
_ROWS = (*FAMILIES, "direct", "indirect", "all")


def model_card(record: dict[str, Any]) -> str:
    """Markdown for ``README.md`` beside the weights.

    Args:
        record: What ``training.json`` holds; see ``default_model.train_default``.
    """
    settings = record["settings"]
    videos = ", ".join(
        f"{name}: {count} of {frames} frames"
        for name, (count, frames) in settings["videos"].items()
    )
    head = record["arms"]["videodistill"]
    seconds = record["seconds"] | {"head": head["seconds"]}
    encoder, arms = record["encoder"], record["arms"]
    commands = ["make default-model"]
    if len(arms) > 1:
        commands += ["videodistill train-default --controls   # trains what it is compared with"]
    observing = " and ".join(
        f"{steps:,} with {pick} frame{'s' * (pick > 1)}"
        for steps, pick in settings["head"]["observing"]
    )
    lines = [
        "---",
        "library_name: videodistill",
        "license: apache-2.0",
        "tags: [video-question-answering]",
        "---",
        "",
        "# The bundled VideoDistill model",
        "",
        "A small CLIP and a VideoDistill head, both trained from nothing on the procedural",
        "benchmark: drawn shapes that visit, carry, strike and change colour. It shows what the",
        "engine does and serves its tests; it knows nothing of real videos. For those, use",
        "`--zero-shot` with a real CLIP or SigLIP as `--encoder`.",
        "",
        "The sampler was trained with the generator's own evidence stretches as a further signal",
        f"(weight {settings['head']['evidence_weight']})"
        + ("; the table shows the same model without." if "unsupervised" in arms else "."),
        "",
        "## Made by",
        "",
        "```",
        *commands,
        "```",
        "",
        f"Data version {settings['data_version']}, data seed {settings['seed']}, encoder seed "
        f"{settings['clip']['seed']}, head seed {settings['head']['seed']}. Videos: {videos}. The "
        "test splits have seeds of their own.",
        f"Encoder: {encoder['frames']:,} painted frames, {encoder['steps']:,} steps; area under "
        f"the ROC curve of colour-shape pairs {encoder['auc_frame_pairs']:.3f} by frame and "
        f"{encoder['auc_patch_pairs']:.3f} by best patch. Head: "
        f"{settings['head']['thinking_steps']:,} steps of the sampler alone, {observing} of "
        f"refiner and answer head on ground-truth frames, {settings['head']['steps']:,} of all.",
        "Time on a shared machine with 2 cores: "
        + ", ".join(f"{stage} {value} s" for stage, value in seconds.items())
        + ".",
        "",
        "## Accuracy",
        "",
        "Percent of open-ended answers right on the split `test`, by question family. *Question",
        "only* is another model, trained on the words of the questions alone.",
        "",
        *_accuracy_table(record),
        "",
        "## Robustness",
        "",
        *_robustness_table(head["results"], settings),
        "",
        "*Evidence*: percent of the questions with evidence for which a chosen frame lies in it.",
        "*Choices*: accuracy with five choices, by cosine with their text embeddings.",
        "",
    ]
    return "\n".join(lines)


def _accuracy_table(record: dict[str, Any]) -> list[str]:
    arms = {name: title for name, title in _ARMS.items() if name in record["arms"]}
    ours = record["arms"]["videodistill"]["results"]
    shown = {name: title for name, title in _SHOWN.items() if name in ours}
    header = ["family", *arms.values(), *shown.values(), "question only"]
    rows = [header, ["---"] + ["---:"] * (len(header) - 1)]
    question_only = record["blind"]["question_only"]
    for family in _ROWS:
        cells = [family]
        for name in arms:
            cells.append(f"{record['arms'][name]['results']['test'][family]['accuracy']:.1f}")
        cells += [f"{ours[name][family]['accuracy']:.1f}" for name in shown]
        cells.append(f"{question_only[family]:.1f}" if family in question_only else "")
        rows.append(cells)
    return ["| " + " | ".join(row) + " |" for row in rows]


def _robustness_table(results: dict[str, Any], settings: dict[str, Any]) -> list[str]:
    rows = [["videos", "frames", "candidates", "chosen", "accuracy", "choices", "evidence"]]
    rows.append(["---"] + ["---:"] * 6)
    for name, report in results.items():
        split, _, pick = name.partition(", K=")
        if split not in settings["videos"] or not split.startswith("test"):
            continue
        candidates = settings["candidates"].get(split, settings["model"]["frames"])
        total = report["all"]
        rows.append(
            [
                split,
                str(settings["videos"][split][1]),
                str(candidates),
                pick or str(settings["model"]["pick"]),
                *(f"{total[what]:.1f}" for what in ("accuracy", "choice", "evidence")),
            ]
        )
    return ["| " + " | ".join(row) + " |" for row in rows]
