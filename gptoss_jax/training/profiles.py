# SPDX-License-Identifier: Apache-2.0
"""Whose rules a dataset is held against: ours, or those of a service that it may be sent to.

A profile says what is wrong with a file and with each of its rows; `check.py` reads the files and
counts. "together" has the rules of Together's 1.x client, "openai" those of OpenAI's cookbook; the
kinds of faults have the names that their own reports use.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from gptoss_jax.harmony.from_openai import Problem
from gptoss_jax.training.sources import SUFFIXES

MAX_IMAGES = 10  # of a conversation at Together
MAX_IMAGE_BYTES = 10 * 2**20
_IMAGE_HEADS = tuple(f"data:image/{kind};base64," for kind in ("jpeg", "png", "webp"))
_MAX_IMAGE_URL = len(_IMAGE_HEADS[0]) + 4 * MAX_IMAGE_BYTES // 3


class Fault(NamedTuple):
    """A broken rule: its short name, the JSON path, and what is expected and what to do."""

    kind: str
    at: str
    text: str
    is_warning: bool = False


class Harmony:
    """What `gptoss finetune` needs: every row is a conversation, or text, that it can read."""

    suffixes: tuple[str, ...] = SUFFIXES
    max_bytes: int | None = None
    min_rows = 0  # of a file; 0: all files together have some
    reads_functions = True  # of Python, which make rows
    reads_parquet = True  # row by row, not its columns alone

    def columns(self, names: Sequence[str]) -> list[Fault]:
        """What is wrong with the columns of a Parquet file whose rows are not read."""
        return []

    def row(self, fields: dict[str, Any], problems: Sequence[Problem]) -> list[Fault]:
        """What is wrong with a row, which `problems` keep from being a conversation."""
        kinds = {"row": "format"}
        return [Fault(kinds.get(path, "field"), path, text) for path, text in problems]


class OpenAI(Harmony):
    """OpenAI's cookbook, and at least ten rows, as its service wants them."""

    suffixes = (".jsonl",)
    reads_functions = False
    min_rows = 10
    ROLES = ("system", "user", "assistant", "function")
    KEYS = frozenset({"role", "content", "name", "function_call", "weight"})
    COLUMNS = frozenset({"messages", "tools", "functions", "parallel_tool_calls"})

    def row(self, fields: dict[str, Any], problems: Sequence[Problem]) -> list[Fault]:
        messages = fields.get("messages")
        if not messages or type(messages) is not list:
            text = f"expected a list of messages, got {_short(messages)}; write one"
            return [Fault("missing_messages_list", "messages", text)]
        faults = [
            Fault("column", name, "may be refused as an unknown column; omit it", True)
            for name in sorted(fields.keys() - self.COLUMNS)
        ]
        has_answer = False
        for index, message in enumerate(messages):
            if self._is_wrong(message):
                faults += self._message(f"messages[{index}]", message)
            has_answer |= type(message) is dict and message.get("role") == "assistant"
        if not has_answer:
            text = "expected a message of the assistant, got none; add what is to be learnt"
            faults.append(Fault("example_missing_assistant_message", "messages", text))
        return faults

    def _is_wrong(self, message: Any) -> bool:
        """Whether `_message` may find something; it costs less to ask."""
        if type(message) is not dict or not message.keys() <= self.KEYS:
            return True
        content = message.get("content")
        return message.get("role") not in self.ROLES or type(content) is not str or not content

    def _message(self, at: str, message: Any) -> Iterator[Fault]:
        if type(message) is not dict:
            text = f"expected an object, got {_short(message)}; write role and content"
            yield Fault("data_type", at, text)
            return
        for key in ("role", "content"):
            if key not in message:
                text = "expected it in every message, got none; add it"
                yield Fault("message_missing_key", f"{at}.{key}", text)
        if not message.keys() <= self.KEYS:
            for key in sorted(message.keys() - self.KEYS):
                text = f"expected only {', '.join(sorted(self.KEYS))}; omit it"
                yield Fault("message_unrecognized_key", f"{at}.{key}", text)
        role, content = message.get("role"), message.get("content")
        if role not in self.ROLES:
            text = f"expected one of {', '.join(self.ROLES)}, got {_short(role)}; correct it"
            yield Fault("unrecognized_role", f"{at}.role", text)
        if type(content) is not str or not (content or message.get("function_call")):
            text = f"expected text, got {_short(content)}; write what was said"
            yield Fault("missing_content", f"{at}.content", text)


