"""The words that a model of a world knows, for its export's `vocabulary.json` (`transfuse.vocabulary`)."""

from __future__ import annotations

from collections import Counter
from functools import cache

from transfuse.vocabulary import WORD, Vocabulary, shortened

from .dialogues import dialogue
from .editing import edit
from .language import caption, glosses, nouns_in
from .nouns import NOUNS
from .scenes import World

SCENES = 800
"""scenes whose captions are read; every template and noun comes up"""
EXAMPLES = 6
OTHER_WORDS = {
    "grey": "gray",
    "violet": "purple",
    "big": "large",
    "huge": "large",
    "little": "small",
    "tiny": "small",
    "under": "below",
    "beneath": "below",
    "over": "above",
    "backdrop": "background",
    "1": "one",
    "2": "two",
    "3": "three",
    "4": "four",
}
"""words that captions never use, and those that they use for them"""


@cache
def vocabulary(world: World, edits: bool = False, dialogues: bool = False) -> Vocabulary:
    """Return the words of a world's captions, and of what else a model learns.

    edits       the words of instructions
    dialogues   the words of conversations, but for the names of things that the world does not have
    """
    scenes = [world.scene(index) for index in range(SCENES)]
    captions = [caption(scene, index) for index, scene in enumerate(scenes)]
    instructions = [edit(scene, world, index).instruction for index, scene in enumerate(scenes)] if edits else []
    talks = [turn for index in range(SCENES) for turn in dialogue(world, index)] if dialogues else []
    spoken = [text for turn in talks for text in (turn.request, turn.reply) if nouns_in(text) <= {*world.nouns}]
    things = [NOUNS[name] for name in world.nouns]
    forms = [form for noun in things for form in (noun.name, noun.plural)[: world.config.max_count]]
    counts = Counter(word for text in captions + instructions + forms for word in WORD.findall(text))
    known = {word.lower() for word in counts}
    # A word that captions have is written as they write it, in conversations, too.
    counts.update(word for text in spoken for word in WORD.findall(text) if word.lower() not in known)
    known = {word.lower() for word in counts}
    near = set().union(*map(shortened, known))
    english = {line.partition(":")[0].lower() for line in glosses("train") + glosses("heldout")}
    names = {other: word for other, word in OTHER_WORDS.items() if set(word.split()) <= known}
    for noun in things:
        for other in noun.synonyms:
            names |= {other: noun.name, f"{other}s": noun.plural}
    return Vocabulary(
        words=tuple(word for word, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))),
        things=world.nouns,
        colours=world.backgrounds,
        examples={"draw": tuple(captions[:EXAMPLES]), "edit": tuple(instructions[:EXAMPLES])},
        synonyms=names,
        english=tuple(sorted(w for w in english - known if WORD.fullmatch(w) and not near.isdisjoint(shortened(w)))),
    )
