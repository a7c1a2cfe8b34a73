#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Package: oss-harmony 0.0.11 (module openai_harmony; openai-harmony 0.0.8 has the same code).
# Guess:   a function's JSON schema reaches the model as TypeScript of the same meaning: a list of
#          choices as ("red" | "blue")[], numbers to choose from as 1 | 2 | 3, an enum without a
#          type as its values.
# Seen:    the list of choices is `"red" | "blue"[]`, which says "red, or a list of blue"; a list of
#          string or null is `string | null[]`. An enum of integers is `number`, one without a type
#          and a const are `any` and `string`: the model never sees which values there are.
# Matters: a server that validates arguments against the schema refuses what the prompt allowed.
#          Wrong arguments are then taken for a weakness of the model. Say the values in the
#          description, too, and give enums a type "string".
# Source:  seen here; the rendering is the library's json_schema_to_typescript.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check oss-harmony==0.0.11
"$folder/venv/bin/python" -I - <<'PYTHON'
import sys
from importlib.metadata import version

import openai_harmony as harmony

print("oss-harmony", version("oss-harmony"))
properties = {
    "colors": {"type": "array", "items": {"type": "string", "enum": ["red", "blue"]}},
    "names": {"type": "array", "items": {"type": ["string", "null"]}},
    "level": {"type": "integer", "enum": [1, 2, 3]},
    "mode": {"enum": ["slow", "fast"]},
    "kind": {"type": "string", "const": "paint"},
}
tool = harmony.ToolDescription.new("f", "", {"type": "object", "properties": properties})
content = harmony.DeveloperContent.new().with_function_tools([tool])
message = harmony.Message.from_role_and_content(harmony.Role.DEVELOPER, content)
encoding = harmony.load_harmony_encoding("HarmonyGptOss")
lines = encoding.decode(encoding.render(message)).splitlines()
shown = [line for line in lines if "?:" in line]
print("\n".join(shown))
expected = [
    'colors?: "red" | "blue"[],',
    "names?: string | null[],",
    "level?: number,",
    "mode?: any,",
    "kind?: string,",
]
if shown != expected:
    sys.exit("changed: lists of choices had no parentheses, enums of numbers were left out")
PYTHON
