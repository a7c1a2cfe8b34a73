#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Package: rich 15.0.0.
# Guess:   Console(stderr=True).print raises BrokenPipeError when nobody reads stderr any more, as
#          print(file=sys.stderr) does: a program that catches OSError there goes on without its
#          progress bar.
# Seen:    it raises SystemExit(1), which `except Exception` does not catch, and before that it
#          points the file descriptor of *stdout* at /dev/null, though stdout is fine. A program
#          that catches SystemExit and goes on prints its result to nobody.
# Matters: training runs write their bar to stderr and their result to stdout, and stderr is piped
#          (`2> >(head)`, a log shipper that restarts). Such a run ends without an error, or with an
#          empty result. Make a Console whose on_broken_pipe raises BrokenPipeError.
# Source:  the docstring of rich.console.Console.on_broken_pipe says that it exits; that it takes
#          stdout away from a console on stderr was seen here.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check rich==15.0.0
cat > "$folder/program.py" <<'PYTHON'
import os
import sys

from rich.console import Console

reader, writer = os.pipe()
os.close(reader)  # who read stderr has gone
os.dup2(writer, 2)
caught = []
for name, speak in (
    ("print", lambda: print("step 1", file=sys.stderr, flush=True)),
    ("rich", lambda: Console(stderr=True).print("step 1")),
):
    print("before", name, flush=True)
    try:
        speak()
    except BaseException as error:
        caught.append(type(error).__name__)
print("the result", flush=True)
with open(sys.argv[1], "w", encoding="utf-8") as file:
    file.write(" ".join(caught))
os._exit(0)
PYTHON
out=$("$folder/venv/bin/python" -I "$folder/program.py" "$folder/caught")
"$folder/venv/bin/python" -I -c 'import importlib.metadata as m; print("rich", m.version("rich"))'
echo "raised: $(cat "$folder/caught")"
echo "on stdout: $(echo $out)"
if [ "$(cat "$folder/caught")" != "BrokenPipeError SystemExit" ] || [ "$(echo $out)" != "before print before rich" ]; then
    echo "changed: rich raised SystemExit, and what was printed to stdout after that was lost"
    exit 1
fi
