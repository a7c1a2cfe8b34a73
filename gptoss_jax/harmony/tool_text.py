# SPDX-License-Identifier: Apache-2.0
"""How tools are shown to the model: as TypeScript, which the Harmony library writes.

The library gives token ids, so its text is read back from them. It takes very long for long texts
without spaces, so these are marked, and put into its text afterwards. What TypeScript cannot show
($ref, anyOf) becomes `any`. This file knows no messages; `system_text.py` says where tools stand.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from gptoss_jax.harmony.library import harmony_library, library_encoding
from gptoss_jax.harmony.tools import FunctionTool, ToolNamespace

LONG = 200  # characters that the library is given of one text; a longer one is marked
_MARK = "\ue000"  # of the private use area; more of them where the texts have such themselves


def tools_text(tools: Sequence[str | ToolNamespace]) -> str:
    """The section `# Tools`: namespaces by name, functions as TypeScript.

    "browser" and "python" are those that the model was trained with. Raises ValueError for what the
    library cannot show.
    """
    library = harmony_library()
    marks = _Marks(tools)
    content = library.DeveloperContent.new()
    for tool in tools:
        content = content.with_tools(_library_namespace(tool, marks))
    message = library.Message.from_role_and_content(library.Role.DEVELOPER, content)
    try:
        ids = library_encoding().render(message)
    except (library.HarmonyError, ValueError) as error:
        raise ValueError(
            f"tools: expected what the library can show, got {str(error)!r}; simplify the tools"
        ) from error
    text = library_encoding().decode(ids)
    return marks.replaced(text.partition("<|message|>")[2].removesuffix("<|end|>"))


class _Marks:
    """Long texts, and what stands for each of them until the library has written its part."""

    def __init__(self, tools: Sequence[str | ToolNamespace]):
        self._numbers: dict[str, int] = {}
        self._mark = _MARK
        while repr(self._mark)[1:-1] in repr(tools):
            self._mark += _MARK

    def short(self, text: str) -> str:
        """The text itself, or its mark; equal texts have the same one."""
        text = clean(text)
        if len(text) <= LONG:
            return text
        number = self._numbers.setdefault(text, len(self._numbers))
        return f"{self._mark}{number}{self._mark}"

    def lines(self, text: str) -> str:
        """The same line by line: the library puts `//` before each."""
        return "\n".join(self.short(line) for line in text.split("\n"))

    def schema(self, value: Any, *, as_json: bool = False) -> Any:
        """A JSON schema whose long texts are marked.

        A default that is no text is shown `as_json`, and so is what stands for a text in it.
        """
        if isinstance(value, str):
            spelled = json.dumps(clean(value), ensure_ascii=False)[1:-1]
            return self.short(spelled) if as_json and len(value) > LONG else self.short(value)
        if isinstance(value, list | tuple):
            return [self.schema(part, as_json=as_json) for part in value]
        if not isinstance(value, Mapping):
            return value
        return {
            self.schema(str(key), as_json=as_json): self.schema(
                part, as_json=as_json or (key == "default" and not isinstance(part, str))
            )
            for key, part in value.items()
        }

    def replaced(self, text: str) -> str:
        """The library's text with the long ones in their places."""
        mark, texts = re.escape(self._mark), list(self._numbers)
        return re.sub(f"{mark}([0-9]+){mark}", lambda found: texts[int(found[1])], text)


def _library_namespace(tool: str | ToolNamespace, marks: _Marks) -> Any:
    config = harmony_library().ToolNamespaceConfig
    if isinstance(tool, str):
        return getattr(config, tool)()
    describe = harmony_library().ToolDescription.new
    return config(
        name=tool.name,
        description=_description(tool, marks) or None,
        tools=[
            describe(function.name, marks.lines(function.description), _parameters(function, marks))
            for function in tool.tools
        ],
    )


def _description(tool: ToolNamespace, marks: _Marks) -> str:
    """The text of a namespace; one without tools is shown as it is, however many its lines."""
    if tool.tools:
        return marks.lines(tool.description)
    return marks.short(tool.description.replace("\r\n", "\n").removesuffix("\n"))


def _parameters(function: FunctionTool, marks: _Marks) -> dict[str, Any] | None:
    """The schema as the library wants it; None, which it writes `()`, where there are none.

    An object of which nothing is known but that it is one may still be given anything.
    """
    schema = function.parameters
    if schema is None:
        return None
    takes_nothing = schema.get("type") == "object" and not schema.get("properties")
    shows_more = schema.keys() & {"description", "oneOf"} or schema.get("additionalProperties")
    return None if takes_nothing and not shows_more else marks.schema(schema)


def clean(text: str) -> str:
    """`text` with lone surrogates replaced by U+FFFD, since no token can hold them."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
