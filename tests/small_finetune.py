# SPDX-License-Identifier: Apache-2.0
"""A small run of `gptoss finetune`, for tests and for processes that they start."""

import json
from pathlib import Path

from checkpoints import COMPACT, write_checkpoint

from gptoss_jax import cli
from gptoss_jax.harmony import Tokenizer

ROWS = [
    {
        "messages": [
            {"role": "user", "content": f"{a} and {b}?"},
            {"role": "assistant", "thinking": f"{a}, then {b}.", "content": f"{b}"},
        ]
    }
    for a in range(4)
    for b in range(3)
]
# Other answers than those that are learnt: their loss falls at first, and rises after a while.
OTHER_ROWS = [
    {
        "messages": [
            {"role": "user", "content": f"{a} and {b}?"},
            {"role": "assistant", "content": "xyz"[b] * 8},
        ]
    }
    for a in range(4)
    for b in range(3)
]


def write_base(folder: Path) -> Path:
    write_checkpoint(COMPACT, folder)
    Tokenizer.compact(vocab_size=COMPACT.vocab_size).save(folder)
    return folder


def write_rows(path: Path, rows=ROWS) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def written(folder: Path, base: Path, rows: Path) -> Path:
    """The file of a run of four steps that saves after each second one."""
    path = folder / "run.toml"
    path.write_text(f"""
        output = "{folder / "out"}"
        [model]
        checkpoint = "{base}"
        dtype = "float32"
        [lora]
        rank = 2
        targets = ["attn.q", "moe.down"]
        [data]
        train = ["{rows}"]
        eval = ["{rows}"]
        length = 256
        rows = 2
        [optimisation]
        steps = 4
        learning_rate = 1e-2
        [checkpoints]
        every = 2
        [watch]
        log_every = 2
        """)
    return path


def finetune(config: Path, *words: str) -> int:
    return cli.run(["finetune", str(config), "--json", *words])
