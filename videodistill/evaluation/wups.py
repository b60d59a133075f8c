"""WUPS, the score of NExT-QA's open-ended answers: how near are two texts in a taxonomy?"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Protocol

from videodistill.errors import UserError

_INSTALL = (
    "pip install nltk, then python -m nltk.downloader wordnet omw-1.4 punkt punkt_tab "
    "averaged_perceptron_tagger averaged_perceptron_tagger_eng"
)


class Lexicon(Protocol):
    """What WUPS needs to know of a language."""

    def lemmas(self, text: str) -> list[str]:
        """The words of a text, each in its basic form."""

    def similarity(self, one: str, other: str) -> float:
        """Wu-Palmer similarity of two words' first senses, from 0 to 1; 0 for unknown words.

        It need not be symmetric.
        """


def content_words(text: str, lexicon: Lexicon, stop_words: Collection[str]) -> list[str]:
    """The lemmas of a text without stop words; what is a stop word is asked of the lemma."""
    return [word for word in lexicon.lemmas(text) if word not in stop_words]


def wups(one: Sequence[str], other: Sequence[str], lexicon: Lexicon) -> float:
    """The lower one of both directions' product of each word's best similarity.

    After NExT-QA's evaluator: a word that resembles none of the other text is left out of the
    product, where the original WUPS makes the whole product zero. It is zero if no word is left.
    """
    return min(_one_way(one, other, lexicon), _one_way(other, one, lexicon))


def _one_way(words: Sequence[str], others: Sequence[str], lexicon: Lexicon) -> float:
    best = [
        max((1.0 if word == o else lexicon.similarity(word, o) for o in others), default=0.0)
        for word in words
    ]
    product, some = 1.0, False
    for similarity in best:
        if similarity > 0:
            product, some = product * similarity, True
    return product if some else 0.0


class WordNet:
    """English through nltk's WordNet, lemmatised as pywsd does, which NExT-QA's evaluator uses.

    Raises:
        UserError: nltk or one of its data sets is not installed.
    """

    def __init__(self) -> None:
        try:
            import nltk
            from nltk.corpus import wordnet
            from nltk.stem import PorterStemmer, WordNetLemmatizer
        except ImportError:
            raise UserError(
                f"WUPS needs nltk with WordNet, which is not installed: {_INSTALL}"
            ) from None
        self._tag: Callable[[list[str]], list[tuple[str, str]]] = nltk.pos_tag
        self._split, self._wordnet = nltk.word_tokenize, wordnet
        self._lemmatise, self._stem = WordNetLemmatizer().lemmatize, PorterStemmer().stem
        self._known: dict[tuple[str, str], float] = {}
        try:
            self.similarity("man", "woman")
            self.lemmas("two men")
        except LookupError:
            raise UserError(f"nltk lacks data that WUPS needs: {_INSTALL}") from None

    def lemmas(self, text: str) -> list[str]:
        """Each word's lemma as the part of speech that it is tagged as; if WordNet does not know
        that, its stem; if it does not know that either, the word."""
        return [self._lemma(word.lower(), tag) for word, tag in self._tag(self._split(text))]

    def _lemma(self, word: str, tag: str) -> str:
        part = _PARTS.get(tag[:2]) or _PARTS.get(self._tag([word])[0][1][:2], "n")
        for form in (self._lemmatise(word, part), self._stem(word)):
            if self._wordnet.synsets(form):
                return form
        return word

    def similarity(self, one: str, other: str) -> float:
        """Of the first senses that WordNet lists, as nltk had it when NExT-QA was published.

        A root above all taxonomies is there for a verb as the first word, never for others; later
        versions of nltk add it for either word, which lowers the scores by a point.
        """
        if (one, other) not in self._known:
            first, second = self._wordnet.synsets(one), self._wordnet.synsets(other)
            value = None
            if first and second:
                root = first[0].pos() == "v"
                value = first[0].wup_similarity(second[0], simulate_root=root)
            self._known[one, other] = value or 0.0
        return self._known[one, other]


_PARTS = {"NN": "n", "JJ": "a", "VB": "v", "RB": "r"}
