# SPDX-License-Identifier: Apache-2.0
"""A model of random weights with the bundled one's vocabulary, and one that recites."""

import json

import pytest
from checkpoints import COMPACT as CONFIG
from checkpoints import write_checkpoint
from reciter import Reciter

import gptoss_jax as gj
from gptoss_jax.harmony import Tokenizer


@pytest.fixture(scope="session")
def tokenizer():
    return Tokenizer.compact()


@pytest.fixture(scope="session")
def folder(tmp_path_factory, tokenizer):
    folder = write_checkpoint(CONFIG, tmp_path_factory.mktemp("random"))
    tokenizer.save(folder)
    stops = {"do_sample": True, "eos_token_id": list(tokenizer.stop_ids)}
    (folder / "generation_config.json").write_text(json.dumps(stops))
    return folder


@pytest.fixture(scope="session")
def model(folder):
    return gj.load(folder)


@pytest.fixture
def reciter(tokenizer, monkeypatch):
    return Reciter(tokenizer, monkeypatch)
