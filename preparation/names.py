"""Reads folder and file names: which words in them say good, defective, mask, training or test."""

import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from datasets.folders import MASK_WORDS
from preparation import vocabulary

GOOD, BAD, UNCLEAR = "good", "bad", "unclear"
TRAIN, TEST = "train", "test"
_MASK, _NOT, _FREE, _FILLER, _NUMBER, _OTHER = "mask", "not", "free", "filler", "number", "other"
_CLASS_NUMBER = re.compile(r"(?:class|cls|label|kind)?[ _-]*([01])", re.IGNORECASE)
# Hashes and UUIDs: letters and digits that alternate. Some of them hold "bad" by chance.
_RANDOM = re.compile(
    r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}|(?<![a-z0-9])[a-z]*(?:\d+[a-z]+){2,}\d*(?![a-z0-9])", re.IGNORECASE
)
_UNSPACED_FROM = "\u2e00"  # CJK, kana and Hangul: scripts whose words are not separated
_UNSPACED = rf"{_UNSPACED_FROM}-\U0010ffff"
# Letters of other scripts, of these, and digits: "OK图" is two words.
_TOKEN = re.compile(rf"[^\W\d_{_UNSPACED}]+|(?:(?=[{_UNSPACED}])[^\W\d_])+|\d+")


@dataclass(frozen=True)
class Name:
    """What the words of a name say.

    Args:
        kind: GOOD, BAD, UNCLEAR (words for both, or one that may mean either), or None.
        split: TRAIN, TEST, or None.
        mask: whether a word stands for masks.
        rest: the other words, such as the part's name or the kind of defect.
        core: `rest` with numbers, or what is left without it: the same for "Bad - crack" and "crack masks".
    """

    kind: str | None
    split: str | None
    mask: bool
    rest: tuple[str, ...]
    core: str

    @property
    def is_split(self) -> bool:
        """Whether it is the name of a training or test folder, and says nothing else."""
        return self.split is not None and not (self.kind or self.mask or self.rest)


@dataclass(frozen=True)
class _Word:
    text: str
    role: str
    # Whether it says good or defective and nothing else; "crack" says more.
    generic: bool = True


@lru_cache(maxsize=1 << 16)
def read_name(name: str) -> Name:
    """Read the words of a folder's name, or of a file's name without its suffix.

    Example:
        >>> [read_name(name).kind for name in ("Good parts", "abnormal_images", "NotGood", "defect-free", "1_NOK")]
        ['good', 'bad', 'bad', 'good', 'bad']
        >>> read_name("Bad - crack").rest
        ('crack',)
    """
    # Without accents; marks of other scripts stay.
    bare = re.sub("[\u0300-\u036f]", "", unicodedata.normalize("NFKD", name))
    joined = unicodedata.normalize("NFKC", bare)
    joined = _RANDOM.sub(" 0 ", joined)
    joined = re.sub(r"(?<!\w)n\.?\s?i\.\s?o\b\.?", " nio ", joined, flags=re.IGNORECASE)
    joined = re.sub(r"(?<!\w)i\.\s?o\b\.?", " io ", joined, flags=re.IGNORECASE)
    parted = re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", " ", joined)
    # "NotGood" is two words, but "NGparts" is not "N Gparts": the first reading that says something counts.
    readings = [_meaning(_words(text.casefold())) for text in dict.fromkeys((parted, joined))]
    return next((reading for reading in readings if reading.kind or reading.split or reading.mask), readings[-1])


def are_zero_and_one(names: Sequence[str]) -> bool:
    """Whether two siblings are called 0 and 1 (or class0 and class1): kinds, but which one is good?"""
    numbers = [_CLASS_NUMBER.fullmatch(name) for name in names]
    return all(numbers) and sorted(match[1] for match in numbers) == ["0", "1"]


