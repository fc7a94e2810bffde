"""Check docstrings, comments and names against the project's rules of prose (CONTRIBUTING.md).

    python tools/prose.py src/transfuse/inference        one line per offence: file, line, what is wrong

A docstring begins with a whole sentence or a noun phrase, its first line has at most 25 words and ends with a period.
Comments, docstrings and messages avoid the words listed here; names say what was found, not that it was.
"""

import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

FRAGMENTS = {"what", "of", "how", "whether", "where", "which", "that", "who", "whose", "when", "why", "if", "as", "for"}
NAMES = {"found", "one", "some", "said", "asked", "those", "theirs"}
PHRASES = (
    "anew", "can not", "so many", "likeliest", "dearest", "foretell", "for there", "is said", "is told", "are told",
    "are said", "of its own", "of their own", "what there is", "that there is not", "that is not there",
    "one that is not", "has it", "goes on", "went on", "lies", "lie", "behind", "beside",
)  # fmt: skip
WORDS = re.compile(r"\b(" + "|".join(re.escape(phrase) for phrase in PHRASES) + r")\b", re.IGNORECASE)
LONGEST_FIRST_LINE = 25


def offences(path: Path) -> Iterator[str]:
    """Yield `file:line: what is wrong` for each offence in a Python file."""
    source = path.read_text(encoding="utf-8")
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node)
            if docstring is not None:
                line = getattr(node, "lineno", 1)
                yield from (f"{path}:{line}: {wrong}" for wrong in wrong_with_docstring(docstring))
        for name in names_bound(node):
            if name in NAMES:
                yield f"{path}:{getattr(node, 'lineno', 1)}: the name `{name}` does not tell what it holds"
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if tokenize.tok_name[token.type] in ("COMMENT", "STRING", "FSTRING_MIDDLE"):
            for match in WORDS.finditer(token.string):
                line = token.start[0] + token.string.count("\n", 0, match.start())
                yield f"{path}:{line}: the words `{match[0]}`"


def wrong_with_docstring(docstring: str) -> Iterator[str]:
    """Yield what is wrong with the beginning of a docstring."""
    sentence = docstring.split("\n\n")[0].replace("\n", " ")
    first = re.match(r"[\w']+", sentence)
    if sentence[0].islower() or (first and first[0].lower() in FRAGMENTS):
        yield f"a docstring begins as a fragment: {sentence[:60]!r}"
    # The first sentence ends at a period, colon or semicolon followed by a space or the end.
    words = re.split(r"[.:;](?:\s|$)", sentence)[0].split()
    if len(words) > LONGEST_FIRST_LINE:
        yield f"a docstring's first sentence has {len(words)} words, at most {LONGEST_FIRST_LINE}: {sentence[:60]!r}"


def names_bound(node: ast.AST) -> Iterator[str]:
    """Yield the names that a node binds: arguments, assigned variables, functions and classes."""
    match node:
        case ast.arg(arg=name) | ast.FunctionDef(name=name) | ast.ClassDef(name=name):
            yield name
        case ast.Name(id=name, ctx=ast.Store()):
            yield name


def main(roots: list[str]) -> int:
    """Print every offence under the given files and folders; return 1 if there is any."""
    files = [path for root in map(Path, roots) for path in ([root] if root.is_file() else sorted(root.rglob("*.py")))]
    lines = [line for path in files for line in offences(path)]
    print("\n".join(lines))
    print(f"{len(lines)} offences in {len(files)} files", file=sys.stderr)
    return int(bool(lines))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
