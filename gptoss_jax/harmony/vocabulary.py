# SPDX-License-Identifier: Apache-2.0
"""The 199,998 byte strings of o200k_base: where they are found, and how they are checked.

Nothing is downloaded and no environment variable is set. Whatever the source, the whole file is
compared with one published hash before a line of it is used. This file knows no special tokens;
`tokenizer.py` makes an encoding from the byte strings.
"""

import base64
import contextlib
import functools
import hashlib
import logging
import os
import tempfile
from pathlib import Path

from gptoss_jax.folders import cache_folder
from gptoss_jax.harmony.library import library_encoding

NUM_RANKS = 199_998
FILE_NAME = "o200k_base.tiktoken"
# tiktoken names a file of its cache by the sha1 of the address it came from.
TIKTOKEN_CACHE_NAME = "fb374d419588a4632f3f557e76b4b70aebbca790"
SHA256 = "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d"

_log = logging.getLogger(__name__)


def load_vocabulary(num_ranks: int = NUM_RANKS, *, path: str | Path | None = None) -> list[bytes]:
    """The first `num_ranks` byte strings of o200k_base, in order of rank.

    Looked up in: `path` (the file or its folder), the folder TIKTOKEN_ENCODINGS_BASE, the folder
    TIKTOKEN_CACHE_DIR, our own cache, the copy embedded in oss-harmony (then cached). The first
    two were asked for, so a missing or different file there is a ValueError; a damaged cache is
    logged and passed over.
    """
    # One line of the file is "base64-of-bytes rank"; only the lines asked for are decoded.
    lines = _vocabulary_file(path).split(b"\n", num_ranks)[:num_ranks]
    return [base64.b64decode(line.split(b" ")[0]) for line in lines]


def _vocabulary_file(path: str | Path | None) -> bytes:
    if path is not None:
        return _read_required("vocabulary", Path(path), "pass another path or None")
    base = os.environ.get("TIKTOKEN_ENCODINGS_BASE")
    if base is not None:
        return _read_required("TIKTOKEN_ENCODINGS_BASE", Path(base), "correct or unset it")
    tiktoken_folder = os.environ.get("TIKTOKEN_CACHE_DIR")
    if tiktoken_folder:
        blob = _read_cached(Path(tiktoken_folder) / TIKTOKEN_CACHE_NAME)
        if blob is not None:
            return blob
    own_file = cache_folder() / FILE_NAME
    blob = _read_cached(own_file)
    if blob is None:
        blob = _embedded_file()
        _write_cached(own_file, blob)
    return blob


def _read_required(argument: str, path: Path, next_step: str) -> bytes:
    file = path / FILE_NAME if path.is_dir() else path
    try:
        blob = file.read_bytes()
    except OSError as error:
        problem = f"{str(path)!r} ({error.strerror})"
    else:
        if _is_published(blob):
            return blob
        problem = f"{str(file)!r} with other contents"
    raise ValueError(
        f"{argument}: expected the published {FILE_NAME} or its folder, got {problem}; {next_step}"
    )


def _read_cached(file: Path) -> bytes | None:
    try:
        blob = file.read_bytes()
    except OSError:
        return None
    if _is_published(blob):
        return blob
    _log.warning("%s is not the published vocabulary; it is not used", file)
    return None


def _write_cached(file: Path, blob: bytes) -> None:
    """Write by renaming a finished file, so that concurrent writers and readers are safe."""
    temporary = None
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=file.parent)
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(blob)
        os.replace(temporary, file)
    except OSError as error:
        _log.warning(
            "the vocabulary could not be cached in %s (%s), so each start rebuilds it; set "
            "GPTOSS_JAX_CACHE to a writable folder",
            file.parent,
            error.strerror or error,
        )
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)


@functools.cache
def _embedded_file() -> bytes:
    """The vocabulary file, written anew from the copy inside oss-harmony."""
    decode = library_encoding().decode
    lines = []
    for rank in range(NUM_RANKS):
        token = decode([rank], errors="surrogateescape").encode("utf-8", "surrogateescape")
        lines.append(base64.b64encode(token) + b" %d\n" % rank)
    blob = b"".join(lines)
    if not _is_published(blob):
        raise ValueError(
            "oss-harmony: expected the published o200k_base vocabulary inside, got another one; "
            "install oss-harmony 0.0.11 or newer"
        )
    return blob


def _is_published(blob: bytes) -> bool:
    return hashlib.sha256(blob).hexdigest() == SHA256
