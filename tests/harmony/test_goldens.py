# SPDX-License-Identifier: Apache-2.0
"""The format in words: texts written by hand from its document, as ids and back.

What stands behind `<|start|>` and `<|channel|>` is not left to a library here: each case is the
header as the document has it, or as the model was seen to write it.
"""

import dataclasses

import pytest

from gptoss_jax.harmony import (
    FunctionTool,
    Message,
    SystemSettings,
    ToolNamespace,
    parse,
    render_messages,
    render_prompt,
    render_training,
)

CALL = Message("assistant", "{}", "commentary", "functions.clock", content_type="json")
RESULT = Message("tool", "9", "commentary", "assistant", name="functions.clock")
HEADERS = [
    ("<|start|>user<|message|>Hi<|end|>", Message("user", "Hi")),
    ("<|start|>user:ann<|message|>Hi<|end|>", Message("user", "Hi", name="ann")),
    ("<|start|>assistant<|channel|>analysis<|message|>So.<|end|>",
     Message("assistant", "So.", "analysis")),
    ("<|start|>assistant<|channel|>commentary<|message|>I will look.<|end|>",
     Message("assistant", "I will look.", "commentary")),
    # calls: of a function, with a bare type, from the reasoning, in the role's section
    ("<|start|>assistant<|channel|>commentary to=functions.clock <|constrain|>json<|message|>{}"
     "<|call|>", CALL),
    ("<|start|>assistant<|channel|>commentary to=functions.clock json<|message|>{}<|call|>",
     dataclasses.replace(CALL, constrained=False)),
    ("<|start|>assistant<|channel|>commentary to=functions.clock<|message|>{}<|call|>",
     dataclasses.replace(CALL, content_type=None)),
    ("<|start|>assistant<|channel|>analysis to=functions.clock <|constrain|>json<|message|>{}"
     "<|call|>", dataclasses.replace(CALL, channel="analysis")),
    ("<|start|>assistant to=functions.clock<|channel|>commentary <|constrain|>json<|message|>{}"
     "<|call|>", dataclasses.replace(CALL, recipient_first=True)),
    ("<|start|>assistant to=clock<|channel|>analysis code<|message|>{}<|call|>",
     Message("assistant", "{}", "analysis", "clock", content_type="code", recipient_first=True)),
    ("<|start|>assistant<|channel|>commentary to=functions.clock <|constrain|>code<|message|>x"
     "<|call|>",
     Message("assistant", "x", "commentary", "functions.clock", None, "code", constrained=True)),
    # built-in tools
    ("<|start|>assistant<|channel|>analysis to=browser.search code<|message|>{}<|call|>",
     Message("assistant", "{}", "analysis", "browser.search", content_type="code")),
    ("<|start|>assistant<|channel|>analysis to=python code<|message|>1+1<|call|>",
     Message("assistant", "1+1", "analysis", "python", content_type="code")),
    # results: the tool speaks, to the assistant
    ("<|start|>functions.clock to=assistant<|channel|>commentary<|message|>9<|end|>", RESULT),
    ("<|start|>browser.search to=assistant<|channel|>analysis<|message|>9<|end|>",
     Message("tool", "9", "analysis", "assistant", name="browser.search")),
    ("<|start|>python to=assistant<|channel|>analysis<|message|>2<|end|>",
     Message("tool", "2", "analysis", "assistant", name="python")),
    ("<|start|>functions.clock<|message|>9<|end|>", Message("tool", "9", name="functions.clock")),
    ("<|start|>lookup<|message|>9<|end|>", Message("tool", "9", name="lookup")),
    ("<|start|>lookup<|channel|>commentary<|message|>9<|end|>",
     Message("tool", "9", "commentary", name="lookup")),
    ("<|start|>assistant_x<|message|>9<|end|>", Message("tool", "9", name="assistant_x")),
    ("<|start|>assistant_clock to=assistant<|channel|>commentary<|message|>9<|end|>",
     Message("tool", "9", "commentary", "assistant", name="assistant_clock")),
]  # fmt: skip


@pytest.mark.parametrize("tokenizer", ["published", "compact"])
@pytest.mark.parametrize(("text", "message"), HEADERS)
def test_a_header_is_written_and_read_as_the_document_has_it(text, message, tokenizer, request):
    tokenizer = request.getfixturevalue(tokenizer)
    ids = tokenizer.encode(text, specials="ids")

    assert render_messages([message], tokenizer=tokenizer, drop_analysis="keep")[-1].ids == ids
    turn = parse(ids, tokenizer, role=None)
    assert (list(turn.messages), turn.recoveries) == ([message], ())
    assert render_messages(turn.messages, tokenizer=tokenizer)[-1].ids == ids


@pytest.mark.parametrize(
    ("given", "text"),
    [
        # a recipient that everyone is makes no call
        (Message("assistant", "x", "commentary", "all"), "assistant<|channel|>commentary"),
        (Message("assistant", "x", "analysis", "assistant"),
         "assistant<|channel|>analysis to=assistant"),
        (Message("assistant", "x", "final", content_type="<|constrain|> json"),
         "assistant<|channel|>final <|constrain|>json"),
    ],
)  # fmt: skip
def test_what_is_no_call_does_not_end_as_one(given, text, published):
    ids = render_messages([given, Message("user", "q")], tokenizer=published)[1].ids

    assert published.decode(ids) == f"<|start|>{text}<|message|>x<|end|>"


SYSTEM = (
    "<|start|>system<|message|>You are ChatGPT, a large language model trained by OpenAI.\n"
    "Knowledge cutoff: {cutoff}\n{date}\nReasoning: {effort}\n\n{tools}{channels}<|end|>"
)
CHANNELS = "# Valid channels: {}. Channel must be included for every message."


