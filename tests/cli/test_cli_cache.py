# SPDX-License-Identifier: Apache-2.0
"""The cache of compiled programs that commands and `load` switch on."""

import logging
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache.compilation_cache import reset_cache

from gptoss_jax.inference import compilation
from gptoss_jax.inference.compilation import enable_compilation_cache

ANSWER = (
    "<|channel|>analysis<|message|>17+26 is 43.<|end|>"
    "<|start|>assistant<|channel|>final<|message|>43<|return|>"
)


@pytest.fixture
def compilation_settings(monkeypatch, tmp_path):
    """jax's cache switched on, ours in `tmp_path`; everything as it was afterwards."""
    names = ["jax_enable_compilation_cache", "jax_compilation_cache_dir",
             "jax_persistent_cache_min_compile_time_secs"]  # fmt: skip
    before = {name: getattr(jax.config, name) for name in names}
    monkeypatch.setenv("GPTOSS_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv(compilation.SWITCH, raising=False)
    reset_cache()
    jax.config.update("jax_enable_compilation_cache", True)
    yield tmp_path / "cache" / "xla"
    for name, value in before.items():
        jax.config.update(name, value)
    reset_cache()


def test_small_programs_are_kept(compilation_settings):
    folder = enable_compilation_cache()
    jax.jit(lambda x: x * 3 + 1)(np.arange(7))

    assert folder == compilation_settings
    assert any(folder.iterdir())
    assert enable_compilation_cache() == folder


def test_the_users_own_folder_is_left_alone(compilation_settings, tmp_path):
    own = str(tmp_path / "own")
    jax.config.update("jax_compilation_cache_dir", own)

    assert enable_compilation_cache() == Path(own)
    assert jax.config.jax_compilation_cache_dir == own
    assert not compilation_settings.exists()


def test_the_cache_can_be_switched_off(compilation_settings, monkeypatch):
    monkeypatch.setenv(compilation.SWITCH, "off")

    assert enable_compilation_cache() is None
    assert not compilation_settings.exists()
    monkeypatch.setenv(compilation.SWITCH, "maybe")
    with pytest.raises(ValueError, match="GPTOSS_JAX_COMPILATION_CACHE: expected on or off"):
        enable_compilation_cache()


def test_a_cache_that_is_off_in_jax_stays_off(compilation_settings):
    jax.config.update("jax_enable_compilation_cache", False)

    assert enable_compilation_cache() is None
    assert jax.config.jax_compilation_cache_dir is None


def test_an_unwritable_cache_is_a_warning(
    gptoss, folder, recited, compilation_settings, tmp_path, monkeypatch, caplog
):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("GPTOSS_JAX_CACHE", str(tmp_path / "file"))
    recited[0].append(ANSWER)

    with caplog.at_level(logging.WARNING):
        status, out, _ = gptoss("chat", "--checkpoint", folder, "Hi")

    assert (status, out) == (0, "43\n")
    warned = [r.getMessage() for r in caplog.records if "compiled programs" in r.getMessage()]
    assert len(warned) == 1
    assert "Not a directory" in warned[0] and "GPTOSS_JAX_CACHE" in warned[0]
