"""The study's page and plots, written from what was measured."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from videodistill.data.files import clear_errors, read_json, write_whole
from videodistill.data.procedural.questions import FAMILIES

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from videodistill.training.study import Arm, StudyRecipe

_NOT_RUN = "not yet run"
_Record = dict[str, Any]
_ByArm = dict[str, list[_Record]]


def write_report(out: Path, *, recipe: StudyRecipe, arms: Mapping[str, Arm]) -> list[Path]:
    """Write ``study.md`` and its plots beside the results in ``out``/study.

    Args:
        out: The folder; without results the page says that nothing was run.
        recipe: Says at which K and N there are columns. A result of another schedule of training
            is left out.
        arms: In the order of the rows. A result of an arm that was set otherwise is left out.

    Returns:
        The files written.

    Raises:
        UserError: A result cannot be read, or the page cannot be written.
    """
    found, others = load_results(out, recipe, arms)
    page = out / "study.md"
    with clear_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        write_whole(page, study_page(found, others, blind(out), recipe, arms))
        return [page, *_draw(out, found, recipe, arms)]


def load_results(out: Path, recipe: StudyRecipe, arms: Mapping[str, Arm]) -> tuple[_ByArm, int]:
    """Results by arm, in the order of their seeds, and how many more there are of other settings.

    Shown together are those that have everything in common but arm, seed and learning rate, and
    follow the recipe's schedule: the group that follows all of the recipe, or else the one with the
    newest result.
    """
    groups: dict[str, list[_Record]] = {}
    count = 0
    for path in sorted((out / "study").glob("*-*.json")):
        record = read_json(path, dict)
        if "arm" not in record:  # of the questions alone
            continue
        count += 1
        arm = arms.get(record["arm"])
        if arm is None or record["settings"]["arm"] != _as_json(arm.settings):
            continue
        head = record["settings"].get("head")
        if head is None:  # before schedules were noted
            continue
        expected = replace(
            arm.head(recipe.head), learning_rate=head["learning_rate"], seed=head["seed"]
        )
        if head == _as_json(expected.schedule()):
            common = json.dumps(record["settings"]["study"], sort_keys=True)
            groups.setdefault(common, []).append(record)
    own = _as_json(asdict(recipe))

    def rank(group: list[_Record]) -> tuple[bool, str]:
        study = group[0]["settings"]["study"]
        follows = all(study[name] == own[name] for name in study.keys() & own.keys())
        return follows, max(record["date"] for record in group)

    newest = max(groups.values(), key=rank, default=[])
    found = {name: [] for name in arms}
    for record in sorted(newest, key=lambda record: record["seed"]):
        found[record["arm"]].append(record)
    return found, count - len(newest)


def blind(out: Path) -> _Record:
    """What was measured of answering without the video; empty if nothing was."""
    path = out / "study" / "question-only.json"
    return read_json(path, dict)["results"] if path.exists() else {}


def study_page(
    found: _ByArm,
    others: int,
    blindly: _Record,
    recipe: StudyRecipe,
    arms: Mapping[str, Arm],
) -> str:
    """All of study.md."""
    records = [record for group in found.values() for record in group]
    parts = [
        "# Does language-awareness help?",
        "Made by `videodistill study --report-only` from the results in `docs/study`; `make study` "
        "runs what is missing of them, and goes on where it was stopped.",
        "Arms differ from VideoDistill in one thing each. They share the bundled encoder, videos, "
        "number of steps and of tuning runs; learning rates are chosen on the split `val`, and the "
        "test splits are opened once, after training. Videos are of the procedural benchmark, "
        "with a prior of answers that depends on the question's words and is reversed in "
        "`test-reversed`. *Guided* arms learn from the generator's evidence; the others spend "
        "those steps on answering alone. Matrix products of training are formed in what each arm's "
        "line says: `--precision`, or else bfloat16 where the processor has instructions for it. "
        "Numbers are means over seeds ± their standard deviation.",
        _state(records, found, others),
        "## What was claimed, and what was found",
        "Points of percent, over the seeds of both sides. *Confirmed*: the margin is at least what "
        "is claimed by two of its standard errors; *refuted*: it falls short by as much; *open*: "
        "neither, or one seed alone. The first two lines are what this project hopes for: their "
        "arms differ in gates, choice of frames and guidance at once, which the lines after them "
        "tell apart, as far as they were run.",
        _claims_table(found, recipe),
        "## Arms",
        _arms_table(found, arms),
    ]
    for title, text, columns in _sections(recipe) if records else []:
        parts.append(f"## {title}")
        parts += [text] if text else []
        parts.append(_table(["arm", *columns], _rows(found, arms, columns.values())))
        if title == "Shortcuts":
            parts.append(_blind_line(blindly))
    if records:
        parts += [f"![{title}]({file})" for file, title in _PLOTS.items()]
        parts += ["## Cost", _cost(records)]
    return "\n\n".join(parts) + "\n"


_Value = Callable[[_Record], float]


def _of(shown: str, what: str = "accuracy", group: str = "all") -> _Value:
    """One number of a result: what was shown, which group of questions, which measure."""
    return lambda record: record["results"][shown][group][what]


def _at(shown: str, what: str = "accuracy") -> _Value:
    """The same where a result has no groups."""
    return lambda record: record["results"][shown][what]


def _less(one: _Value, other: _Value) -> _Value:
    return lambda record: one(record) - other(record)


def _sections(recipe: StudyRecipe) -> list[tuple[str, str, dict[str, _Value]]]:
    """(Title, text, columns) of each table of percents."""
    direct, indirect = _of("test", group="direct"), _of("test", group="indirect")
    frames = {count for _, count in recipe.videos.values()}
    return [
        (
            "Accuracy",
            "Percent of open-ended answers right on `test`, by question family; *choices*: with "
            "five choices.",
            {family: _of("test", group=family) for family in FAMILIES}
            | {"all": _of("test"), "choices": _of("test", "choice")},
        ),
        (
            "Evidence",
            f"At K = {recipe.model['pick']}. *Recall*: percent of the questions with evidence for "
            "which a chosen frame lies in it; *all*: in every stretch of it. For mixtures of "
            "frames their largest part counts, for the mean of all the middle frame. *mIoP*, "
            "*mIoU* and *Acc@GQA* are NExT-GQA's, of the frames around the best one that have at "
            "least half its score; models without scores name the whole video.",
            {
                "recall": _of("test", "evidence"),
                "all": _of("test", "covered"),
                "mIoP": _at("grounding", "mIoP"),
                "mIoU": _at("grounding", "mIoU"),
                "Acc@GQA": _at("grounding", "Acc@GQA"),
            },
        ),
        (
            "Shortcuts",
            "Percent right on `test`, and what is lost where words mislead: with the prior "
            "reversed, with indirect references, with a blank or another video. A model that looks "
            "loses little by the first two and all by the last two.",
            {
                "in distribution": _of("test"),
                "reversed prior": _of("test-reversed"),
                "prior gap": _less(_of("test"), _of("test-reversed")),
                "direct": direct,
                "indirect": indirect,
                "reference gap": _less(direct, indirect),
                "blank video": _of("blank"),
                "other video": _of("shuffled"),
            },
        ),
        (
            "Number of chosen frames",
            f"Percent right on `test` by K; training had K = {recipe.model['pick']}.",
            {f"K = {pick}": _at(f"K={pick}") for pick in recipe.picks},
        ),
        (
            "Number of candidate frames",
            f"Percent right on `test-long`, videos of {max(frames)} frames, by N.",
            {f"N = {count}": _at(f"N={count}") for count in recipe.offered},
        ),
        (
            "Short and long videos",
            f"Percent right with N = {recipe.model['frames']} on videos of {min(frames)} frames "
            f"(`test`) and of {max(frames)} (`test-long`), and evidence recall there.",
            {
                "short": _of("test"),
                "long": _at(f"N={recipe.model['frames']}"),
                "short, recall": _of("test", "evidence"),
                "long, recall": _at(f"N={recipe.model['frames']}", "evidence"),
            },
        ),
    ]


class _Claim(NamedTuple):
    """That one arm's number is above ``share`` of another's by at least ``least``, or below it."""

    text: str
    one: tuple[str, _Value]
    other: tuple[str, _Value]
    least: float = 0.0
    share: float = 1.0
    below: bool = False


def _claims(recipe: StudyRecipe) -> list[_Claim]:
    ours, neither = "videodistill", "cross-attention-uniform"
    test, gap = _of("test"), _less(_of("test"), _of("test-reversed"))
    few, many = recipe.model["frames"], max(recipe.offered)
    long, offered_many = _at(f"N={few}"), _at(f"N={many}")

    def better(text: str, one: str, other: str, value: _Value = test, **more: Any) -> _Claim:
        return _Claim(text, (one, value), (other, value), **more)

    return [
        better(
            "long videos: at least 10 points better than cross-attention with uniform frames",
            *(ours, neither, long),
            least=10.0,
        ),
        better(
            "loses at most half as much as that to a reversed prior",
            *(ours, neither, gap),
            share=0.5,
            below=True,
        ),
        better("gates are better than cross-attention", ours, "cross-attention"),
        better(
            "gates lose less than cross-attention to a reversed prior",
            *(ours, "cross-attention", gap),
            below=True,
        ),
        better("chosen frames are better than uniform ones", ours, "uniform"),
        better("so they are without evidence in training", "gumbel", "uniform"),
        better("chosen frames are better than the mean of all", ours, "mean"),
        better("a choice is better than soft draws with replacement", ours, "soft"),
        better("evidence in training helps", ours, "gumbel"),
        better("the exact gradient is better than the published one", "exact", "diagonal"),
        better("one gate for each channel is better than one for each head", "channel-gate", ours),
        _Claim(
            f"{many} candidates instead of {few} cost at most 2 points",
            *((ours, offered_many), (ours, long)),
            least=-2.0,
        ),
    ]


def _claims_table(found: _ByArm, recipe: StudyRecipe) -> str:
    rows = []
    for claim in _claims(recipe):
        one, other = (_values(found[arm], value) for arm, value in (claim.one, claim.other))
        verdict = _NOT_RUN
        if one and other:
            # The same models twice: what their seeds differ by is no part of the margin.
            paired = claim.one[0] == claim.other[0] and len(one) == len(other)
            verdict = _verdict(claim, one, other, paired=paired)
            products = [_products(found[arm]) for arm, _ in (claim.one, claim.other)]
            if products[0] != products[1]:
                verdict += f"; {products[0]} against {products[1]}"
        rows.append([claim.text, _cell(one), _cell(other), verdict])
    return _table(["claim", "here", "there", "margin ± standard error"], rows)


def _verdict(claim: _Claim, one: Sequence[float], other: Sequence[float], *, paired: bool) -> str:
    other = [claim.share * value for value in other]
    margin = statistics.fmean(one) - statistics.fmean(other)
    margin = -margin if claim.below else margin
    if len(one) == 1 or len(other) == 1:
        return f"{margin:+.1f}: open"
    sides = [[a - b for a, b in zip(one, other, strict=True)]] if paired else [one, other]
    error = math.hypot(*(_spread(values) / len(values) ** 0.5 for values in sides))
    verdict = "open"
    if margin - 2 * error >= claim.least:
        verdict = "confirmed"
    elif margin + 2 * error < claim.least:
        verdict = "refuted"
    return f"{margin:+.1f} ± {error:.1f}: {verdict}"


def _state(records: Sequence[_Record], found: _ByArm, others: int) -> str:
    """Which results there are, and of what."""
    run = [name for name, group in found.items() if group]
    lines = [f"Results of {len(run)} of {len(found)} arms are there."]
    if records:
        study = records[0]["settings"]["study"]
        seeds = sorted({record["seed"] for record in records})
        commits = sorted({record["commit"][:10] for record in records})
        dates = sorted({record["date"] for record in records})
        videos = ", ".join(
            f"{name} {count} of {frames} frames"
            for name, (count, frames) in study["videos"].items()
        )
        lines.append(
            f"Data version {study['data_version']}, data seed {study['data_seed']}, bias "
            f"{study['bias']}; videos: {videos}. Encoder {study['encoder']}. Seeds "
            f"{', '.join(map(str, seeds))}; tested at commit {', '.join(commits)}, {dates[0]}"
            + (f" to {dates[-1]}." if len(dates) > 1 else ".")
        )
    else:
        lines.append("The study was not yet run.")
    if others:
        lines.append(f"{others} results of other settings are left out.")
    return " ".join(lines)


def _arms_table(found: _ByArm, arms: Mapping[str, Arm]) -> str:
    rows = []
    for name, arm in arms.items():
        row = [f"{arm.title} (`{name}`)", arm.about]
        group = found[name]
        if group:
            first = group[0]
            tuned = ", ".join(f"{rate} {value:.1f}" for rate, value in first["tuning"].items())
            row += [
                f"{first['parameters']:,}",
                f"{first['settings']['rate']:g} ({tuned})",
                _cell([record["val"]["accuracy"] for record in group]),
                _products(group),
                _cell([record["seconds"]["training"] / 60 for record in group]),
                ", ".join(str(record["seed"]) for record in group),
            ]
        else:
            row += [_NOT_RUN] * 6
        rows.append(row)
    heads = ["arm", "what it is", "parameters", "learning rate (val of each tried)", "val"]
    heads += ["products in", "training, CPU minutes", "seeds"]
    return _table(heads, rows, texts=2)


def _products(group: Sequence[_Record]) -> str:
    """What matrix products were formed in when these were trained."""
    return ", ".join(sorted({record["settings"]["products"] for record in group}))


def _rows(found: _ByArm, arms: Mapping[str, Arm], columns: Iterable[_Value]) -> list[list[str]]:
    columns = list(columns)
    return [
        [arm.title, *(_cell(_values(found[name], value)) for value in columns)]
        for name, arm in arms.items()
        if found[name]  # the table of arms says which are missing
    ]


def _values(group: Sequence[_Record], value: _Value) -> list[float]:
    """The number in each of the results that has it."""
    values = []
    for record in group:
        try:
            values.append(value(record))
        except KeyError:  # measured before this was asked
            continue
    return values


def _cell(values: Sequence[float]) -> str:
    if not values:
        return _NOT_RUN
    mean = f"{statistics.fmean(values):.1f}"
    return mean if len(values) == 1 else f"{mean} ± {_spread(values):.1f}"


def _blind_line(blindly: _Record) -> str:
    if not blindly:
        return f"A model of the questions' words alone: {_NOT_RUN}."
    return (
        f"A model of the questions' words alone: {blindly['test']['all']:.1f} in distribution, "
        f"{blindly['test-reversed']['all']:.1f} with the prior reversed."
    )


def _cost(records: Sequence[_Record]) -> str:
    """Minutes of one core that each stage took; a process that waits or is stopped uses none."""
    stages = ("tuning", "training", "testing")
    # An arm is tuned once, however many seeds are trained with what was found.
    tuned = {record["arm"]: record["seconds"]["tuning"] for record in records}
    spent = {stage: sum(record["seconds"][stage] for record in records) for stage in stages}
    spent["tuning"] = sum(tuned.values())
    total = sum(spent.values())
    return (
        "CPU minutes: "
        + ", ".join(f"{stage} {seconds / 60:.0f}" for stage, seconds in spent.items())
        + f"; {total / 3600:.1f} core-hours in all, videos and features not counted."
    )


def _table(heads: Iterable[str], rows: Iterable[Iterable[str]], texts: int = 1) -> str:
    """A table in Markdown; the first ``texts`` columns are text, the others numbers."""
    heads = list(heads)
    lines = [heads, ["---"] * texts + ["---:"] * (len(heads) - texts), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


_PLOTS = {
    "study-k.png": "accuracy against K",
    "study-n.png": "accuracy against N",
    "study-shortcut.png": "accuracy in distribution and with the prior reversed",
}


def _draw(out: Path, found: _ByArm, recipe: StudyRecipe, arms: Mapping[str, Arm]) -> list[Path]:
    """The plots, with the seeds' spread; none where nothing was run."""
    files = [out / file for file in _PLOTS]
    if not any(found.values()):
        for file in files:
            file.unlink(missing_ok=True)
        return []
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    draw = (
        lambda axes: _draw_curves(axes, "K", recipe.picks, found, arms),
        lambda axes: _draw_curves(axes, "N", recipe.offered, found, arms),
        lambda axes: _draw_gap(axes, found, arms),
    )
    for file, draw_one in zip(files, draw, strict=True):
        figure, axes = pyplot.subplots(figsize=(9, 6))
        draw_one(axes)
        axes.legend(fontsize="small", ncols=2)
        figure.tight_layout()
        figure.savefig(file, dpi=100, metadata={"Software": None})
        pyplot.close(figure)
    return files


