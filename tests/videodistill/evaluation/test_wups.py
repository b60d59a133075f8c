"""WUPS with a small taxonomy made by hand."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

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


class _Sense:
    def __init__(self, name: str):
        self.name = name

    def pos(self) -> str:
        return "v" if self.name == "run" else "n"

    def wup_similarity(self, other: _Sense, simulate_root: bool = True) -> float | None:
        return TAXONOMY.similarity(self.name, other.name) or (0.125 if simulate_root else None)


def _stand_in(tags: dict[str, str], missing: bool = False) -> dict[str, ModuleType]:
    """Modules with the part of nltk that is used, over the taxonomy above."""
    nltk, corpus, stem = (ModuleType(n) for n in ("nltk", "nltk.corpus", "nltk.stem"))

    def word_tokenize(text: str) -> list[str]:
        if missing:
            raise LookupError("Resource punkt not found.")
        return text.split()

    nltk.word_tokenize = word_tokenize
    nltk.pos_tag = lambda words: [(word, tags.get(word, "NN")) for word in words]
    senses = {*_PARENTS, "run"}
    corpus.wordnet = SimpleNamespace(
        synsets=lambda word: [_Sense(word), _Sense("toy")] if word in senses else []
    )
    forms = {("dogs", "n"): "dog", ("ran", "v"): "run", ("puppies", "n"): "puppie"}
    lemmatise = SimpleNamespace(lemmatize=lambda word, pos: forms.get((word, pos), word))
    stem.WordNetLemmatizer = lambda: lemmatise
    stem.PorterStemmer = lambda: SimpleNamespace(stem=lambda word: word.replace("pies", "py"))
    return {"nltk": nltk, "nltk.corpus": corpus, "nltk.stem": stem}


def test_wordnet_lemmas_and_first_senses(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, module in _stand_in({"ran": "VBD", "Dogs": "NNS", "the": "DT"}).items():
        monkeypatch.setitem(sys.modules, name, module)
    lexicon = WordNet()
    # By part of speech; by stem, where the lemma is unknown; as it is, where both are.
    assert lexicon.lemmas("the Dogs ran puppies") == ["the", "dog", "run", "puppy"]
    assert lexicon.similarity("dog", "cat") == pytest.approx(4 / 6)
    assert lexicon.similarity("dog", "the") == lexicon.similarity("dog", "run") == 0
    assert lexicon.similarity("run", "dog") == 0.125  # only verbs have a root above all others


def test_without_its_data_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, module in _stand_in({}, missing=True).items():
        monkeypatch.setitem(sys.modules, name, module)
    with pytest.raises(UserError, match=r"nltk lacks data .* nltk\.downloader wordnet"):
        WordNet()
