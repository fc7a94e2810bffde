"""The words about scenes: captions, questions with exact answers, definitions, and what a text names.

Every sentence is true of its scene, and every function is pure: equal arguments give equal words.
"""

from __future__ import annotations

import gzip
import re
from collections.abc import Collection
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from transfuse.rng import Draws, stable_hash

from .layout import Relation
from .nouns import NOUNS, PALETTE
from .scenes import Scene, Thing

NUMBERS = ("no", "one", "two", "three", "four")
GLOSS_FILE = Path(__file__).with_name("glosses.txt.gz")
WORDS_PER_HELD_OUT = 50  # one word in this many is held out, with all its definitions

POSITION_PHRASES = {
    "top left": "in the top left corner",
    "top": "at the top",
    "top right": "in the top right corner",
    "left": "on the left",
    "middle": "in the middle",
    "right": "on the right",
    "bottom left": "in the bottom left corner",
    "bottom": "at the bottom",
    "bottom right": "in the bottom right corner",
}
"""The phrase for each position."""
RELATION_PHRASES: dict[Relation, tuple[str, Relation]] = {
    "left of": ("to the left of", "right of"),
    "right of": ("to the right of", "left of"),
    "above": ("above", "below"),
    "below": ("below", "above"),
    "next to": ("next to", "next to"),
}
"""The phrase for each relation, and the inverse relation."""

# In the templates {x} is the thing or things ("a small crab", "three crabs"), {where} its position (" at the top" or
# nothing), {bg} the background colour with its article ("an orange"), {colour} the bare colour.
ONE = (
    "{x}{where} on {bg} background",
    "{x} on {bg} background{where_after}",
    "a picture of {x}{where} on {bg} background",
    "{bg} background with {x}{where}",
    "There is {x}{where}. The background is {colour}.",
    "The background is {colour}. There is {x}{where}.",
    "{x}{where}, on {colour}",
    "This is {x}{where} on {bg} background.",
    "one thing: {x}{where}, against {bg} background",
    "On {bg} background there is {x}{where}.",
)
COPIES = (
    "{x} on {bg} background",
    "{x}, all on {colour}",
    "a picture of {x} on {bg} background",
    "There are {x}. The background is {colour}.",
    "The background is {colour}. There are {x}.",
    "{bg} background with {x}",
    "{x} against {bg} background",
    "On {bg} background there are {x}.",
    "This picture shows {x} on {colour}.",
)
PAIR = (
    "{x} {relation} {y} on {bg} background",
    "{x} {relation} {y}, on {colour}",
    "a picture of {x} {relation} {y} on {bg} background",
    "There is {x} {relation} {y}. The background is {colour}.",
    "The background is {colour}. There is {x} {relation} {y}.",
    "{bg} background with {x} {relation} {y}",
    "On {bg} background {x} is {relation} {y}.",
    "{y} and, {other}, {x}, on {bg} background",
    "two things on {colour}: {x} {relation} {y}",
    "{x} is {relation} {y} against {bg} background.",
)
GROUP = (
    "{x} on {bg} background",
    "{x}, all on {colour}",
    "a picture of {x} on {bg} background",
    "The picture shows {x}. The background is {colour}.",
    "The background is {colour}. On it: {x}.",
    "{bg} background with {x}",
    "{x} against {bg} background",
    "On {bg} background you can see {x}.",
    "{x} together on {colour}",
)
_OTHER = {"left of": "to its left", "right of": "to its right", "above": "above it", "below": "below it"}

WHAT = ("What is it?", "What is this?", "What is shown?", "What is in the picture?")
BACKGROUND = (
    "What colour is the background?",
    "Which colour is the background?",
    "What is the background colour?",
    "What is the colour of the background?",
)
HOW_MANY = ("How many {} are there?", "How many {} are in the picture?", "How many {} can you see?", "Count the {}.")
IS_THERE = ("Is there {}?", "Is there {} in the picture?", "Can you see {}?", "Does the picture show {}?")


@dataclass(frozen=True, slots=True)
class Question:
    """A question about a scene and its exact answer."""

    question: str
    answer: str


def article(word: str) -> str:
    """Return "a" or "an" for a colour or size word (nouns carry their own in the table)."""
    return "an" if word[0] in "aeiou" else "a"


def phrase(thing: Thing, sized: bool = True) -> str:
    """Return a thing with its number and size: "a crab", "a small crab", "three large crabs"; medium is unnamed."""
    noun = NOUNS[thing.noun]
    size = f"{thing.size} " if sized and thing.size != "medium" else ""
    if thing.count > 1:
        return f"{NUMBERS[thing.count]} {size}{noun.plural}"
    return f"a {size}{noun.name}" if size else noun.a


def listed(phrases: list[str]) -> str:
    """Join phrases: "a", "a and b", "a, b and c"."""
    return phrases[0] if len(phrases) == 1 else f"{', '.join(phrases[:-1])} and {phrases[-1]}"


