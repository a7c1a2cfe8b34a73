# SPDX-License-Identifier: Apache-2.0
"""The base, the rows and the file of a small run."""

from pathlib import Path

import pytest
from small_finetune import OTHER_ROWS, finetune, write_base, write_rows, written


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> Path:
    return write_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def rows(tmp_path_factory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl")


@pytest.fixture(scope="session")
def other_rows(tmp_path_factory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows") / "other.jsonl", OTHER_ROWS)


@pytest.fixture
def config(base, rows, tmp_path) -> Path:
    return written(tmp_path, base, rows)


@pytest.fixture(scope="module")
def done(base, rows, tmp_path_factory) -> Path:
    """The file of a run that has ended; its output is beside it."""
    path = written(tmp_path_factory.mktemp("done"), base, rows)
    assert finetune(path) == 0
    return path
