#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Package: oss-harmony 0.0.11 (module openai_harmony; openai-harmony 0.0.8 has the same code).
# Guess:   "all" is the format's word for no particular recipient, so a message of the assistant's
#          to "all" renders as one without a recipient.
# Seen:    the header does leave " to=all" out, but the message ends in <|call|>, the token that
#          ends a call of a tool, instead of <|end|>.
# Matters: a server or a dataset that fills the recipient in for every message writes a history of
#          calls that name no tool and get no result, and training rows that teach the model to
#          stop with <|call|> after text for the user. Leave the recipient out, or take "all" away.
# Source:  seen here.
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
encoding = harmony.load_harmony_encoding("HarmonyGptOss")
plain = harmony.Message.from_role_and_content(harmony.Role.ASSISTANT, "Hello").with_channel("final")
text = {"nobody": encoding.decode(encoding.render(plain))}
text["all"] = encoding.decode(encoding.render(plain.with_recipient("all")))
for recipient, rendered in text.items():
    print(f"to {recipient}: {rendered}")
header = text["nobody"].removesuffix("<|end|>")
if text != {"nobody": header + "<|end|>", "all": header + "<|call|>"}:
    sys.exit("changed: a message to all had the header of one to nobody, and ended in <|call|>")
PYTHON
