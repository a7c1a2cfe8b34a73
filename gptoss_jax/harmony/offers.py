# SPDX-License-Identifier: Apache-2.0
"""The tools that a prompt offered, and which of them a model means that writes another name.

Names are as they stand behind `to=`: functions.weather, browser.search, python. A name that may
mean two of them means neither. Knows no headers; `header.py` asks.
"""

import re
from collections.abc import Iterable

from gptoss_jax.harmony.messages import CHANNELS, FUNCTIONS
from gptoss_jax.harmony.tools import BUILTIN_NAMES, ROLES

_ORDINARY = {*ROLES, *CHANNELS, "all", "json", "code", "text", "markdown"}
# A name with what models put around it: other namespaces ahead, JSON or punctuation behind.
_WRITTEN = re.compile(r"\W*(?:(?:functions?|tools?)[./:]+)*([\w-]+(?:\.[\w-]+)*)")


class Offers:
    """Looks names up. Of the offered functions.weather all of these are other names: weather,
    tools.weather, functions/weather, functions.weatherjson, "functions.weather"."""

    def __init__(self, names: str | Iterable[str] = ()):
        self._names = frozenset([names] if isinstance(names, str) else names)
        shorter: dict[str, set[str]] = {}
        for name in self._names:
            for word in {name.rpartition(".")[2], name.removeprefix(FUNCTIONS)}:
                shorter.setdefault(word, set()).add(name)
        self._meant = {word: found.pop() for word, found in shorter.items() if len(found) == 1}

    def meant_by(self, written: str) -> tuple[str, str | None]:
        """The name of the tool that was meant, and a content type that was glued to it; what was
        `written` if that is the name, or nothing that was offered."""
        found = _WRITTEN.match(written)
        if written in self._names or written in (*ROLES, "all") or not found:
            return written, None
        bare = found[1]
        if bare in self._meant:
            return self._meant[bare], None
        unglued = bare.removesuffix("json")
        if unglued != bare and unglued in self._meant:
            return self._meant[unglued], "json"
        return written, None

    def names(self, word: str) -> bool:
        """Whether a word that stands by itself is plainly a tool: a function, or a page of the
        browser, or an offered name with a namespace."""
        if word.startswith(FUNCTIONS):
            return names_a_tool(word)
        return "." in word and (word in self._names or word in BUILTIN_NAMES)

    def knows(self, word: str) -> bool:
        """Whether a word is short for an offered tool, and no ordinary word of a header."""
        return word in self._meant and word not in _ORDINARY


def names_a_tool(recipient: str) -> bool:
    """Whether it names anyone at all: `to=functions.` does not."""
    return recipient not in ("", "functions") and recipient[-1] != "."