class Together(Harmony):
    """Together's client, version 1: the strict local check before it uploads."""

    suffixes = (".jsonl", ".parquet")
    max_bytes = int(50.1 * 2**30)
    min_rows = 1
    reads_functions = reads_parquet = False
    FORMATS = {
        "text": ("text",),
        "messages": ("messages",),
        "prompt and completion": ("prompt", "completion"),
        "preference": ("input", "preferred_output", "non_preferred_output"),
    }
    _NEEDS = [(name, frozenset(needs)) for name, needs in FORMATS.items()]
    PARQUET = ("input_ids", "attention_mask", "labels")
    ROLES = ("system", "user", "assistant")

    def __init__(self) -> None:
        self._format: str | None = None  # of the first row

    def columns(self, names: Sequence[str]) -> list[Fault]:
        faults = [
            Fault("format", name, f"expected only {', '.join(self.PARQUET)}; leave it out")
            for name in names
            if name not in self.PARQUET
        ]
        if "input_ids" not in names:
            text = (
                f"expected this column, got {', '.join(names) or 'none'}; Parquet holds token ids"
            )
            faults.append(Fault("format", "input_ids", text))
        return faults

    def row(self, fields: dict[str, Any], problems: Sequence[Problem]) -> list[Fault]:
        found = [name for name, needs in self._NEEDS if needs <= fields.keys()]
        if len(found) != 1:
            return [self._no_format(fields, found)]
        return [*self._rules(fields, found[0])]

    def _no_format(self, fields: dict[str, Any], found: Sequence[str]) -> Fault:
        got = ", ".join(map(str, fields)) or "none"
        if found:
            text = f"expected the columns of one format, got {' and '.join(found)}; keep one"
        else:
            known = "; ".join(", ".join(needs) for needs in self.FORMATS.values())
            text = f"expected the columns {known}; got {got}; rename them"
        return Fault("format", "row", text)

    def _rules(self, fields: dict[str, Any], name: str) -> Iterator[Fault]:
        needs = self.FORMATS[name]
        if len(fields) != len(needs):
            for column in sorted(fields.keys() - {*needs}):
                yield Fault("format", column, f"expected only {', '.join(needs)}; leave it out")
        self._format = self._format or name
        if name != self._format:
            text = f"expected {self._format}, as in the first row, got {name}; split the file"
            yield Fault("format", "row", text)
        if name == "messages":
            yield from self._messages("messages", fields["messages"])
        elif name == "preference":
            yield from self._preference(fields)
        else:
            for column in needs:
                role = "assistant" if column == "completion" else "user"
                faults, images = _content(column, fields[column], role)
                yield from faults
                yield from _too_many_images(column, images or 0)

    def _messages(self, at: str, messages: Any, *, is_prompt: bool = False) -> Iterator[Fault]:
        if type(messages) is not list or not messages:
            text = f"expected a list of at least one message, got {_short(messages)}; write one"
            yield Fault("key_value", at, text)
            return
        roles: list[Any] = []
        images: list[int | None] = []  # of each message; None for plain text
        for index, message in enumerate(messages):
            where = f"{at}[{index}]"
            if type(message) is not dict:
                text = f"expected an object, got {_short(message)}; write role and content"
                yield Fault("key_value", where, text)
                continue
            role = message.get("role")
            if role not in self.ROLES or (roles and roles[-1] == role):
                yield from self._role(where, message)
            if "content" in message:
                faults, count = _content(f"{where}.content", message["content"], role)
                yield from faults
                images.append(count)
            else:
                yield Fault("key_value", f"{where}.content", "expected it, got none; add it")
                count = None
            if "weight" in message:
                yield from self._weight(f"{where}.weight", message["weight"], count)
            roles.append(role)
        if None in images and any(count is not None for count in images):
            text = "expected all text or all lists of parts, got both; write all in one way"
            yield Fault("key_value", at, text)
        yield from _too_many_images(at, sum(filter(None, images)))
        if not is_prompt and "assistant" not in roles:
            text = "expected a message of the assistant, got none; add what is to be learnt"
            yield Fault("key_value", at, text)
        if is_prompt and roles and roles[-1] == "assistant":
            text = (
                "expected the last message from another than the assistant; move it to the outputs"
            )
            yield Fault("key_value", f"{at}[{len(messages) - 1}].role", text)

    def _role(self, where: str, message: dict[str, Any]) -> Iterator[Fault]:
        role = message.get("role")
        if role in self.ROLES:
            text = f"expected another role than in the message before, got {role}; join the two"
        elif "role" in message:
            text = f"expected one of {', '.join(self.ROLES)}, got {_short(role)}; correct it"
        else:
            text = "expected it in every message, got none; add it"
        yield Fault("key_value", f"{where}.role", text)

    def _weight(self, at: str, weight: Any, images: int | None) -> Iterator[Fault]:
        if not isinstance(weight, int) or weight not in (0, 1):
            yield Fault("key_value", at, f"expected 0 or 1, got {_short(weight)}; correct it")
        elif weight and images:
            yield Fault("key_value", at, "expected 0 on a message with an image, got 1; omit it")

    def _preference(self, fields: dict[str, Any]) -> Iterator[Fault]:
        prompt = fields["input"]
        if type(prompt) is not dict or "messages" not in prompt:
            text = f"expected an object with messages, got {_short(prompt)}; write it so"
            yield Fault("key_value", "input", text)
        else:
            yield from self._messages("input.messages", prompt["messages"], is_prompt=True)
        for column in ("preferred_output", "non_preferred_output"):
            yield from self._output(column, fields[column])

    def _output(self, column: str, outputs: Any) -> Iterator[Fault]:
        message = outputs[0] if type(outputs) is list and len(outputs) == 1 else None
        if type(message) is not dict or message.get("role") != "assistant":
            text = "expected a list of one message of the assistant"
            yield Fault("key_value", column, f"{text}, got {_short(outputs)}; write it so")
        elif "content" not in message:
            yield Fault("key_value", f"{column}[0].content", "expected it, got none; add it")
        else:
            yield from _content(f"{column}[0].content", message["content"], "assistant")[0]


