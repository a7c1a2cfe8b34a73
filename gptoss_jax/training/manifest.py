# SPDX-License-Identifier: Apache-2.0
"""What a folder holds, file by file with size and SHA-256: written last, checked before use.

Orbax reads a file with a flipped bit without complaint; a folder that fits its manifest has the
bytes that were written. Knows files alone, and nothing of what is in them.
"""

import concurrent.futures
import contextlib
import fnmatch
import hashlib
import json
import os
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

NAME = "manifest.json"
FORMAT = "gptoss_jax manifest 1"
THREADS = 8  # that read again; more do not pay with the disk as the limit
QUIET_THREADS = 2  # that hash what was written, beside a training that wants the processors
NICENESS = 10  # of these
JUNK = (".DS_Store", "._*", ".nfs*", "Thumbs.db", "desktop.ini")
PIECE = 1 << 22  # bytes read at a time


def write_manifest(folder: Path) -> None:
    """Write the manifest of all files below a folder, and have everything on the disk."""
    names = _files(folder)
    with concurrent.futures.ThreadPoolExecutor(QUIET_THREADS, initializer=_step_back) as threads:
        entries = list(threads.map(lambda name: _entry(folder / name, flush=True), names))
    text = _text(dict(zip(names, entries, strict=True)))
    write_file(folder / NAME, text)
    for path in [folder, *(path for path in folder.rglob("*") if path.is_dir())]:
        flush_folder(path)


def check_manifest(folder: Path, share: tuple[int, int] = (0, 1)) -> list[str]:
    """All that is wrong with the files that were written to a folder; `strangers` are no matter.

    With `share` (i, n) it reads every n-th file from the i-th, as one of n processes.
    """
    try:
        entries = _read(folder)
    except (OSError, ValueError) as error:
        return [f"{NAME}: {error}"]
    there = set(_files(folder)) - {NAME}
    found = [f"{name}: is missing" for name in sorted(entries.keys() - there)]
    names = sorted(entries.keys() & there)[share[0] :: share[1]]
    with concurrent.futures.ThreadPoolExecutor(THREADS) as threads:
        checked = threads.map(lambda name: list(_differences(folder, name, entries[name])), names)
        return found + [problem for problems in checked for problem in problems]


def strangers(folder: Path) -> list[str]:
    """The files below a folder that came later; all of them, if its manifest cannot be read."""
    try:
        known = {NAME, *_read(folder)}
    except (OSError, ValueError):
        known = {NAME}
    return sorted(set(_files(folder)) - known)


def files_fit(folder: Path) -> bool:
    """Whether a folder has the files of its manifest and no others but what systems leave behind;
    does not read them."""
    try:
        missing = _read(folder).keys() - set(_files(folder))
    except (OSError, ValueError):
        return False
    return not missing and all(_is_junk(name) for name in strangers(folder))


def _is_junk(name: str) -> bool:
    """Whether it was left by a file manager or a network file system, not by a user."""
    return any(fnmatch.fnmatchcase(name.rsplit("/")[-1], pattern) for pattern in JUNK)


def write_file(path: Path, text: str) -> None:
    """Write a new file, and have it on the disk."""
    with path.open("x", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def flush_folder(folder: Path) -> None:
    """Have what a folder lists on the disk, if its file system can do that: where it cannot, a
    power cut may take new names back, but no bytes."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _step_back() -> None:
    """Let other threads go first; only Linux has a priority for each."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)


def _files(folder: Path) -> list[str]:
    """All that is not a folder, by its path."""
    paths = (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    return sorted(path.relative_to(folder).as_posix() for path in paths)


def _text(entries: Mapping[str, Any]) -> str:
    return json.dumps({"format": FORMAT, "files": entries}, indent=1, sort_keys=True) + "\n"


def _read(folder: Path) -> dict[str, dict[str, Any]]:
    """The entries; raises ValueError if one byte of the file is not as it was written."""
    try:
        text = (folder / NAME).read_text(encoding="utf-8")
        files = json.loads(text)["files"]
        same = text == _text(files) and all(_is_entry(entry) for entry in files.values())
    except FileNotFoundError:
        raise ValueError("is missing") from None
    except (ValueError, LookupError, TypeError, AttributeError):
        same, files = False, {}
    if not same:
        raise ValueError("is not as it was written")
    return files


def _is_entry(entry: Any) -> bool:
    return isinstance(entry, dict) and entry.keys() == {"bytes", "sha256"}


def _entry(path: Path, *, flush: bool = False) -> dict[str, Any]:
    """Size and SHA-256; with `flush` the file is on the disk before it is hashed."""
    digest, size = hashlib.sha256(), 0
    with path.open("rb", buffering=0) as file:
        if flush:
            os.fsync(file.fileno())
        buffer = memoryview(bytearray(PIECE))
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
            size += count
    return {"bytes": size, "sha256": digest.hexdigest()}


def _differences(folder: Path, name: str, entry: Mapping[str, Any]) -> Iterator[str]:
    try:
        size = (folder / name).stat().st_size
        found = _entry(folder / name) if size == entry["bytes"] else {"bytes": size}
    except OSError as error:
        yield f"{name}: cannot be read ({error.strerror or error})"
        return
    for kind, words in (("bytes", "{} bytes"), ("sha256", "SHA-256 {}")):
        if found.get(kind, entry[kind]) != entry[kind]:
            yield f"{name}: expected {words.format(entry[kind])}, got {found[kind]}"
