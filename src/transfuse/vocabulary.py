"""The words that a model has learned to draw, and what becomes of a prompt with others.

    vocabulary = Vocabulary.load(folder / "vocabulary.json")
    vocabulary.read("A STRAWBERY and an automobile")     # "a strawberry and a car", with what was changed
    vocabulary.read("a cat").unknown                     # ("cat",)

A model that is trained on captions draws an unknown word as texture or as something else, without a sign. So a prompt's
case, endings, typing errors and synonyms are brought to the words of the captions, and what is left is reported. Only
models of the bundled scenes alone have a vocabulary: the words of other captions are no closed world.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from .config import from_dict, read_json
from .errors import UserError

WORD = re.compile(r"[\w'’-]+")
ENDINGS = (("ies", "y"), ("es", ""), ("s", ""), ("'s", ""), ("", "s"), ("", "es"))
"""of plurals and their singulars"""
MOST_MENDED = 64
"""most words of a prompt whose typing errors are mended: each is compared with many known ones"""
MOST_TOLD = 20
"""most unknown words that a message names"""


@dataclass(frozen=True)
class PromptReading:
    """A prompt as the model reads it.

    changes   (word as it was given, word that stands for it), in order
    unknown   words that training never showed, in order
    """

    text: str
    changes: tuple[tuple[str, str], ...] = ()
    unknown: tuple[str, ...] = ()


@dataclass(frozen=True)
class Vocabulary:
    """The words of a model's captions.

    words      every word, as captions have it
    things     what it can draw, in an order to show people; may have several words ("soccer ball")
    colours    of backgrounds, likewise
    examples   prompts, and instructions to change an image, that it can follow
    synonyms   other names of things, in lower case
    english    other English words so near to a known one that they are no typing errors of it ("horse", "house")
    """

    words: tuple[str, ...]
    things: tuple[str, ...] = ()
    colours: tuple[str, ...] = ()
    examples: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    synonyms: Mapping[str, str] = field(default_factory=dict)
    english: tuple[str, ...] = ()

    @classmethod
    def load(cls, path: Path) -> Vocabulary | None:
        """Read a vocabulary.json; None where there is none. Raises UserError for any other file."""
        return from_dict(cls, read_json(path), str(path)) if path.is_file() else None

    @cached_property
    def _known(self) -> dict[str, str]:
        """Each word in lower case, and how captions write it most often: `words` begins with the most frequent."""
        known: dict[str, str] = {}
        for word in self.words:
            known.setdefault(word.lower(), word)
        return known

    def read(self, prompt: str) -> PromptReading:
        """Return a prompt in the words of the captions.

        A word stays if captions have it. Else it is replaced by the same word in another case, by a synonym (longest
        first), by its singular or plural, or by the one word that a typing error away is it; else it is unknown. Where
        more than `MOST_MENDED` different words would need it, no typing error is mended: that prompt is no caption.
        """
        changes: list[tuple[str, str]] = []
        unknown: list[str] = []

        def spoken(match: re.Match[str]) -> str:
            synonym = self.synonyms[" ".join(match.group().lower().split())]
            changes.append((match.group(), synonym))
            return synonym

        def known(match: re.Match[str]) -> str:
            word = match.group()
            if word in self._words or word.isdigit():
                return word
            meant = self._inflected(word.lower()) or mended.get(word.lower())
            if meant is None:
                unknown.append(word)
                return word
            if meant.lower() != word.lower():
                changes.append((word, meant))
            return meant

        text = prompt if self._synonyms is None else self._synonyms.sub(spoken, prompt)
        others = {word.lower() for word in WORD.findall(text) if not word.isdigit()}
        others = {word for word in others if self._inflected(word) is None}
        mended = {word: self._mended(word) for word in others} if len(others) <= MOST_MENDED else {}
        text = _articles(prompt, WORD.sub(known, text))
        return PromptReading(text, tuple(changes), tuple(dict.fromkeys(unknown)))

    @cached_property
    def _words(self) -> frozenset[str]:
        return frozenset(self.words)

    @cached_property
    def _synonyms(self) -> re.Pattern[str] | None:
        names = sorted((name for name in self.synonyms if name not in self._known), key=lambda name: (-len(name), name))
        choices = "|".join(r"\s+".join(map(re.escape, name.split())) for name in names)
        return re.compile(rf"(?<![\w'’-])(?:{choices})(?![\w'’-])", re.IGNORECASE) if names else None

    @cached_property
    def _shortened(self) -> dict[str, list[str]]:
        """The known words by what is left of them without one or two letters."""
        known: dict[str, list[str]] = {}
        for word in self._known:
            for variant in shortened(word) if len(word) > 2 else ():
                known.setdefault(variant, []).append(word)
        return known

    def _inflected(self, word: str) -> str | None:
        """Return the known word that a word in lower case is, or whose singular or plural it is."""
        if word in self._known:
            return self._known[word]
        for ending, other in ENDINGS:
            if word.endswith(ending) and (base := word[: len(word) - len(ending)] + other) in self._known:
                return self._known[base]
        return None

    def _mended(self, word: str) -> str | None:
        """Return the one known word from which a word in lower case differs by typing errors."""
        allowed = typing_errors(word)
        if word in self.english or not 4 <= len(word) <= max(map(len, self._known), default=0) + allowed:
            return None
        near = {each for variant in shortened(word) for each in self._shortened.get(variant, ())}
        distances = {each: edit_distance(word, each, allowed) for each in near}
        least = min(distances.values(), default=allowed + 1)
        nearest = [each for each, distance in distances.items() if distance == least]
        return self._known[nearest[0]] if least <= allowed and len(nearest) == 1 else None

    def read_strictly(self, prompt: str) -> PromptReading:
        """Return `read`. Raises UserError for a prompt with unknown words."""
        reading = self.read(prompt)
        if reading.unknown:
            raise UserError(f"prompt: expected words that the model knows, found {self.told(reading)}")
        return reading

    def told(self, reading: PromptReading) -> str:
        """Return a reading's unknown words for people, with what the model can draw instead."""
        words = ", ".join(f'"{word}"' for word in reading.unknown[:MOST_TOLD])
        if len(reading.unknown) > MOST_TOLD:
            words += f" and {len(reading.unknown) - MOST_TOLD} more"
        return f"{words}, never seen in training" + (f"; it draws {', '.join(self.things)}" if self.things else "")