def _words(text: str) -> list[_Word]:
    tokens = _TOKEN.findall(text)
    found = []
    if not tokens:
        return [_Word(text, _OTHER, generic=False)]
    for before, token, after in zip(["", *tokens[:-1]], tokens, [*tokens[1:], ""], strict=True):
        if token.isdecimal():
            found.append(_Word(token, _NUMBER))
        elif token >= _UNSPACED_FROM:
            found += _unspaced_words(token)
        elif (token, after) == ("ground", "truth") or (before, token) == ("ground", "truth"):
            found.append(_Word(token, _MASK))
        elif token == "n" and after in ("ok", "io"):
            found.append(_Word(token, _NOT))
        else:
            found.append(_word(token))
    if [word.text for word in found if word.role in (_OTHER, GOOD, BAD)] in (["io"], ["nio"]):
        # German shop talk for "in order", or not. Beside other words, it is more likely input and output.
        return [_Word(w.text, {"io": GOOD, "nio": BAD}.get(w.text, w.role)) for w in found]
    return found


def _word(token: str) -> _Word:
    for role, listed in (
        (_NOT, vocabulary.NEGATIONS),
        (_FREE, vocabulary.FREE),
        (_FILLER, vocabulary.FILLERS | vocabulary.NOUNS),
        (_MASK, MASK_WORDS),
        (TRAIN, vocabulary.TRAIN),
        (TEST, vocabulary.TEST),
        (UNCLEAR, vocabulary.EITHER),
    ):
        if token in listed:
            return _Word(token, role)
    parts = [token]
    # A noun that is joined to it: goodparts, imgok.
    parts += [token.removesuffix(noun) for noun in vocabulary.NOUNS if token.endswith(noun)]
    parts += [token.removeprefix(noun) for noun in vocabulary.NOUNS if token.startswith(noun)]
    for part in parts:
        if part in vocabulary.GOOD:
            return _Word(token, GOOD)
        if part in vocabulary.BAD:
            return _Word(token, BAD)
    if token.startswith(vocabulary.BAD_STEMS):
        return _Word(token, BAD)
    if token in vocabulary.DEFECTS or token.startswith(vocabulary.DEFECT_STEMS):
        return _Word(token, BAD, generic=False)
    return _Word(token, _OTHER, generic=False)


def _unspaced_words(token: str) -> list[_Word]:
    """The words in a run of letters without spaces, longest first: 不良品 is a word, and holds the word 良品."""
    if token in vocabulary.UNSPACED_ALONE:
        return [_Word(token, vocabulary.UNSPACED_ALONE[token])]
    found, left = [], token
    for word, role in vocabulary.UNSPACED:
        if word in left:
            found.append(_Word(word, role, generic=word not in vocabulary.UNSPACED_DEFECTS))
            left = left.replace(word, "", 1)
    if left:
        found.append(_Word(left, _OTHER, generic=False))
    return found


def _meaning(found: list[_Word]) -> Name:
    found = _negated(found)
    roles = {word.role for word in found}
    rest = [word.text for word in found if word.role == _OTHER or (word.role == BAD and not word.generic)]
    kind = UNCLEAR if {GOOD, BAD} <= roles else next(iter(roles & {GOOD, BAD}), None)
    if kind is None and UNCLEAR in roles and not rest:
        kind = UNCLEAR
    said = (GOOD, BAD, UNCLEAR)
    core = [
        word.text
        for word in found
        if word.role in (_OTHER, _NUMBER, _NOT, _FREE) or (word.role in said and not (word.generic and rest))
    ]
    if not core and _FILLER in roles:
        core = [word.text for word in found if word.text in vocabulary.FILLERS]
    split = next((split for split in (TRAIN, TEST) if split in roles), None)
    return Name(kind, split, _MASK in roles, tuple(rest), " ".join(core))


def _negated(found: Iterable[_Word]) -> list[_Word]:
    """Words after a negation, or before "free", mean the opposite: not good, no defects, crack-free."""
    result: list[_Word] = []
    negate = False
    for word in found:
        if negate and word.role in (GOOD, BAD):
            result.append(_Word(word.text, BAD if word.role == GOOD else GOOD))
        elif word.role == _FREE and any(earlier.role == BAD for earlier in result):
            result = [_Word(w.text, GOOD) if w.role == BAD else w for w in result]
        else:
            result.append(word)
        if word.role != _FILLER:
            negate = word.role in (_NOT, _FREE)
    return result
