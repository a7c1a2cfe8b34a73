# SPDX-License-Identifier: Apache-2.0
"""The tools that a prompt offered, and which of them a model means that writes another name.

Names are as they stand behind `to=`: functions.weather, browser.search, python. A name that may
mean two of them means neither. Knows no headers; `header.py` asks.
"""

import re
from collections import Counter
from collections.abc import Iterable

from gptoss_jax.harmony.messages import FUNCTIONS
from gptoss_jax.harmony.tools import BUILTIN_NAMES, ROLES

# A name with what models put around it: other namespaces ahead, JSON or punctuation behind.
_WRITTEN = re.compile(r"\W*(?:(?:functions?|tools?)[./:]+)*([\w-]+(?:\.[\w-]+)*)")


class Offers:
    """Looks names up. Of the offered functions.weather all of these are other names: weather,
    tools.weather, functions/weather, functions.weatherjson, "functions.weather"."""

    def __init__(self, names: str | Iterable[str] = ()):
        self._names = frozenset([names] if isinstance(names, str) else names)
        short = Counter(name.rpartition(".")[2] for name in self._names)
        self._meant = {name.rpartition(".")[2]: name for name in self._names}
        self._meant = {word: name for word, name in self._meant.items() if short[word] == 1}
        self._meant |= {name.removeprefix(FUNCTIONS): name for name in self._names}

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

    def has(self, word: str) -> bool:
        """Whether a word that stands by itself can only name a tool: one that was offered, a
        function or a page of the browser. Without an offer `python` may be a content type."""
        if word.startswith(FUNCTIONS):
            return names_a_tool(word)
        return self.meant_by(word)[0] in self._names or (word in BUILTIN_NAMES and "." in word)


def names_a_tool(recipient: str) -> bool:
    """Whether it names anyone at all: `to=functions.` does not."""
    return recipient not in ("", "functions") and recipient[-1] != "."