def _articles(before: str, after: str) -> str:
    """Set "a" or "an" right where the word after it was replaced: "an automobile" gives "a car"."""
    if before == after:
        return after

    kept = set(re.findall(r"\b[Aa]n? +[\w-]+", before))

    def fitting(match: re.Match[str]) -> str:
        if match.group() in kept:
            return match.group()
        article, space, word = match.groups()
        fits = "an" if word[0].lower() in "aeiou" else "a"
        return (fits.capitalize() if article[0].isupper() else fits) + space + word

    return re.sub(r"\b([Aa]n?)( +)([\w-]+)", fitting, after)


def typing_errors(word: str) -> int:
    """Return the number of typing errors in a word that are mended."""
    return 1 if len(word) < 7 else 2


def shortened(word: str) -> set[str]:
    """Return a word without any one or two of its letters: two words that share none are no typing errors apart."""
    words = {word}
    for _ in range(typing_errors(word)):
        words |= {each[:at] + each[at + 1 :] for each in words for at in range(len(each))}
    return words


def edit_distance(first: str, second: str, most: int) -> int:
    """Return the insertions, deletions, replacements and swaps of neighbours between two words; `most` + 1 if more."""
    if abs(len(first) - len(second)) > most:
        return most + 1
    before: list[int] = []
    row = list(range(len(second) + 1))
    for i, a in enumerate(first, 1):
        before, last, row = row, before, [i]
        for j, b in enumerate(second, 1):
            row.append(min(before[j] + 1, row[j - 1] + 1, before[j - 1] + (a != b)))
            if i > 1 and j > 1 and a == second[j - 2] and b == first[i - 2]:
                row[j] = min(row[j], last[j - 2] + 1)
        if min(row) > most:
            return most + 1
    return min(row[-1], most + 1)
