"""A process that renders chat templates, `python -P render.py`; `chat` starts it, and ends it when it takes too long.

A template is a program that came with a downloaded model. Jinja's sandbox keeps it from Python's internals; a process
with little memory keeps its loops and its output from ours. Requests and answers are lines of JSON.

Filters, functions and options are those of transformers' `apply_chat_template`.
"""

from __future__ import annotations

import json
import signal
import sys
from contextlib import suppress
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

MEMORY = 1 << 30  # bytes of address space, of which Python and Jinja take a tenth
MAX_OUTPUT = 4_000_000  # characters of one rendering
LEARNED, END_LEARNED = "\ufdd1", "\ufdd2"
"""stand around what a template marks as the assistant's own words ({% generation %})"""


class Generation(Extension):
    """`{% generation %} ... {% endgeneration %}`: the assistant's own words, which training learns."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

    def _marked(self, caller: Any) -> str:
        return f"{LEARNED}{caller()}{END_LEARNED}"


class Namespace(jinja2.utils.Namespace):
    """A namespace without names that begin with an underscore."""

    def __init__(*arguments: Any, **values: Any) -> None:
        self, *rest = arguments
        attributes = dict(*rest, **values)
        for name in attributes:
            _check_name(name)
        jinja2.utils.Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"names of a namespace cannot begin with an underscore, found {name!r}")


class Dictionary:
    """`dict` without its class, by which a template could leave the sandbox."""

    def __call__(self, *arguments: Any, **values: Any) -> dict[Any, Any]:
        return dict(*arguments, **values)

    def fromkeys(self, *arguments: Any) -> dict[Any, Any]:
        return dict.fromkeys(*arguments)


def _raise(message: Any) -> None:
    raise TemplateError(message)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@lru_cache(maxsize=4)
def compiled(source: str) -> jinja2.Template:
    """Return a template as transformers compiles it."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {"raise_exception": _raise, "dict": Dictionary(), "namespace": Namespace}
    return environment.from_string(source)


def render(request: dict[str, Any]) -> dict[str, Any]:
    """Return `{"texts": [...]}`, or `{"error": reason}` in one line."""
    now = request["now"]

    def strftime_now(pattern: str) -> str:
        return (datetime.now() if now is None else datetime.fromisoformat(now)).strftime(pattern)

    texts = []
    try:
        template = compiled(request["template"])
        for values in request["calls"]:
            texts.append(template.render(**request["variables"], **values, strftime_now=strftime_now))
            if len(texts[-1]) > MAX_OUTPUT:
                return {"error": f"expected at most {MAX_OUTPUT} characters, found {len(texts[-1])}"}
            texts[-1].encode()
    except TemplateError as error:
        line = f"line {error.lineno}: " if isinstance(error, jinja2.TemplateSyntaxError) else ""
        return {"error": f"{line}{error.message}"}
    except MemoryError:
        return {"error": f"expected a template that needs less than {MEMORY >> 20} MB, found one that needs more"}
    except Exception as error:  # a template can raise anything
        return {"error": f"{type(error).__name__}: {error}"}
    return {"texts": texts}


def main() -> None:
    with suppress(ImportError, ValueError, OSError):  # Windows has no limits of this kind
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all of a terminal's processes, and is for another
    sys.stdout.write("{}\n")
    sys.stdout.flush()
    for line in sys.stdin:
        sys.stdout.write(json.dumps(render(json.loads(line))) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
