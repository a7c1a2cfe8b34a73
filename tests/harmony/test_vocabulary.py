# SPDX-License-Identifier: Apache-2.0
"""Where the vocabulary is looked for, in which order, and what a bad copy leads to."""

import hashlib
import logging
import threading

import pytest

from gptoss_jax.harmony import Tokenizer, vocabulary
from gptoss_jax.harmony.library import check_harmony_packages
from gptoss_jax.harmony.vocabulary import FILE_NAME, SHA256, load_vocabulary

URL = "https://openaipublic.blob.core.windows.net/encodings/o200k_base.tiktoken"


@pytest.fixture(scope="module")
def blob() -> bytes:
    return vocabulary._embedded_file()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache folder, and none of the variables of others."""
    for name in ("TIKTOKEN_ENCODINGS_BASE", "TIKTOKEN_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GPTOSS_JAX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def forbid_embedded(monkeypatch):
    def fail():
        raise AssertionError("the embedded copy was asked for")

    monkeypatch.setattr(vocabulary, "_embedded_file", fail)


def test_the_embedded_copy_is_the_published_file_and_is_cached(cache, blob):
    tokens = load_vocabulary()

    assert hashlib.sha256(blob).hexdigest() == SHA256
    assert len(tokens) == len(set(tokens)) == 199_998
    assert sorted(tokens[:256]) == [bytes([byte]) for byte in range(256)]
    assert (cache / FILE_NAME).read_bytes() == blob
    assert [file.name for file in cache.iterdir()] == [FILE_NAME]


def test_the_cache_is_used(cache, blob, monkeypatch):
    load_vocabulary(300)
    forbid_embedded(monkeypatch)

    assert load_vocabulary(300) == load_vocabulary()[:300]


@pytest.mark.parametrize("damaged", [b"", b"IQ== 0\n", b"\xff" * 1000])
def test_a_damaged_cache_is_rebuilt(damaged, cache, blob, caplog):
    cache.mkdir()
    (cache / FILE_NAME).write_bytes(damaged)

    with caplog.at_level(logging.WARNING):
        tokens = load_vocabulary(256)

    assert len(tokens) == 256
    assert "is not the published vocabulary" in caplog.text
    assert (cache / FILE_NAME).read_bytes() == blob


def test_an_unwritable_cache_is_a_warning(cache, caplog):
    cache.write_text("a file where the folder should be")

    with caplog.at_level(logging.WARNING):
        tokens = load_vocabulary(256)

    assert len(tokens) == 256
    assert "could not be cached" in caplog.text
    assert "GPTOSS_JAX_CACHE" in caplog.text


def test_writers_at_the_same_time_leave_one_whole_file(cache, blob):
    threads = [threading.Thread(target=load_vocabulary, args=(256,)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert [file.name for file in cache.iterdir()] == [FILE_NAME]
    assert (cache / FILE_NAME).read_bytes() == blob


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"GPTOSS_JAX_CACHE": "/a", "XDG_CACHE_HOME": "/b"}, "/a"),
        ({"XDG_CACHE_HOME": "/b"}, "/b/gptoss_jax"),
        ({"HOME": "/c"}, "/c/.cache/gptoss_jax"),
    ],
)
def test_the_cache_folder(variables, expected, monkeypatch):
    for name in ("GPTOSS_JAX_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)

    assert str(vocabulary.cache_folder()) == expected


def test_places_that_are_looked_in_before_the_cache(cache, blob, tmp_path, monkeypatch):
    forbid_embedded(monkeypatch)
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    (folder / FILE_NAME).write_bytes(blob)
    first = [line.split()[0] for line in blob.split(b"\n")[:256]]

    from_file = load_vocabulary(256, path=folder / FILE_NAME)
    from_folder = load_vocabulary(256, path=folder)
    monkeypatch.setenv("TIKTOKEN_ENCODINGS_BASE", str(folder))
    from_base = load_vocabulary(256)
    monkeypatch.delenv("TIKTOKEN_ENCODINGS_BASE")
    (folder / FILE_NAME).rename(folder / hashlib.sha1(URL.encode()).hexdigest())
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(folder))
    from_tiktoken = load_vocabulary(256)

    assert from_file == from_folder == from_base == from_tiktoken
    assert [vocabulary.base64.b64encode(token) for token in from_file] == first
    assert not cache.exists()


def test_an_absent_file_in_tiktokens_cache_is_no_error(cache, tmp_path, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))

    assert len(load_vocabulary(256)) == 256


@pytest.mark.parametrize("folder", ["", "/no/such/folder", "other"])
def test_a_bad_encodings_base_is_an_error(folder, cache, tmp_path, monkeypatch):
    if folder == "other":
        folder = str(tmp_path)
        (tmp_path / FILE_NAME).write_text("IQ== 0\n")
    monkeypatch.chdir(tmp_path / "..")
    monkeypatch.setenv("TIKTOKEN_ENCODINGS_BASE", folder)

    with pytest.raises(ValueError, match=r"TIKTOKEN_ENCODINGS_BASE: expected.*; correct or unset"):
        Tokenizer.compact()


def test_a_bad_path_is_an_error(cache, tmp_path):
    with pytest.raises(ValueError, match=r"vocabulary: expected the published o200k_base.tiktoken"):
        Tokenizer.compact(vocabulary=tmp_path / "missing")


@pytest.mark.parametrize(
    ("oss", "original", "message"),
    [
        (True, True, "got openai-harmony beside oss-harmony; run `pip uninstall"),
        (False, True, "got openai-harmony; run `pip uninstall"),
        (False, False, "expected the package oss-harmony, got none; run `pip install"),
    ],
)
def test_which_harmony_is_installed(oss, original, message):
    with pytest.raises(ImportError, match=message):
        check_harmony_packages(oss, original)