def _draw_curves(
    axes: Axes, axis: str, sizes: Sequence[int], found: _ByArm, arms: Mapping[str, Arm]
) -> None:
    for number, (name, group) in enumerate(found.items()):
        points = [(size, _values(group, _at(f"{axis}={size}"))) for size in sizes]
        points = [(size, values) for size, values in points if values]
        if points:
            axes.errorbar(
                [size for size, _ in points],
                [statistics.fmean(values) for _, values in points],
                yerr=[_spread(values) for _, values in points],
                label=arms[name].title,
                linewidth=2.5 if number == 0 else 1.0,
                linestyle="-" if arms[name].guided else "--",
                marker="o",
                markersize=3,
                capsize=2,
                color=f"C{number}" if number < 10 else ("black", "navy", "olive")[number % 3],
            )
    axes.set(xscale="log", xlabel=axis, ylabel="percent right", ylim=(0, None))
    axes.set_xticks(list(sizes), [str(size) for size in sizes])
    axes.minorticks_off()


def _draw_gap(axes: Axes, found: _ByArm, arms: Mapping[str, Arm]) -> None:
    run = [name for name, group in found.items() if group]
    for place, (shown, label) in enumerate(
        {"test": "in distribution", "test-reversed": "prior reversed"}.items()
    ):
        values = [_values(found[name], _of(shown)) for name in run]
        axes.barh(
            [row + 0.4 * place for row in range(len(run))],
            [statistics.fmean(of) for of in values],
            xerr=[_spread(of) for of in values],
            height=0.4,
            label=label,
            capsize=2,
        )
    axes.set_yticks([row + 0.2 for row in range(len(run))], [arms[name].title for name in run])
    axes.set(xlabel="percent right", xlim=(0, None))
    axes.invert_yaxis()


def _spread(values: Sequence[float]) -> float:
    """Standard deviation; 0 of a single value."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def _as_json(value: Any) -> Any:
    return json.loads(json.dumps(value))