def caption(scene: Scene, index: int = 0, seed: int = 0) -> str:
    """Return a true sentence about a scene, its wording drawn by (seed, index)."""
    draws = Draws("caption", seed, index)
    colour = scene.background
    words = {"bg": f"{article(colour)} {colour}", "colour": colour}
    if scene.kind == "pair":
        first, second = scene.things
        relation: Relation = scene.relation or "next to"
        if draws.chance(0.3):
            first, second, relation = second, first, RELATION_PHRASES[relation][1]
        words |= {"x": phrase(first), "y": phrase(second), "relation": RELATION_PHRASES[relation][0]}
        words["other"] = _OTHER.get(relation, "next to it")
        template = draws.pick(PAIR)
    elif scene.kind == "group":
        things = list(scene.things)
        order = [things.pop(draws.below(len(things))) for _ in range(len(things))]
        words["x"] = listed([phrase(thing) for thing in order])
        template = draws.pick(GROUP)
    else:
        # With nothing to compare to, its size may be left out: people ask for "a crab" and mean any.
        words["x"] = phrase(scene.things[0], sized=draws.chance(0.5))
        where = f" {POSITION_PHRASES[scene.position]}" if scene.position else ""
        words |= {"where": where, "where_after": f",{where}" if where else ""}
        template = draws.pick(ONE if scene.kind == "one" else COPIES)
    return template.format(**words)


def questions(scene: Scene, index: int = 0, seed: int = 0, nouns: Collection[str] | None = None) -> list[Question]:
    """Return every kind of question that suits a scene, with exact answers.

    The absent thing of one question ("Is there a crab?" "no") is drawn from `nouns`; from all unless given.
    """
    draws = Draws("question", seed, index)
    counts = [NOUNS[t.noun].a if t.count == 1 else f"{NUMBERS[t.count]} {NOUNS[t.noun].plural}" for t in scene.things]
    # "it" and "this" suit one thing only
    wording = WHAT if scene.kind == "one" else WHAT[2:]
    pairs = [Question(draws.pick(wording), listed(counts)), Question(draws.pick(BACKGROUND), scene.background)]
    for thing in scene.things:
        pairs.append(Question(draws.pick(HOW_MANY).format(NOUNS[thing.noun].plural), NUMBERS[thing.count]))
    present = sorted({thing.noun for thing in scene.things})
    absent = [noun for noun in (NOUNS if nouns is None else nouns) if noun not in present]
    for options, answer in ((present, "yes"), (absent, "no")):
        if options:
            noun = draws.pick(options)
            pairs.append(Question(draws.pick(IS_THERE).format(NOUNS[noun].a), answer))
    for thing in scene.things:
        if thing.count == 1 and thing.size != "medium":
            pairs.append(Question(f"Is the {thing.noun} small or large?", thing.size))
    if scene.relation is not None:
        first, second = scene.things
        relation, inverse = RELATION_PHRASES[scene.relation]
        pairs.append(Question(f"What is {relation} the {second.noun}?", NOUNS[first.noun].a))
        pairs.append(Question(f"What is {RELATION_PHRASES[inverse][0]} the {first.noun}?", NOUNS[second.noun].a))
    if scene.position is not None:
        pairs.append(Question(f"Where is the {scene.things[0].noun}?", POSITION_PHRASES[scene.position]))
    return pairs


@cache
def _noun_finder() -> tuple[re.Pattern[str], dict[str, str]]:
    """Return a pattern of every form of every noun, longest first, and the noun of each form."""
    forms = {form.lower(): noun.name for noun in NOUNS.values() for form in (noun.name, noun.plural)}
    ordered = sorted(forms, key=lambda form: (-len(form), form))
    return re.compile(rf"(?<![\w-])(?:{'|'.join(map(re.escape, ordered))})(?![\w-])"), forms


def nouns_in(text: str, nouns: Collection[str] | None = None) -> set[str]:
    """Return the nouns of the table that a text names, in any form and case; only those in `nouns` if given.

    The longest match wins, over the whole table: "a hot dog" names a hot dog and no dog, whatever `nouns` holds.
    """
    pattern, forms = _noun_finder()
    named = {forms[match] for match in pattern.findall(" ".join(text.lower().split()))}
    return named if nouns is None else named & set(nouns)


def colours_in(text: str) -> set[str]:
    """Return the background colours a text names."""
    return set(re.findall(rf"\b(?:{'|'.join(PALETTE)})\b", text.lower()))


@cache
def _glosses_by_split() -> dict[str, list[str]]:
    parts: dict[str, list[str]] = {"train": [], "heldout": []}
    for line in gzip.decompress(GLOSS_FILE.read_bytes()).decode().splitlines():
        word = line.partition(":")[0]
        parts["train" if stable_hash(f"gloss {word}") % WORDS_PER_HELD_OUT else "heldout"].append(line)

    def definition(line: str) -> str:  # without its word and its examples
        return line.partition(": ")[2].partition('; "')[0]

    # WordNet gives synonyms one definition: a third of the words held out are read in training under another name.
    read = {definition(line) for line in parts["train"]}
    return {**parts, "heldout": [line for line in parts["heldout"] if definition(line) not in read]}


def glosses(split: Literal["train", "heldout"] = "train") -> list[str]:
    """Return lines like "crab: decapod having eyes on short stalks ...", in alphabetical order, from WordNet.

    "heldout" is a fixed 2 % of the words, without definitions that "train" has under a synonym. Raises ValueError for
    another split.
    """
    if split not in ("train", "heldout"):
        raise ValueError(f"split: expected 'train' or 'heldout', found {split!r}")
    return list(_glosses_by_split()[split])
