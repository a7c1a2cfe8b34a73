# SPDX-License-Identifier: Apache-2.0
"""Good and bad files of training data, and what is wrong with each by Together's rules.

The verdicts were worked out by hand from the rules as the service states them; nothing here knows
the code that is tested. `wrong` lists every fault as (line, JSON path); a file without any is good.
"""

import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow
import pyarrow.parquet

WHOLE = None  # the line of a fault that is the file's, not a row's


class Case(NamedTuple):
    """A file: its name, its bytes (or what makes it, given its path), and its faults."""

    name: str
    content: bytes | Callable[[Path], None]
    wrong: tuple[tuple[int | None, str], ...] = ()


def write(case: Case, folder: Path) -> Path:
    path = folder / case.name
    if callable(case.content):
        case.content(path)
    else:
        path.write_bytes(case.content)
    return path


def lines(*rows: Any) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def says(role: Any, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def chat(*messages: Any, **more: Any) -> dict[str, Any]:
    return {"messages": list(messages), **more}


def preference(**changed: Any) -> dict[str, Any]:
    row = {
        "input": {"messages": [says("user", "2+2?")]},
        "preferred_output": [says("assistant", "4")],
        "non_preferred_output": [says("assistant", "5")],
    }
    return row | changed


def image(kind: str = "jpeg", size: int = 8) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": f"data:image/{kind};base64,{'A' * size}"}}


def part(text: Any) -> dict[str, Any]:
    return {"type": "text", "text": text}


def parquet(columns: dict[str, list], rows: int | None = None) -> Callable[[Path], None]:
    table = pyarrow.table({name: values[:rows] for name, values in columns.items()})
    return lambda path: pyarrow.parquet.write_table(table, path)


def sparse(size: int) -> Callable[[Path], None]:
    """A file of so many bytes that takes no room."""

    def make(path: Path) -> None:
        path.touch()
        os.truncate(path, size)

    return make


def bad(name: str, row: Any, *at: str) -> Case:
    """A file of this row, with faults at these places."""
    return Case(f"{name}.jsonl", lines(row), tuple((1, place) for place in at))


def reply(content: Any, **more: Any) -> dict[str, Any]:
    """A row whose answer is this."""
    return chat(ASK, says("assistant", content, **more))


def shown(*parts: Any, **more: Any) -> dict[str, Any]:
    """A row whose question has these parts."""
    return chat(says("user", list(parts), **more), says("assistant", [part("A cat.")]))


ASK, TELL = says("user", "2+2?"), says("assistant", "4")
GOOD = chat(ASK, TELL)
SEES = [part("What is this?"), image()]
WEB = {"url": "https://example.org/cat.png"}
LARGEST = 10 * 2**20 * 4 // 3  # base64 letters of an image of 10 MiB
IDS = {"input_ids": [[1, 2], [3]], "attention_mask": [[1, 1], [1]], "labels": [[-100, 2], [3]]}

GOOD_FILES = [
    Case("text.jsonl", lines({"text": "Once."}, {"text": ""})),
    Case("chat.jsonl", lines(GOOD, GOOD)),
    Case("no-last-newline.jsonl", lines(GOOD).rstrip()),
    Case("windows-newlines.jsonl", lines(GOOD, GOOD).replace(b"\n", b"\r\n")),
    Case("old-mac-newlines.jsonl", lines(GOOD, GOOD).replace(b"\n", b"\r")),
    Case("spaces.jsonl", b' \t{ "text" : "a" } \n'),
    Case("not-ascii.jsonl", '{"text": "é 漢 \U0001f600 \u2028"}\n'.encode()),
    Case("escaped-surrogate.jsonl", b'{"text": "\\ud83d"}\n'),
    Case("column-twice.jsonl", b'{"text": 1, "text": "a"}\n'),
    Case("system-first.jsonl", lines(chat(says("system", "Brief."), ASK, TELL))),
    Case("system-last.jsonl", lines(chat(ASK, TELL, says("system", "Brief.")))),
    Case("assistant-alone.jsonl", lines(chat(TELL))),
    Case("assistant-first.jsonl", lines(chat(TELL, ASK))),
    Case("ends-with-user.jsonl", lines(chat(ASK, TELL, ASK))),
    Case("four-turns.jsonl", lines(chat(*[ASK, TELL] * 4))),
    Case("empty-content.jsonl", lines(chat(says("user", ""), says("assistant", "")))),
    Case("weights.jsonl", lines(chat(ASK, {**TELL, "weight": 0}, ASK, {**TELL, "weight": 1}))),
    Case("weight-of-user.jsonl", lines(chat({**ASK, "weight": 1}, TELL))),
    # In Python, where the check runs, true is the integer 1.
    Case("weight-true.jsonl", lines(chat(ASK, {**TELL, "weight": True}))),
    Case("fields-of-a-message.jsonl", lines(chat({**ASK, "name": "ann", "id": 7}, TELL))),
    Case("prompt-completion.jsonl", lines({"prompt": "2+2?", "completion": "4"})),
    Case("text-in-parts.jsonl", lines({"text": [part("a"), part("b")]})),
    Case("no-parts.jsonl", lines({"text": []})),
    Case("prompt-in-parts.jsonl", lines({"prompt": SEES, "completion": "A cat."})),
    Case("parts.jsonl", lines(chat(says("user", [part("Hi")]), says("assistant", [part("Ho")])))),
    Case("image.jsonl", lines(shown(*SEES))),
    Case("image-weight-0.jsonl", lines(shown(*SEES, weight=0))),
    Case("kinds-of-images.jsonl", lines(shown(image("png"), image("webp")))),
    Case("ten-images.jsonl", lines(shown(*[image()] * 10))),
    Case("largest-image.jsonl", lines(shown(image(size=LARGEST)))),
    Case("preference.jsonl", lines(preference(), preference())),
    Case(
        "preference-system-last.jsonl",
        lines(preference(input={"messages": [ASK, TELL, says("system", "Again.")]})),
    ),
    Case(
        "preference-tools.jsonl",
        lines(preference(input={"messages": [ASK], "tools": [], "parallel_tool_calls": True})),
    ),
    Case(
        "preference-parts.jsonl",
        lines(preference(preferred_output=[says("assistant", [part("4")], weight=9)])),
    ),
    Case("ids.parquet", parquet(IDS)),
    Case("ids-alone.parquet", parquet({"input_ids": [[1, 2, 3]]})),
]

BAD_FILES = [
    # the file
    Case("missing.jsonl", lambda path: None, ((WHOLE, ""),)),
    Case("folder.jsonl", lambda path: path.mkdir(), ((WHOLE, ""),)),
    Case("empty.jsonl", b"", ((WHOLE, ""),)),
    Case("huge.jsonl", sparse(51 * 2**30), ((WHOLE, ""),)),
    Case("list.json", json.dumps([GOOD]).encode(), ((WHOLE, ""),)),
    Case("rows.txt", lines(GOOD), ((WHOLE, ""),)),
    Case("rows.csv", b"text\nOnce.\n", ((WHOLE, ""),)),
    Case("packed.jsonl.gz", gzip.compress(lines(GOOD), mtime=0), ((WHOLE, ""),)),
    Case("capital.JSONL", lines(GOOD), ((WHOLE, ""),)),
    # its bytes
    Case("latin-1.jsonl", '{"text": "é"}\n'.encode("latin-1"), ((1, ""),)),
    Case("utf-16.jsonl", '{"text": "é"}'.encode("utf-16"), ((1, ""),)),
    Case("cut-letter.jsonl", lines(GOOD) + '{"text": "é'.encode()[:-1], ((2, ""),)),
    Case("byte-order-mark.jsonl", b"\xef\xbb\xbf" + lines(GOOD), ((1, ""),)),
    # its lines
    Case("blank-line.jsonl", lines(GOOD) + b"\n" + lines(GOOD), ((2, ""),)),
    Case("blank-last-line.jsonl", lines(GOOD) + b"\n", ((2, ""),)),
    Case("spaces-alone.jsonl", b"   \n", ((1, ""),)),
    Case("cut.jsonl", lines(GOOD, GOOD)[:-9], ((2, ""),)),
    Case("two-on-a-line.jsonl", b'{"text": "a"} {"text": "b"}\n', ((1, ""),)),
    Case("indented.jsonl", b'{\n"text": "a"\n}\n', ((1, ""), (2, ""), (3, ""))),
    Case("single-quotes.jsonl", b"{'text': 'a'}\n", ((1, ""),)),
    Case("comma-too-many.jsonl", b'{"text": "a",}\n', ((1, ""),)),
    Case("raw-tab.jsonl", b'{"text": "a\tb"}\n', ((1, ""),)),
    bad("line-is-list", [GOOD], ""),
    bad("line-is-null", None, ""),
    Case("line-is-text.jsonl", lines(GOOD, "text"), ((2, ""),)),
    Case("line-is-number.jsonl", lines(GOOD, 7, GOOD, True), ((2, ""), (4, ""))),
    # its columns
    bad("no-columns", {}, "row"),
    bad("unknown-columns", {"question": "2+2?", "answer": "4"}, "row"),
    bad("prompt-alone", {"prompt": "2+2?"}, "row"),
    bad("sharegpt", {"conversations": []}, "row"),
    bad("preferred-alone", {"input": {}, "preferred_output": []}, "row"),
    bad("two-formats", {**GOOD, "text": "a"}, "row"),
    bad("two-extra", {"text": "a", "id": 1, "url": "b"}, "id", "url"),
    Case("tools.jsonl", lines(GOOD, {**GOOD, "tools": []}), ((2, "tools"),)),
    Case("mixed.jsonl", lines(GOOD, {"text": "a"}, GOOD), ((2, "row"),)),
    # its values
    bad("text-is-number", {"text": 1}, "text"),
    bad("text-is-null", {"text": None}, "text"),
    bad("text-is-object", {"text": {}}, "text"),
    bad("completion-list", {"prompt": "a", "completion": ["b"]}, "completion[0]"),
    bad("completion-image", {"prompt": "a", "completion": SEES}, "completion[1]"),
    bad("both-wrong", {"prompt": 1, "completion": None}, "prompt", "completion"),
    bad("eleven-in-text", {"text": [image()] * 11}, "text"),
    # its messages
    bad("messages-empty", chat(), "messages"),
    bad("messages-null", {"messages": None}, "messages"),
    bad("messages-text", {"messages": "Hi"}, "messages"),
    bad("messages-object", {"messages": {"0": ASK}}, "messages"),
    bad("message-is-text", chat(ASK, "4", TELL), "messages[1]"),
    bad("no-role", chat({"content": "a"}, TELL), "messages[0].role"),
    bad("no-content", chat({"role": "user"}, TELL), "messages[0].content"),
    bad("tool-call", chat(ASK, {"role": "assistant", "tool_calls": []}), "messages[1].content"),
    bad("content-null", reply(None), "messages[1].content"),
    bad("content-number", reply(4), "messages[1].content"),
    bad("content-object", reply({}), "messages[1].content"),
    bad("role-tool", chat(ASK, TELL, says("tool", "4")), "messages[2].role"),
    bad("role-developer", chat(says("developer", "a"), TELL), "messages[0].role"),
    bad("role-capital", chat(says("User", "a"), TELL), "messages[0].role"),
    bad("role-null", chat(says(None, "a"), TELL), "messages[0].role"),
    bad("role-list", chat(says(["user"], "a"), TELL), "messages[0].role"),
    bad("user-twice", chat(ASK, ASK, TELL), "messages[1].role"),
    bad("assistant-twice", chat(ASK, TELL, TELL), "messages[2].role"),
    bad("system-twice", chat(says("system", "a"), says("system", "b"), TELL), "messages[1].role"),
    bad("no-assistant", chat(ASK), "messages"),
    bad("weight-2", reply("4", weight=2), "messages[1].weight"),
    bad("weight-minus", reply("4", weight=-1), "messages[1].weight"),
    bad("weight-half", reply("4", weight=0.5), "messages[1].weight"),
    bad("weight-1.0", reply("4", weight=1.0), "messages[1].weight"),
    bad("weight-text", reply("4", weight="1"), "messages[1].weight"),
    bad("weight-null", reply("4", weight=None), "messages[1].weight"),
    bad("weight-of-user-3", chat({**ASK, "weight": 3}, TELL), "messages[0].weight"),
    # parts and images
    bad("mixed-parts", chat(says("user", [part("a")]), TELL), "messages"),
    bad("part-is-text", shown("a"), "messages[0].content[0]"),
    bad("part-without-type", shown({"text": "a"}), "messages[0].content[0]"),
    bad("part-of-audio", shown(part("a"), {"type": "audio"}), "messages[0].content[1]"),
    bad("part-without-text", shown({"type": "text"}), "messages[0].content[0]"),
    bad("part-of-null", shown(part(None)), "messages[0].content[0]"),
    bad("image-without-url", shown({"type": "image_url"}), "messages[0].content[0]"),
    bad("image-url-text", shown({**image(), "image_url": "a"}), "messages[0].content[0]"),
    bad("image-on-web", shown({**image(), "image_url": WEB}), "messages[0].content[0]"),
    bad("image-gif", shown(image("gif")), "messages[0].content[0]"),
    bad("image-too-large", shown(image(size=LARGEST + 1)), "messages[0].content[0]"),
    bad("image-weight-1", shown(image(), weight=1), "messages[0].weight"),
    bad("image-from-assistant", chat(says("assistant", [image()])), "messages[0].content[0]"),
    bad(
        "image-from-system",
        chat(says("system", [image()]), says("assistant", [part("b")])),
        "messages[0].content[0]",
    ),
    bad("eleven-images", shown(*[image()] * 11), "messages"),
    bad(
        "eleven-in-two",
        chat(*shown(*[image()] * 6)["messages"], says("user", [image()] * 5)),
        "messages",
    ),
    # preferences
    bad("input-is-list", preference(input=[ASK]), "input"),
    bad("input-without-messages", preference(input={}), "input"),
    bad("input-empty", preference(input={"messages": []}), "input.messages"),
    bad("input-ends", preference(input=chat(ASK, TELL)), "input.messages[1].role"),
    bad("input-user-twice", preference(input=chat(ASK, ASK)), "input.messages[1].role"),
    bad("output-is-message", preference(preferred_output=TELL), "preferred_output"),
    bad("output-empty", preference(preferred_output=[]), "preferred_output"),
    bad("output-is-text", preference(preferred_output=["4"]), "preferred_output"),
    bad("output-of-user", preference(preferred_output=[ASK]), "preferred_output"),
    bad("output-no-role", preference(preferred_output=[{"content": "4"}]), "preferred_output"),
    bad("two-outputs", preference(non_preferred_output=[TELL, TELL]), "non_preferred_output"),
    bad(
        "output-without-content",
        preference(non_preferred_output=[{"role": "assistant"}]),
        "non_preferred_output[0].content",
    ),
    bad(
        "output-null",
        preference(preferred_output=[says("assistant", None)]),
        "preferred_output[0].content",
    ),
    bad(
        "output-image",
        preference(preferred_output=[says("assistant", [image()])]),
        "preferred_output[0].content[0]",
    ),
    bad("preference-extra", preference(id=1), "id"),
    # several at once
    Case(
        "all-at-once.jsonl",
        lines(
            chat(says("user", 1), says("robot", "a", weight=2)),
            GOOD,
            {"text": "a"},
            chat({"role": "user"}, extra=1),
        ),
        (
            (1, "messages[0].content"),
            (1, "messages[1].role"),
            (1, "messages[1].weight"),
            (1, "messages"),
            (3, "row"),
            (4, "extra"),
            (4, "messages[0].content"),
            (4, "messages"),
        ),
    ),
    # Parquet
    Case("not-parquet.parquet", lines(GOOD), ((WHOLE, ""),)),
    Case(
        "messages.parquet",
        parquet({"messages": [[ASK, TELL]]}),
        ((WHOLE, "messages"), (WHOLE, "input_ids")),
    ),
    Case("text.parquet", parquet({**IDS, "text": ["a", "b"]}), ((WHOLE, "text"),)),
    Case("places.parquet", parquet({**IDS, "place_ids": [[0], [0]]}), ((WHOLE, "place_ids"),)),
    Case("no-ids.parquet", parquet({"labels": [[1]]}), ((WHOLE, "input_ids"),)),
    Case("no-rows.parquet", parquet(IDS, rows=0), ((WHOLE, ""),)),
]

CASES = GOOD_FILES + BAD_FILES
