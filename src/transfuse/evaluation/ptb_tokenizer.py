"""Captions split into words as COCO's code does: lower case, clitics apart, without punctuation.

    cut = open_words("")                                     # our own, which needs no Java
    cut = open_words("stanford-corenlp-3.4.1.jar")           # Stanford's, by java; or "pycocoevalcap", which brings it
    cut(["A dog can't run."])                                # [["a", "dog", "ca", "n't", "run"]]

`tokenize` equals Stanford's PTBTokenizer 3.4.1 with pycocoevalcap's flags on the captions of the tests; it differed in
2 of 2,500 definitions of WordNet. Of that one's lists (abbreviations, assimilations such as "gonna") it has the common
words. Which of the two it was is part of a result: nothing that happens to be installed changes a number.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile, ZipFile

from ..errors import UserError
from ..io import sha256

PACKAGE, JAR = "pycocoevalcap", "stanford-corenlp-3.4.1.jar"
MAIN = "edu.stanford.nlp.process.PTBTokenizer"
FLAGS = ("-preserveLines", "-lowerCase")
"""pycocoevalcap's"""
STANFORD_DROPPED = {*"'`.?!,:-;", "''", "``", "--", "...", "-LRB-", "-RRB-", "-LCB-", "-RCB-"}
"""its punctuation; the brackets in capitals never come, since words are in lower case by then: they stay as words"""


@dataclass(frozen=True)
class Words:
    """Cuts texts into words, all at once. name: what a result says of it."""

    name: str
    cut: Callable[[Sequence[str]], list[list[str]]]

    def __call__(self, texts: Sequence[str]) -> list[list[str]]:
        return self.cut(texts)


def open_words(jar: str) -> Words:
    """Open our own tokenizer (""), Stanford's (the path of a jar), or the jar of the package "pycocoevalcap".

    Raises UserError as `check_words`; its words where java fails.
    """
    if not jar:
        return Words("PTB-like tokens", lambda texts: [tokenize(text) for text in texts])
    java, path = check_words(jar)
    return Words(f"Stanford PTBTokenizer ({path.name}@{sha256(path)[:8]})", lambda texts: _stanford(java, path, texts))


def check_words(jar: str) -> tuple[str, Path]:
    """The java and the jar that are needed, "" for neither. Raises UserError where one is missing or another."""
    if not jar:
        return "", Path()
    path = Path(jar)
    if jar == PACKAGE:
        spec = importlib.util.find_spec(PACKAGE)
        if spec is None or not spec.submodule_search_locations:
            raise UserError(
                f"--ptb-jar: expected the package {PACKAGE}, found none; install it with pip, or give a jar"
            )
        path = Path(next(iter(spec.submodule_search_locations)), "tokenizer", JAR)
    wanted = f"--ptb-jar: expected {JAR} with Stanford's PTBTokenizer, as {PACKAGE} brings it"
    if not path.is_file():
        raise UserError(f"{wanted}, found no {path}")
    try:
        with ZipFile(path) as archive:
            archive.getinfo(f"{MAIN.replace('.', '/')}.class")
    except (OSError, BadZipFile, KeyError):
        raise UserError(f"{wanted}, found something else in {path}") from None
    java = shutil.which("java")
    if java is None:
        raise UserError("--ptb-jar: expected java on the PATH, found none; without the option no Java is needed")
    return java, path


def _stanford(java: str, jar: Path, texts: Sequence[str]) -> list[list[str]]:
    """A line a text, in and out."""
    lines = [" ".join(text.split()) for text in texts]
    command = [java, "-cp", str(jar), MAIN, *FLAGS]
    try:
        process = subprocess.run(command, input="".join(f"{line}\n" for line in lines).encode(), capture_output=True)
    except OSError as error:
        raise UserError(f"--ptb-jar: {java}: expected java, found what does not run ({error.strerror})") from None
    message = process.stderr.decode(errors="replace").strip().splitlines() or ["nothing"]
    if process.returncode:
        raise UserError(f"--ptb-jar: {java}: expected words, found exit code {process.returncode} ({message[0]})")
    cut = process.stdout.decode().split("\n")[:-1]
    if len(cut) != len(lines):
        raise UserError(f"--ptb-jar: {java}: expected a line of words for each of {len(lines)}, found {len(cut)}")
    return [[word for word in line.split(" ") if word and word not in STANFORD_DROPPED] for line in cut]


# --- our own ----------------------------------------------------------------------------------------------------------

_ABBREVIATIONS = (
    "mr|mrs|ms|dr|st|jr|sr|vs|etc|inc|co|ltd|corp|prof|rev|gen|col|lt|sgt|capt|mt|ave|blvd|"
    "jan|feb|mar|apr|jun|jul|aug|sep|sept|oct|nov|dec"
)
_TOKEN = re.compile(
    rf"""
    (?:https?://\S+|www\.\S+)                            # addresses
    | (?:{_ABBREVIATIONS})\.(?!\w)              # a full stop that belongs to the word
    | no\.(?=\s*\d)
    | (?:[a-z]\.){{2,}}                                  # u.s., a.m.
    | \d+(?:[.,:/]\d+)+                                  # 1,000  3.5  12:30  1/2
    | '(?:n'|\d0s)                                       # rock 'n' roll, the '90s
    | c\+\+
    | [^\W_]+(?:(?:[-_&@./]|'(?=\D))(?=[^\W_])[^\W_]+)*   # words, with hyphens and all
    | '(?:s|m|d|re|ve|ll)\b
    | \.\.\.+ | --+ | \S
    """,
    re.VERBOSE,
)
_CLITIC = re.compile(r"^(.+?)(n't|'(?:s|m|d|re|ve|ll))$")
_SPLIT = {
    "cannot": ("can", "not"),
    "gonna": ("gon", "na"),
    "gotta": ("got", "ta"),
    "wanna": ("wan", "na"),
    "gimme": ("gim", "me"),
    "lemme": ("lem", "me"),
    "y'all": ("y'", "all"),
}
# Brackets stay, as words: the original drops them in capitals, after they were written small.
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_DROPPED = {*"'`\".?!,:;-–—…", "''", "``", "--", "..."}


def tokenize(text: str) -> list[str]:
    """Words in lower case, clitics apart, punctuation left out."""
    words: list[str] = []
    text = text.lower().replace("\n", " ").replace("’", "'").replace("“", '"').replace("”", '"')
    for token in _TOKEN.findall(text):
        if token in _DROPPED or set(token) <= {".", "-"}:
            continue
        match = _CLITIC.match(token)
        if token in _BRACKETS:
            words.append(_BRACKETS[token])
        elif match:
            words += _SPLIT.get(match[1], (match[1],))
            words.append(match[2])
        else:
            words += _SPLIT.get(token, (token,))
    return words
