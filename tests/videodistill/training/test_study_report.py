"""The study's page says what results say, and the committed page is what committed results give."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from videodistill.data.procedural.questions import FAMILIES
from videodistill.errors import UserError
from videodistill.training.study import ARMS, StudyRecipe
from videodistill.training.study_report import blind, load_results, study_page, write_report

DOCS = Path(__file__).resolve().parents[3] / "docs"
RECIPE = StudyRecipe()


def made_up(arm: str, seed: int, accuracy: float, **changes) -> dict:
    def group(value: float) -> dict:
        return {"questions": 8, "accuracy": value, "choice": 60.0, "evidence": 90.0, "covered": 80}

    groups = {name: group(accuracy) for name in (*FAMILIES, "direct", "all")}
    groups["indirect"] = group(accuracy - 4)
    results = {name: groups for name in ("test", "blank", "shuffled")}
    results["test-reversed"] = {"all": group(accuracy - 10)}
    results["grounding"] = {"mIoP": 31.25, "mIoU": 20.0, "Acc@GQA": 15.0}
    results |= {f"K={pick}": group(accuracy - pick) for pick in RECIPE.picks}
    results |= {f"N={count}": group(accuracy - count / 64) for count in RECIPE.offered}
    study = {
        "data_version": "1",
        "data_seed": 23,
        "bias": 0.5,
        "encoder": "feedbeef",
        "videos": {"test": [3, 64]},
    }
    return {
        "key": "0",
        "arm": arm,
        "seed": seed,
        "settings": {
            "study": study,
            "arm": ARMS[arm].settings,
            "head": json.loads(json.dumps(ARMS[arm].head(RECIPE.head).schedule())),
            "rate": 0.002,
            "products": "bfloat16",
        },
        "commit": "0123456789abcdef",
        "date": "2000-01-02",
        "parameters": 1234567,
        "tuning": {"0.001": 41.0, "0.002": 42.5},
        "seconds": {"tuning": 600.0, "training": 1200.0, "testing": 60.0},
        "val": group(55.0),
        "results": results,
    } | changes


def write(out: Path, *records: dict) -> None:
    (out / "study").mkdir(exist_ok=True)
    for record in records:
        path = out / "study" / f"{record['arm']}-{record['seed']}.json"
        path.write_text(json.dumps(record))


def page_of(out: Path) -> str:
    write_report(out, recipe=RECIPE, arms=ARMS)
    return (out / "study.md").read_text()


def lines_of(page: str, section: str) -> list[str]:
    return page.partition(f"## {section}\n")[2].partition("\n## ")[0].splitlines()


def arms_in(page: str, section: str) -> list[str]:
    """The first cells of a section's table."""
    table = [line for line in lines_of(page, section) if line.startswith("| ")]
    return [line.split("|")[1].strip() for line in table[2:]]


def row(page: str, section: str, arm: str) -> list[str]:
    """The cells after the first of an arm's row in the table of a section."""
    (found,) = [line for line in lines_of(page, section) if line.startswith(f"| {arm} ")]
    return [cell.strip() for cell in found.strip("|").split("|")][1:]


