# SPDX-License-Identifier: Apache-2.0
"""The one door to the `openai_harmony` library, opened at first use.

It is provided by oss-harmony, which carries the vocabulary inside its wheel. The original,
openai-harmony, has the same module name and downloads the vocabulary, so it is refused. This file
knows nothing of messages or tokens; `render.py` and `vocabulary.py` use what it returns.
"""

import functools
from importlib import metadata
from typing import Any


@functools.cache
def harmony_library() -> Any:
    """The `openai_harmony` module; ImportError if the wrong or no package provides it."""
    check_harmony_packages(_installed("oss-harmony"), _installed("openai-harmony"))
    import openai_harmony

    return openai_harmony


@functools.cache
def library_encoding() -> Any:
    """The library's gpt-oss encoding: renders and parses published token ids."""
    library = harmony_library()
    try:
        return library.load_harmony_encoding("HarmonyGptOss")
    except library.HarmonyError as error:
        raise ValueError(
            f"openai_harmony: expected to load its vocabulary, got {str(error)!r}; if "
            "TIKTOKEN_ENCODINGS_BASE is set, unset it or point it at a folder with the published "
            "o200k_base.tiktoken"
        ) from error


def check_harmony_packages(oss: bool, original: bool) -> None:
    """Raise ImportError unless oss-harmony, and only it, provides `openai_harmony`."""
    if original:
        # Uninstalling one of two packages removes files of both, hence the reinstallation.
        raise ImportError(
            "openai_harmony: expected it from oss-harmony alone, got openai-harmony"
            f"{' beside oss-harmony' if oss else ''}; run `pip uninstall -y openai-harmony "
            "oss-harmony` and then `pip install oss-harmony`"
        )
    if not oss:
        raise ImportError(
            "openai_harmony: expected the package oss-harmony, got none; run "
            "`pip install oss-harmony`"
        )


def _installed(distribution: str) -> bool:
    try:
        metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return False
    return True