PROFILES = {"harmony": Harmony, "together": Together, "openai": OpenAI}


def _content(at: str, content: Any, role: Any) -> tuple[list[Fault], int | None]:
    """What is wrong with Together's content, and how many images it has; None is plain text."""
    if type(content) is str:
        return [], None
    if type(content) is not list:
        text = f"expected text or a list of parts, got {_short(content)}; write text"
        return [Fault("key_value", at, text)], None
    faults: list[Fault] = []
    images = 0
    for index, part in enumerate(content):
        kind = part.get("type") if type(part) is dict else None
        images += kind == "image_url"
        wrong = _wrong_with_part(part, kind, role)
        if wrong:
            faults.append(Fault("key_value", f"{at}[{index}]", wrong))
    return faults, images


def _wrong_with_part(part: Any, kind: Any, role: Any) -> str | None:
    if kind == "text":
        if type(part.get("text")) is str:
            return None
        return f"expected text in a part of type text, got {_short(part.get('text'))}; add it"
    if kind != "image_url":
        return f"expected a part of type text or image_url, got {_short(part)}; correct it"
    if role != "user":
        return "expected images from the user alone, got one from another; leave it out"
    image = part.get("image_url")
    url = image.get("url") if type(image) is dict else None
    if type(url) is not str or not url.startswith(_IMAGE_HEADS):
        return f"expected image_url.url as {_IMAGE_HEADS[0]}..., or png or webp, got {_short(url)}"
    if len(url) > _MAX_IMAGE_URL:
        return (
            f"expected an image of at most 10 MiB, got {len(url) * 3 // 4} bytes; make it smaller"
        )
    return None


def _too_many_images(at: str, images: int) -> Iterator[Fault]:
    if images > MAX_IMAGES:
        text = f"expected at most {MAX_IMAGES} images, got {images}; leave some out"
        yield Fault("key_value", at, text)


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 80 else shown[:80] + "..."
