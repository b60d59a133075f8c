"""WUPS with a small taxonomy made by hand."""

from __future__ import annotations

import sys

import pytest

from videodistill.errors import UserError
from videodistill.evaluation.wups import WordNet, content_words, wups

_PARENTS = {
    "animal": "thing",
    "dog": "animal",
    "cat": "animal",
    "puppy": "dog",
    "toy": "thing",
    "ball": "toy",
}


class Taxonomy:
    """Everything is a thing; "dogs" are more than one dog."""

    def lemmas(self, text: str) -> list[str]:
        return [word.removesuffix("s") for word in text.lower().split()]

    def similarity(self, one: str, other: str) -> float:
        """Twice the depth of the nearest common ancestor by the sum of depths; the root has 1."""
        above, others = self._line(one), self._line(other)
        common = next((word for word in above if word in others), None)
        return 2 * len(self._line(common)) / (len(above) + len(others)) if common else 0.0

    def _line(self, word: str) -> list[str]:
        line = [word] if word in _PARENTS or word == "thing" else []
        while line and line[-1] != "thing":
            line.append(_PARENTS[line[-1]])
        return line


TAXONOMY = Taxonomy()


def similar(one: str, other: str) -> float:
    return wups(one.split(), other.split(), TAXONOMY)


def test_one_word() -> None:
    assert similar("dog", "dog") == 1
    assert similar("dog", "cat") == similar("cat", "dog") == pytest.approx(4 / 6)
    assert similar("puppy", "dog") == pytest.approx(6 / 7)
    assert similar("dog", "ball") == pytest.approx(2 / 6)


def test_the_lower_direction_counts() -> None:
    # "dog" finds itself among the two; of the two, "ball" finds the dog at 1/3.
    assert similar("dog", "dog ball") == similar("dog ball", "dog") == pytest.approx(1 / 3)


def test_each_word_takes_its_best() -> None:
    assert similar("cat ball", "ball dog") == pytest.approx(4 / 6)


def test_words_like_none_of_the_others_are_left_out() -> None:
    assert similar("dog", "dog xyzzy") == 1
    assert similar("xyzzy", "xyzzy") == 1  # the same word needs no sense
    assert similar("dog xyzzy", "cat plugh") == pytest.approx(4 / 6)
    assert similar("xyzzy", "dog") == 0


def test_nothing_is_like_nothing() -> None:
    assert similar("", "dog") == similar("dog", "") == similar("", "") == 0


def test_stop_words_are_found_by_lemma() -> None:
    words = content_words("The dogs with balls", TAXONOMY, {"the", "with", "ball", "dogs"})
    assert words == ["dog"]


def test_without_nltk_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nltk", None)
    with pytest.raises(UserError, match=r"pip install nltk, then python -m nltk\.downloader") as e:
        WordNet()
    assert "\n" not in str(e.value)