def test_cells_are_means_and_spreads(tmp_path):
    write(tmp_path, made_up("videodistill", 1, 70.0), made_up("videodistill", 2, 72.0))
    write(tmp_path, made_up("mean", 1, 30.0))
    (tmp_path / "study" / "question-only.json").write_text(
        json.dumps({"results": {"test": {"all": 50.0}, "test-reversed": {"all": 8.0}}})
    )
    page = page_of(tmp_path)
    ours, mean = "VideoDistill", "mean pooling"
    assert row(page, "Accuracy", ours) == [*["71.0 ± 1.4"] * 9, "60.0 ± 0.0"]
    assert row(page, "Accuracy", mean) == [*["30.0"] * 9, "60.0"]
    assert arms_in(page, "Accuracy") == [ours, mean]
    assert len(arms_in(page, "Arms")) == 13
    assert row(page, "Arms", "uniform frames")[1:] == ["not yet run"] * 6
    assert row(page, "Evidence", mean) == ["90.0", "80.0", "31.2", "20.0", "15.0"]
    assert row(page, "Shortcuts", mean) == [
        *["30.0", "20.0", "10.0"],
        *["30.0", "26.0", "4.0"],
        *["30.0", "30.0"],
    ]
    assert "words alone: 50.0 in distribution, 8.0 with the prior reversed" in page
    assert row(page, "Number of chosen frames", mean) == ["29.0", "28.0", "26.0", "22.0", "14.0"]
    assert row(page, "Number of candidate frames", mean)[-1] == "14.0"
    assert row(page, "Short and long videos", mean) == ["30.0", "29.0", "90.0", "90.0"]
    about, size, rate, val, products, minutes, seeds = row(page, "Arms", ours)
    assert about == ARMS["videodistill"].about and size == "1,234,567"
    assert rate == "0.002 (0.001 41.0, 0.002 42.5)" and val == "55.0 ± 0.0"
    assert products == "bfloat16" and minutes == "20.0 ± 0.0" and seeds == "1, 2"
    assert "Results of 2 of 13 arms" in page and "commit 0123456789, 2000-01-02" in page
    # Tuned once: 2 arms of 10 minutes; 3 trainings of 20; 3 tests of 1.
    assert "tuning 20, training 60, testing 3; 1.4 core-hours" in page
    for name in ("study-k.png", "study-n.png", "study-shortcut.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
        assert f"({name})" in page


def test_claims_are_judged_by_margin_and_seeds(tmp_path):
    write(tmp_path, *(made_up("videodistill", seed, 70.0 + seed) for seed in (1, 2, 3)))
    write(tmp_path, *(made_up("cross-attention-uniform", seed, 50.0 + seed) for seed in (1, 2, 3)))
    write(tmp_path, *(made_up("cross-attention", seed, 75.0 + seed) for seed in (1, 2, 3)))
    write(tmp_path, *(made_up("gumbel", seed, 60.0 + 9 * seed) for seed in (1, 2)))
    in_float32 = made_up("uniform", 1, 20.0)
    in_float32["settings"]["products"] = "float32"
    write(tmp_path, in_float32)
    page = page_of(tmp_path)

    def verdict(claim: str) -> list[str]:
        section = lines_of(page, "What was claimed, and what was found")
        (line,) = [line for line in section if claim in line]
        return [cell.strip() for cell in line.strip("|").split("|")][1:]

    # N = 64 costs a point, of both; three seeds of deviation 1 on either side: 1 / √3 · √2.
    assert verdict("at least 10 points") == ["71.0 ± 1.0", "51.0 ± 1.0", "+20.0 ± 0.8: confirmed"]
    assert verdict("half as much") == ["10.0 ± 0.0", "10.0 ± 0.0", "-5.0 ± 0.0: refuted"]
    assert verdict("gates are better") == ["72.0 ± 1.0", "77.0 ± 1.0", "-5.0 ± 0.8: refuted"]
    assert verdict("evidence in training helps")[2] == "-1.5 ± 4.5: open"
    precisions = "; bfloat16 against float32"
    assert verdict("better than uniform ones") == [
        "72.0 ± 1.0",
        "20.0",
        "+52.0: open" + precisions,
    ]
    assert verdict("exact gradient") == ["not yet run"] * 3
    # 1,024 / 64 points less than at 64, by every seed.
    assert verdict("cost at most") == ["56.0 ± 1.0", "71.0 ± 1.0", "-15.0 ± 0.0: refuted"]


def test_results_of_other_settings_are_left_out(tmp_path):
    older = made_up("mean", 1, 30.0)
    older["settings"]["study"]["data_seed"] = 5
    older["date"] = "1999-01-01"
    was_set_otherwise = made_up("soft", 1, 30.0)
    was_set_otherwise["settings"]["arm"] = {"model": {}, "guided": False}
    took_fewer_steps = made_up("gumbel", 1, 30.0)
    took_fewer_steps["settings"]["head"]["steps"] -= 1
    write(tmp_path, made_up("uniform", 1, 20.0), older, was_set_otherwise, took_fewer_steps)
    page = page_of(tmp_path)
    assert row(page, "Accuracy", "uniform frames")[0] == "20.0"
    assert arms_in(page, "Accuracy") == ["uniform frames"]
    assert "3 results of other settings are left out" in page


def test_results_of_the_recipe_itself_stand_above_others(tmp_path):
    own = made_up("mean", 1, 40.0)
    own["settings"]["study"]["videos"] = json.loads(json.dumps(RECIPE.videos))
    unknown_schedule = made_up("gumbel", 1, 60.0)
    del unknown_schedule["settings"]["head"]
    newer = made_up("cross-attention", 1, 30.0, date="2000-01-03")
    write(tmp_path, own, newer, unknown_schedule)
    page = page_of(tmp_path)
    assert row(page, "Accuracy", "mean pooling")[0] == "40.0"
    assert arms_in(page, "Accuracy") == ["mean pooling"]
    assert "2 results of other settings are left out" in page


def test_what_was_not_asked_of_a_model_is_not_invented(tmp_path):
    record = made_up("mean", 1, 30.0)
    del record["results"]["K=8"]
    write(tmp_path, record)
    cells = row(page_of(tmp_path), "Number of chosen frames", "mean pooling")
    assert cells == ["29.0", "28.0", "26.0", "not yet run", "14.0"]


def test_without_results(tmp_path):
    (tmp_path / "study-k.png").touch()
    page = page_of(tmp_path)
    assert "The study was not yet run." in page and "## Cost" not in page and "png" not in page
    assert "## Accuracy" not in page and len(arms_in(page, "Arms")) == 13
    assert [path.name for path in tmp_path.iterdir()] == ["study.md"]


def test_a_damaged_result_is_named(tmp_path):
    write(tmp_path, made_up("mean", 1, 30.0))
    (tmp_path / "study" / "mean-1.json").write_text("{")
    with pytest.raises(UserError, match=r"mean-1\.json"):
        page_of(tmp_path)


def test_the_committed_page_is_what_the_committed_results_give():
    found, others = load_results(DOCS, StudyRecipe(), ARMS)
    page = study_page(found, others, blind(DOCS), RECIPE, ARMS)
    assert (DOCS / "study.md").read_text(encoding="utf-8") == page
