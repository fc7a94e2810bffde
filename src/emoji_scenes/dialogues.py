"""Conversations about scenes, in plain words; and the words that a model of a world knows (`transfuse.vocabulary`).

    turns = dialogue(World(WorldConfig(size=64)), index=0)
    turns[0].request, turns[0].reply, turns[0].scene

A dialogue is a function of the world and its number. Every answer is exact, and every drawing is the scene that the
turn leaves. In one dialogue of four the person shows an image, and asks about it or asks for a change. One wording in
`HELD_OUT_EVERY` of each kind of request, questions apart, comes up in the held-out split alone: understanding is
measured on words that training never used.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal

from transfuse.rng import Draws
from transfuse.vocabulary import WORD, Vocabulary, shortened

from .editing import Edit, edit
from .language import RELATION_PHRASES, article, caption, glosses, listed, nouns_in, phrase, questions
from .nouns import NOUNS
from .scenes import Scene, World

TurnKind = Literal["greeting", "ability", "draw", "change", "question", "unknown", "thanks", "farewell"]

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message.role + ':\\n' + message.content }}"
    "{{ (eos_token if message.role == 'assistant' else '') + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:\\n' }}{% endif %}"
)
"""chat template of models that are trained on dialogues, unless they start from one with a template"""
MOST_IMAGES = 3  # images in a dialogue, those that the person shows among them
TURNS = (2, 8)  # fewest and most turns of a dialogue, unless others are asked for
HELD_OUT_EVERY = 5
OPENINGS: tuple[tuple[TurnKind, float], ...] = (("greeting", 0.3), ("ability", 0.15), ("unknown", 0.12))
"""what may come before the first image or question, and the share of dialogues that it comes in"""

ABILITIES = (
    *("what can you do?", "what can you draw?", "who are you?", "help", "what do you know?", "what are you good at?"),
    *("tell me what you can do", "how can you help me?", "which things can you draw?", "what is possible here?"),
)
CAN = "I can draw {known}, change my drawings, and answer questions about them."
REQUESTS = (
    *("draw {x}", "please draw {x}", "could you draw me {x}?", "can you draw {x}?", "I would like {x}", "{x}, please"),
    *("show me {x}", "I want to see {x}", "make a picture of {x}", "paint {x}", "would you draw {x} for me?"),
    *("give me a picture of {x}", "let me see {x}", "now draw {x}", "how about {x}?", "{x}", "a drawing of {x}"),
    *("{x}, if you can", "draw me {x}", "I need {x}", "create an image of {x}", "can I have {x}?"),
)
OFFERS = ("Here you go: {x}.", "Here you are: {x}.", "Sure, {x}.", "{x}, as you wished.", "I drew {x}.")
CHANGES = (
    *("{x}", "please {x}", "could you {x}?", "now {x}", "can you {x}?", "and now {x}", "I would like you to {x}"),
    *("{x}, please", "would you {x}?", "next, {x}", "{x} now", "I want you to {x}"),
)
DONE = ("Done.", "Here it is.", "Like this?", "Of course.", "There you go.")
SMALL_TALK: dict[TurnKind, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "greeting": (
        (
            *("hello", "hi", "hey there", "good morning", "hi, how are you?", "good evening", "hello there", "hey"),
            *("good afternoon", "hi there", "hello, are you there?", "greetings"),
        ),
        ("Hello! What shall I draw?", "Hi! Tell me what to draw.", "Hello! Shall I draw something?"),
    ),
    "thanks": (
        (
            *("thanks", "thank you", "great, thank you", "nice", "that is lovely", "well done", "perfect"),
            *("thanks a lot", "good job", "cool", "I like it", "beautiful"),
        ),
        ("You are welcome.", "My pleasure.", "Glad you like it.", "Any time."),
    ),
    "farewell": (
        ("bye", "goodbye", "see you", "good night", "bye for now", "that is all", "see you later"),
        ("Goodbye!", "See you!", "Bye!"),
    ),
}
"""requests and replies by kind"""
SILENT = 0.2  # share of images that come without words, as where a client asks for nothing but an image
REFUSALS = ("I cannot draw {x}. I know {known}.", "Sorry, I have never seen {x}. I can draw {known}.")


@dataclass(frozen=True, slots=True)
class Turn:
    """A request, the reply's words, which an image needs not have, and that image's scene (None: words alone).

    shown    the scene of an image that the person shows before the request
    answer   what a right reply to a question says, exactly; empty for other kinds
    change   the edit that a change asks for
    """

    kind: TurnKind
    request: str
    reply: str
    scene: Scene | None = None
    shown: Scene | None = None
    answer: str = ""
    change: Edit | None = None


def wordings(options: Sequence[str], split: str) -> Sequence[str]:
    """Return the wordings of a split: training lacks every fifth, the held-out split has those alone."""
    held_out = options[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY] or options[:1]
    return held_out if split == "heldout" else [each for each in options if each not in held_out] or options


def dialogue(world: World, index: int, turns: tuple[int, int] = TURNS) -> list[Turn]:
    """Return the turns of a dialogue, of which 1 to `MOST_IMAGES` have an image.

    turns: the fewest and the most of them; at least 2.
    """
    fewest, most = turns
    draws = Draws("dialogue", world.config.seed, world.config.split, index)
    numbers = iter(range(MOST_IMAGES * index, MOST_IMAGES * (index + 1)))
    scene, images = world.scene(next(numbers)), 1
    opening = [_talk(kind, world, draws) for kind, share in OPENINGS if draws.chance(share)]
    if not draws.chance(0.25):
        first = _draw(scene, world, draws)
    elif draws.chance(0.5):
        first = replace(_question(scene, world, draws), shown=scene)
    else:
        first = replace(_change(scene, world, next(numbers), draws), shown=scene)
        scene, images = first.scene or scene, images + 1
    spoken = [*opening[: most - 2], first]
    wanted = draws.between(max(fewest, len(spoken) + 1), most)
    while len(spoken) < wanted:
        roll = draws.below(100)
        if roll < 45 or (roll < 83 and images == MOST_IMAGES):
            spoken.append(_question(scene, world, draws))
        elif roll < 70:
            spoken.append(_change(scene, world, next(numbers), draws))
            scene, images = spoken[-1].scene or scene, images + 1
        elif roll < 83:
            scene, images = world.scene(next(numbers)), images + 1
            spoken.append(_draw(scene, world, draws))
        elif roll < 96:
            spoken.append(_talk("unknown" if roll < 88 else "ability" if roll < 91 else "thanks", world, draws))
        elif len(spoken) + 1 >= fewest:
            spoken.append(_talk("farewell", world, draws))
            break
    return spoken


def _spoken(text: str, draws: Draws) -> str:
    """Return a request as people type it: with a capital or without, and with or without a mark at its end."""
    text = (text[0].upper() if draws.chance(0.5) else text[0].lower()) + text[1:]
    if text[-1] in "?.":
        return text[:-1] if draws.chance(0.2) else text
    return text + draws.pick(("", "", "", ".", "!"))


def _talk(kind: TurnKind, world: World, draws: Draws) -> Turn:
    """Return a turn of words alone: small talk, what the assistant can do, or a thing that this world does not have."""
    split = world.config.split
    if kind in SMALL_TALK:
        requests, replies = SMALL_TALK[kind]
        return Turn(kind, _spoken(draws.pick(wordings(requests, split)), draws), draws.pick(replies))
    if kind == "ability":
        request, reply, thing = _spoken(draws.pick(wordings(ABILITIES, split)), draws), CAN, ""
    else:
        name = draws.pick([noun for noun in NOUNS if noun not in world.nouns] or ["griffin"])
        thing = NOUNS[name].a if name in NOUNS else f"a {name}"
        request = _spoken(draws.pick(wordings(REQUESTS, split)).format(x=thing), draws)
        reply = draws.pick(REFUSALS)
    known: list[str] = []  # a few things that the world has: "crabs, keys and stars"
    while len(known) < min(3, len(world.nouns)):
        name = NOUNS[draws.pick(world.nouns)].plural
        known += [name] if name not in known else []
    return Turn(kind, request, reply.format(x=thing, known=listed(known)))


def _draw(scene: Scene, world: World, draws: Draws) -> Turn:
    """Ask for a scene; where the request leaves the background open, the reply chooses it."""
    phrases = [phrase(thing) for thing in scene.things]
    words = listed(phrases) if scene.relation is None else f" {RELATION_PHRASES[scene.relation][0]} ".join(phrases)
    whole = f"{words} on {article(scene.background)} {scene.background} background"
    request = draws.pick(wordings(REQUESTS, world.config.split)).format(x=words if draws.chance(0.25) else whole)
    offer = draws.pick(OFFERS).format(x=whole)
    request = _spoken(request, draws)
    return Turn("draw", request, "" if draws.chance(SILENT) else offer[0].upper() + offer[1:], scene)


def _change(scene: Scene, world: World, number: int, draws: Draws) -> Turn:
    change = edit(scene, world, number)
    words = draws.pick(wordings(CHANGES, world.config.split)).format(x=change.instruction)
    done = draws.pick(DONE)
    reply = "" if draws.chance(SILENT) else done
    return Turn("change", _spoken(words, draws), reply, change.target, change=change)


def _question(scene: Scene, world: World, draws: Draws) -> Turn:
    question = draws.pick(questions(scene, draws.below(1 << 20), seed=int(world.config.split == "heldout")))
    reply = question.answer[0].upper() + question.answer[1:] + "."
    return Turn("question", _spoken(question.question, draws), reply, answer=question.answer)


# --- the words that a model of a world knows --------------------------------------------------------------------------

SCENES = 800  # scenes whose captions are read; every template and noun comes up
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
ODD_PLURALS = {
    "cattle": "cattle",
    "fungus": "fungi",
    "grapes": "grapes",
    "loaf": "loaves",
    "pancakes": "pancakes",
    "swine": "swine",
}


def plural(name: str) -> str:
    """Return the plural of another name of a thing: "puppies", "bunches of flowers"."""
    name, of, rest = name.partition(" of ")
    if name in ODD_PLURALS:
        name = ODD_PLURALS[name]
    elif name.endswith("y") and name[-2] not in "aeiou":
        name = f"{name[:-1]}ies"
    else:
        name += "es" if name.endswith(("s", "x", "z", "ch", "sh")) else "s"
    return name + of + rest


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
            names |= {plural(other): noun.plural, other: noun.name}
    return Vocabulary(
        words=tuple(word for word, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))),
        things=world.nouns,
        colours=world.backgrounds,
        examples={"draw": tuple(captions[:EXAMPLES]), "edit": tuple(instructions[:EXAMPLES])},
        synonyms=names,
        english=tuple(sorted(w for w in english - known if WORD.fullmatch(w) and not near.isdisjoint(shortened(w)))),
    )
