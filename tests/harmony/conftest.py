# SPDX-License-Identifier: Apache-2.0
"""The two tokenizers and the library's own encoding, loaded once for this folder."""

import openai_harmony
import pytest

from gptoss_jax.harmony import Tokenizer


@pytest.fixture(scope="session")
def published() -> Tokenizer:
    return Tokenizer.published()


@pytest.fixture(scope="session")
def compact() -> Tokenizer:
    return Tokenizer.compact()


@pytest.fixture(scope="session")
def library():
    return openai_harmony.load_harmony_encoding("HarmonyGptOss")
