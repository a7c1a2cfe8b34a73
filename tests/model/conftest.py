# SPDX-License-Identifier: Apache-2.0
"""Random checkpoints and models of the two golden configurations, each made once a session."""

import functools

import numpy as np
import pytest
from checkpoints import write_checkpoint
from golden import cases

from gptoss_jax.weights.load import load


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """checkpoint("a", "hf") is a folder in that layout."""
    root = tmp_path_factory.mktemp("checkpoints")

    @functools.cache
    def write(name: str, layout: str):
        folder = root / f"{name}-{layout}"
        seed = cases.SEEDS[name]
        return write_checkpoint(cases.CONFIGS[name], folder, layout=layout, seed=seed)

    return write


@pytest.fixture(scope="session")
def loaded(checkpoint):
    """loaded("a", "hf", "packed") is the float32 model from that folder."""

    @functools.cache
    def read(name: str, layout: str = "hf", experts: str = "packed"):
        model = load(checkpoint(name, layout), experts=experts, dtype="float32")
        model.origin = None  # models that differ by their folder alone share compiled programs
        return model

    return read


@pytest.fixture(scope="session")
def golden():
    """golden("a")["rows.transformers"] is what that oracle said."""

    @functools.cache
    def read(name: str) -> dict[str, np.ndarray]:
        with np.load(cases.FOLDER / f"{name}.npz") as file:
            return dict(file)

    return read