def system(channels="analysis, commentary, final", **lines):
    lines = {"cutoff": "2024-06", "date": "", "effort": "medium", "tools": "", **lines}
    return SYSTEM.format(channels=CHANNELS.format(channels) if channels else "", **lines)


FILES = ToolNamespace(
    "files",
    "Reads the user's files.\nNever writes.",
    [
        FunctionTool("list", "All names."),
        FunctionTool(
            "read",
            "One of them.",
            {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]},
        ),
    ],
)
FILES_TEXT = (
    "# Tools\n\n## files\n\n// Reads the user's files.\n// Never writes.\nnamespace files {\n\n"
    "// All names.\ntype list = () => any;\n\n// One of them.\ntype read = (_: {\nname: string,\n"
    "}) => any;\n\n} // namespace files"
)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (SystemSettings(), system()),
        (SystemSettings(channels=("analysis", "final")), system("analysis, final")),
        (SystemSettings("high", "2021-01-01", "2021-01", channels=("final",)),
         system("final", cutoff="2021-01", date="Current date: 2021-01-01\n", effort="high")),
        (SystemSettings(builtin_tools=(FILES,)), system(tools=FILES_TEXT + "\n\n")),
        (SystemSettings(builtin_tools=(ToolNamespace("shell", "Runs bash.\nGently."),)),
         system(tools="# Tools\n\n## shell\n\nRuns bash.\nGently.\n\n")),
        (SystemSettings(identity=None, knowledge_cutoff=None, channels=()),
         "<|start|>system<|message|>Reasoning: medium<|end|>"),
    ],
)  # fmt: skip
def test_system_messages(settings, expected, published):
    ids = render_messages([], tokenizer=published, settings=settings)[0].ids

    assert ids == published.encode(expected, specials="ids")


DEVELOPER = "<|start|>developer<|message|>{}<|end|>"


@pytest.mark.parametrize(
    ("tools", "expected"),
    [
        ([FunctionTool("now", "The time.", {"type": "object", "properties": {},
                                            "additionalProperties": False})],
         "# Tools\n\n## functions\n\nnamespace functions {\n\n// The time.\ntype now = () => any;"
         "\n\n} // namespace functions"),
        ([FunctionTool("patch", "Applies a patch.", {"type": "string", "description": "p"})],
         "# Tools\n\n## functions\n\nnamespace functions {\n\n// Applies a patch.\n"
         "type patch = (_: string) => any;\n\n} // namespace functions"),
        ([FunctionTool("any", "", {"type": "object", "properties": {"raw": True, "no": False},
                                   "required": ["raw", "nowhere"]})],
         "# Tools\n\n## functions\n\nnamespace functions {\n\ntype any = (_: {\nraw: any,\n"
         "no?: any,\n}) => any;\n\n} // namespace functions"),
        ([FILES], FILES_TEXT),
        ([FILES, FunctionTool("now")],
         FILES_TEXT + "\n\n## functions\n\nnamespace functions {\n\ntype now = () => any;\n\n"
         "} // namespace functions"),
    ],
)  # fmt: skip
def test_tools_are_shown_as_typescript(tools, expected, published):
    system, developer = render_messages([], tokenizer=published, tools=tools)

    assert published.decode(developer.ids) == DEVELOPER.format(expected)
    assert ("'functions'" in published.decode(system.ids)) == ("## functions" in expected)


def test_a_whole_turn_with_a_tool(published):
    zone = {"type": "string", "description": "IANA name"}
    clock = FunctionTool("clock", "The time.", {"type": "object", "properties": {"zone": zone}})
    messages = [
        Message("user", "Late?"),
        Message("assistant", "Ask the clock.", "analysis"),
        CALL,
        RESULT,
    ]

    ids = render_prompt(messages, tokenizer=published, instructions="Be kind.", tools=[clock])

    assert published.decode(ids) == (
        system("analysis, commentary, final").removesuffix("<|end|>")
        + "\nCalls to these tools must go to the commentary channel: 'functions'.<|end|>"
        + DEVELOPER.format(
            "# Instructions\n\nBe kind.\n\n# Tools\n\n## functions\n\nnamespace functions {\n\n"
            "// The time.\ntype clock = (_: {\n// IANA name\nzone?: string,\n}) => any;\n\n"
            "} // namespace functions"
        )
        + "<|start|>user<|message|>Late?<|end|>"
        "<|start|>assistant<|channel|>analysis<|message|>Ask the clock.<|end|>"
        "<|start|>assistant<|channel|>commentary to=functions.clock <|constrain|>json<|message|>{}"
        "<|call|><|start|>functions.clock to=assistant<|channel|>commentary<|message|>9<|end|>"
        "<|start|>assistant"
    )
    assert ids == published.encode(published.decode(ids), specials="ids")


def test_an_empty_text_leaves_its_place_to_the_next(published):
    messages = [Message("system", ""), Message("developer", "Be kind."), Message("user", "q")]
    tools = [FunctionTool("now")]

    ids = render_prompt(messages, tokenizer=published, tools=tools)

    assert ids == render_prompt(
        messages[2:], tokenizer=published, tools=tools, instructions="Be kind."
    )
    assert render_prompt(messages[2:], tokenizer=published, instructions="") == render_prompt(
        iter(messages[2:]), tokenizer=published
    )


@pytest.mark.parametrize("role", ["system", "developer"])
@pytest.mark.parametrize("place", [0, 1])
def test_an_empty_text_is_no_instruction(role, place, published):
    messages = [Message("user", "a"), Message("user", "b")]

    ids = render_training(
        [*messages[:place], Message(role, ""), *messages[place:]], tokenizer=published
    )

    assert ids == render_training(messages, tokenizer=published)
