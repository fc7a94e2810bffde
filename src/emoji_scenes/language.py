"""Captions of scenes, questions with exact answers, and the nouns and colours that a text names.

Every sentence is true of its scene, and every function is pure: equal arguments give equal words.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from functools import cache

from transfuse.draws import Draws

from .nouns import NOUNS
from .palette import PALETTE
from .scenes import Relation, Scene, Thing

NUMBERS = ("no", "one", "two", "three", "four")

#: The phrase for a position.
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
#: The phrase for a relation, and the inverse relation.
RELATION_PHRASES: dict[Relation, tuple[str, Relation]] = {
    "left of": ("to the left of", "right of"),
    "right of": ("to the right of", "left of"),
    "above": ("above", "below"),
    "below": ("below", "above"),
    "next to": ("next to", "next to"),
}

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


@dataclass(frozen=True, slots=True)
class Question:
    """A question about a scene and its exact answer."""

    question: str
    answer: str


def article(word: str) -> str:
    """ "a" or "an" before a colour or size word (nouns carry their own in the table)."""
    return "an" if word[0] in "aeiou" else "a"


def phrase(thing: Thing, sized: bool = True) -> str:
    """A thing with its number and size: "a crab", "a small crab", "three large crabs"; medium goes without saying."""
    noun = NOUNS[thing.noun]
    size = f"{thing.size} " if sized and thing.size != "medium" else ""
    if thing.count > 1:
        return f"{NUMBERS[thing.count]} {size}{noun.plural}"
    return f"a {size}{noun.name}" if size else noun.a


def listed(phrases: list[str]) -> str:
    """ "a", "a and b", "a, b and c"."""
    return phrases[0] if len(phrases) == 1 else f"{', '.join(phrases[:-1])} and {phrases[-1]}"


def caption(scene: Scene, index: int = 0, seed: int = 0) -> str:
    """One true sentence about a scene, its wording drawn by (seed, index)."""
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
    """Every kind of question that suits a scene, with exact answers.

    ``nouns``: those from which the thing asked about in vain ("Is there a crab?" "no") is drawn; all unless given.
    """
    draws = Draws("question", seed, index)
    pairs = [_what(scene, draws), _background(scene, draws)]
    pairs += [_how_many(thing, draws) for thing in scene.things]
    present = {thing.noun for thing in scene.things}
    pairs.append(_is_there(draws.pick(sorted(present)), "yes", draws))
    absent = [noun for noun in (NOUNS if nouns is None else nouns) if noun not in present]
    if absent:
        pairs.append(_is_there(draws.pick(absent), "no", draws))
    pairs += [
        Question(f"Is the {thing.noun} small or large?", thing.size)
        for thing in scene.things
        if thing.count == 1 and thing.size != "medium"
    ]
    if scene.relation is not None:
        first, second = scene.things
        relation, inverse = RELATION_PHRASES[scene.relation]
        pairs.append(Question(f"What is {relation} the {second.noun}?", NOUNS[first.noun].a))
        pairs.append(Question(f"What is {RELATION_PHRASES[inverse][0]} the {first.noun}?", NOUNS[second.noun].a))
    if scene.position is not None:
        where = POSITION_PHRASES[scene.position]
        pairs.append(Question(f"Where is the {scene.things[0].noun}?", where))
    return pairs


def _what(scene: Scene, draws: Draws) -> Question:
    counts = [NOUNS[t.noun].a if t.count == 1 else f"{NUMBERS[t.count]} {NOUNS[t.noun].plural}" for t in scene.things]
    wording = ("What is it?", "What is this?", "What is shown?", "What is in the picture?")
    # "it" and "this" suit one thing only
    return Question(draws.pick(wording if scene.kind == "one" else wording[2:]), listed(counts))


def _background(scene: Scene, draws: Draws) -> Question:
    wording = (
        "What colour is the background?",
        "Which colour is the background?",
        "What is the background colour?",
        "What is the colour of the background?",
    )
    return Question(draws.pick(wording), scene.background)


def _how_many(thing: Thing, draws: Draws) -> Question:
    plural = NOUNS[thing.noun].plural
    wording = (
        f"How many {plural} are there?",
        f"How many {plural} are in the picture?",
        f"How many {plural} can you see?",
        f"Count the {plural}.",
    )
    return Question(draws.pick(wording), NUMBERS[thing.count])


def _is_there(noun: str, answer: str, draws: Draws) -> Question:
    a = NOUNS[noun].a
    wording = (f"Is there {a}?", f"Is there {a} in the picture?", f"Can you see {a}?", f"Does the picture show {a}?")
    return Question(draws.pick(wording), answer)


@cache
def _finder() -> tuple[re.Pattern[str], dict[str, str]]:
    """A pattern of every form of every noun, longest first, and which noun each form belongs to."""
    forms = {form.lower(): noun.name for noun in NOUNS.values() for form in (noun.name, noun.plural)}
    ordered = sorted(forms, key=lambda form: (-len(form), form))
    return re.compile(rf"(?<![\w-])(?:{'|'.join(map(re.escape, ordered))})(?![\w-])"), forms


def nouns_in(text: str, nouns: Collection[str] | None = None) -> set[str]:
    """The curated nouns a text names, singular or plural, whole words in any case; only those in ``nouns`` if given.

    The longest match wins, over the whole table: "a hot dog" names a hot dog and no dog, whatever ``nouns`` holds.
    """
    pattern, forms = _finder()
    named = {forms[match] for match in pattern.findall(" ".join(text.lower().split()))}
    return named if nouns is None else named & set(nouns)


def colours_in(text: str) -> set[str]:
    """The background colours a text names."""
    return set(re.findall(rf"\b(?:{'|'.join(PALETTE)})\b", text.lower()))
