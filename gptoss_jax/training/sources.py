# SPDX-License-Identifier: Apache-2.0
"""Files of a dataset -> rows of JSON values, each with where it stands.

JSONL (plain, gzip or zstd), JSON and Parquet; files, folders and globs, local or at an fsspec URL;
and Python that makes rows (`made_rows.py`), as if what it makes had been written to a JSONL file.
What cannot be read is a row with an error, so that a check sees everything at once. What the fields
mean is for `formats.py`.
"""

import glob
import gzip
import hashlib
import io
import json
import os
import re
import zlib
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from gptoss_jax.training.json_values import Unheld, json_value, written
from gptoss_jax.training.made_rows import MadeRows, NamedRows, is_function

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".json", ".parquet")
_KNOWN = ", ".join(SUFFIXES[:-1]) + " or " + SUFFIXES[-1]
_SPACE = re.compile(r"[ \t\r\n]*")
_ROWS_AT_ONCE = 256  # of Parquet, turned into Python values together


class SourceRow(NamedTuple):
    """A row: `fields`, or else the `error` that stands in its place.

    `line` counts from 1; it is a row number in Parquet, and in JSON the line where the row begins.
    """

    path: str
    line: int
    fields: dict[str, Any] | None
    error: str | None = None


def read_rows(paths: str | Iterable[str]) -> Iterator[SourceRow]:
    """The rows of all files, in the order of `paths`; a folder's or a glob's files are sorted.

    ValueError if there is no such file, before the first row.
    """
    return (row for path in files_of(paths) for row in read_file(path))


def read_file(path: str) -> Iterator[SourceRow]:
    """The rows of one file."""
    if isinstance(path, MadeRows):
        yield from _made_rows(path)
        return
    with open_file(path) as file:
        if path.endswith(".parquet"):
            yield from _parquet_rows(path, file)
        elif path.endswith(".json"):
            yield from _json_rows(path, file)
        else:
            yield from _jsonl_rows(path, file)


def digest(paths: str | Iterable[str]) -> str:
    """SHA-256 of the bytes of all files in their order, whatever they are called."""
    whole = hashlib.sha256()
    for path in files_of(paths):
        with open_file(path) as file:
            whole.update(hashlib.file_digest(file, "sha256").digest())
    return whole.hexdigest()


def files_of(paths: str | os.PathLike | Iterable[str | os.PathLike]) -> list[str]:
    """The files that `paths` name; one ValueError lists every path that names none.

    A function that makes rows is looked at, and not called.
    """
    several = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
    files: list[str] = []
    problems = [] if several else ["paths: expected at least one, got none; name a file or folder"]
    for path in [os.fspath(path) for path in several]:
        found = expand(path)
        unknown = [file for file in found if not is_known(file)]
        if not found:
            problems.append(f"{path}: {nothing_at(path)}")
        problems += [f"{file}: expected {_KNOWN}, got another kind of file" for file in unknown]
        problems += [wrong for file in found if (wrong := _wrong_source(file))]
        files += found
    if problems:
        raise ValueError("\n".join(problems))
    return files


def _wrong_source(file: str) -> str:
    """What is wrong with Python that is to make rows, as far as can be seen without them."""
    try:
        if isinstance(file, MadeRows):
            file.look()
    except ValueError as error:
        return str(error)
    return ""


def is_known(path: str) -> bool:
    """Whether its rows can be read, by its name."""
    return isinstance(path, MadeRows) or path.endswith(SUFFIXES)


def expand(path: str) -> list[str]:
    """The files that one path names: itself, what a glob matches, or a folder's known files.

    Python that makes rows is asked for them once, whatever is then read of the file that it is.
    """
    if isinstance(path, MadeRows):
        return [path.anew()]
    path = os.path.expanduser(path)
    if is_function(path):
        return [NamedRows(path)]
    found = _expand_url(path) if "://" in path else _expand_local(path)
    return sorted(found)


def nothing_at(path: str) -> str:
    """What to say of a path that names no file of rows."""
    folder = os.path.expanduser(path)
    names = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
    if any(name.endswith(".arrow") for name in names):
        return (
            "expected a file of rows, got a folder of Arrow files, as datasets' save_to_disk makes "
            "it; write Parquet instead, with to_parquet"
        )
    for name in names:
        if os.path.isdir(os.path.join(folder, name)) and _expand_local(os.path.join(folder, name)):
            inside = os.path.join(path, name)
            return f"expected a file of rows, got a folder that has some in {inside}; name that"
    return "expected a file of rows, got none; check the path"


def open_file(path: str) -> Any:
    """A binary file, as it is stored; a plain path is never looked for on a network."""
    if isinstance(path, MadeRows):
        return io.BytesIO(path.content)
    if "://" not in path:
        return open(path, "rb")
    return _fsspec().open(path, "rb").open()


def size_of(path: str) -> int:
    """Bytes of a file as it is stored."""
    if isinstance(path, MadeRows):
        return len(path.content)
    if "://" not in path:
        return os.stat(path).st_size
    system, inner = _fsspec().core.url_to_fs(path)
    return system.size(inner)


def parquet_header(path: str) -> tuple[list[str], int]:
    """The columns and the number of rows of a Parquet file; ValueError if it is none."""
    pyarrow = _pyarrow(path)
    with open_file(path) as file:
        try:
            opened = pyarrow.parquet.ParquetFile(file)
        except (pyarrow.ArrowException, OSError) as error:
            raise ValueError(_not_parquet(error)) from error
        return opened.schema_arrow.names, opened.metadata.num_rows


def _expand_local(path: str) -> list[str]:
    if os.path.isdir(path):
        files = [os.path.join(path, name) for name in os.listdir(path)]
        if any(file.endswith(".arrow") for file in files):
            return []  # the .json beside them are about them
        return [file for file in files if os.path.isfile(file) and file.endswith(SUFFIXES)]
    if os.path.isfile(path):
        return [path]
    return [file for file in glob.glob(path, recursive=True) if os.path.isfile(file)]


def _expand_url(path: str) -> list[str]:
    system, inner = _fsspec().core.url_to_fs(path)
    if system.isfile(inner):
        return [path]
    if system.isdir(inner):
        found = [file for file in system.ls(inner, detail=False) if file.endswith(SUFFIXES)]
    else:
        found = system.glob(inner) if glob.has_magic(path) else []
    return [system.unstrip_protocol(file) for file in found if system.isfile(file)]


def _fsspec() -> Any:
    try:
        import fsspec
    except ImportError as error:
        raise ImportError(
            "fsspec: expected it for a path with ://, got none; run `pip install "
            "'gptoss-jax[train]'` or give a local path"
        ) from error
    return fsspec


def _pyarrow(wanted_for: str) -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError(
            f"pyarrow: expected it for {wanted_for}, got none; run `pip install "
            "'gptoss-jax[train]'`"
        ) from error
    return pyarrow


def _made_rows(path: MadeRows) -> Iterator[SourceRow]:
    for row in _jsonl_rows(path, io.BytesIO(path.content)):
        wrong = path.errors.get(row.line)
        yield row if wrong is None else row._replace(fields=None, error=wrong)


def _jsonl_rows(path: str, file: Any) -> Iterator[SourceRow]:
    number = 0
    try:
        with _text(_decompressed(path, file)) as lines:
            for number, line in enumerate(lines, start=1):
                fields, error = parse_object(line)
                yield SourceRow(path, number, fields, error)
    except (EOFError, zlib.error, gzip.BadGzipFile, _CompressedError) as error:
        cut = f"expected the rest of a compressed file, got {str(error)!r}; copy the file again"
        yield SourceRow(path, number + 1, None, cut)


def parse_object(line: str) -> tuple[dict[str, Any] | None, str | None]:
    """A line of JSONL as fields, or else what is wrong with it."""
    if not line.isascii() and (error := _encoding_error(line)):
        return None, error
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:
        return None, _json_error(line, error)
    if type(fields) is not dict:
        return None, _not_an_object(fields)
    return fields, None


def _json_error(line: str, error: Exception) -> str:
    if not line:
        return "expected a JSON object, got the end of the file; copy or write it again"
    if not line.strip():
        return "expected a JSON object, got a blank line; delete the line"
    if line.startswith("\ufeff"):
        return "expected JSON, got a byte order mark; save the file as UTF-8 without one"
    at = f" at character {error.pos + 1}" if isinstance(error, json.JSONDecodeError) else ""
    reason = str(getattr(error, "msg", error))
    return f"expected a JSON object, got {reason!r}{at}; correct the line"


def _not_an_object(value: Any) -> str:
    kind = {list: "a list", str: "text", type(None): "null", bool: "true or false"}
    got = kind.get(type(value), "a number")
    return f'expected a JSON object, got {got}; write {{"messages": [...]}} or another format'


def _encoding_error(line: str) -> str | None:
    """Whether a byte was not UTF-8: `_text` made a lone surrogate of it, which nothing encodes."""
    try:
        line.encode()
    except UnicodeEncodeError as error:
        byte, before = ord(line[error.start]) - 0xDC00, len(line[: error.start].encode())
        return f"expected UTF-8, got byte 0x{byte:02x} at byte {before + 1}; save the file as UTF-8"
    return None


def _text(file: Any) -> io.TextIOWrapper:
    """Lines as any editor counts them; bytes that are not UTF-8 become lone surrogates."""
    return io.TextIOWrapper(file, encoding="utf-8", errors="surrogateescape")


class _CompressedError(Exception):
    """What reading a damaged zstd file raises."""


def _decompressed(path: str, file: Any) -> Any:
    if path.endswith(".gz"):
        return gzip.GzipFile(fileobj=file)
    if path.endswith(".zst"):
        pyarrow = _pyarrow(f"{path} (zstd)")
        return io.BufferedReader(_Zstd(pyarrow.input_stream(file, compression="zstd")))
    return file


class _Zstd(io.RawIOBase):
    """A stream of Arrow's as one of Python's, whose errors can be told from those of the disk."""

    def __init__(self, stream: Any):
        self._stream = stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            data = self._stream.read(len(buffer))
        except (OSError, ValueError) as error:
            raise _CompressedError(str(error)) from error
        buffer[: len(data)] = data
        return len(data)


def _json_rows(path: str, file: Any) -> Iterator[SourceRow]:
    """The objects of a list one by one, or those that stand one after the other, as in JSONL."""
    with _text(file) as whole:
        text = whole.read()
    if not text.isascii() and _encoding_error(text):
        lines = enumerate(text.split("\n"), start=1)
        bad = ((number, _encoding_error(line)) for number, line in lines)
        yield from (SourceRow(path, number, None, error) for number, error in bad if error)
        return
    decode, place = json.JSONDecoder().raw_decode, _skip_space(text, 0)
    is_list = text[place : place + 1] == "["
    place, line, counted = (_skip_space(text, place + 1) if is_list else place), 1, 0
    if not text.strip() or (is_list and text[place : place + 1] == "]"):
        return
    while True:
        line, counted = line + text.count("\n", counted, place), place
        try:
            value, place = decode(text, place)
        except (ValueError, RecursionError) as error:
            yield SourceRow(path, line, None, _json_error(text[place:], error))
            return
        if type(value) is dict:
            yield SourceRow(path, line, value)
        else:
            yield SourceRow(path, line, None, _not_an_object(value))
        place = _skip_space(text, place)
        following = text[place : place + 1]
        if is_list and following == ",":
            place = _skip_space(text, place + 1)
            continue
        if not is_list and following == "{":
            continue
        if (is_list and following != "]") or text[place + is_list :].strip():
            line += text.count("\n", counted, place)
            yield SourceRow(path, line, None, _after_the_end(is_list))
        return


def _skip_space(text: str, place: int) -> int:
    match = _SPACE.match(text, place)
    return match.end() if match else place


def _after_the_end(is_list: bool) -> str:
    if is_list:
        return "expected `,` or the end of the list, got something else; correct the file here"
    return "expected an object, a list of them or one a line, got something else; correct it here"


def _parquet_rows(path: str, file: Any) -> Iterator[SourceRow]:
    pyarrow = _pyarrow(path)
    number = 0
    try:
        for batch in pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=_ROWS_AT_ONCE):
            for row in _values(batch):
                number += 1
                yield SourceRow(path, number, row)
    except (pyarrow.ArrowException, OSError) as error:
        yield SourceRow(path, number + 1, None, _not_parquet(error))


def _values(batch: Any) -> Iterator[dict[str, Any]]:
    """The rows of a batch as JSON values; what Python cannot hold is Unheld."""
    names = batch.schema.names
    columns = [_held(column) for column in batch.columns]
    for at, kind in enumerate(batch.schema.types):
        if _has_map(kind):
            columns[at] = [_objects(kind, value) for value in columns[at]]
    for values in zip(*columns, strict=True) if columns else ():
        yield json_value(dict(zip(names, values, strict=True)))


def _held(column: Any) -> list[Any]:
    """The values of a column, one by one where they cannot be had together."""
    try:
        return column.to_pylist()
    except (ValueError, OverflowError, LookupError, ImportError) as error:  # a date beyond 9999
        if len(column) == 1:
            return [Unheld(str(error).partition("\n")[0])]
        return [value for at in range(len(column)) for value in _held(column.slice(at, 1))]


def _objects(kind: Any, value: Any) -> Any:
    """A value of an Arrow type with an object for each of its maps, which are lists of pairs.

    Without the type an empty one looks like an empty list.
    """
    if type(value) is list and hasattr(kind, "item_type"):
        return {written(key): _objects(kind.item_type, inner) for key, inner in value}
    if type(value) is list and hasattr(kind, "value_type"):
        return [_objects(kind.value_type, inner) for inner in value]
    if type(value) is dict:
        return {field.name: _objects(field.type, value[field.name]) for field in kind}
    return value


def _has_map(kind: Any) -> bool:
    """Whether values of an Arrow type hold a map."""
    inside = [kind.field(at).type for at in range(kind.num_fields)]
    return hasattr(kind, "item_type") or any(map(_has_map, inside))


def _not_parquet(error: Exception) -> str:
    reason = str(error).partition("\n")[0]
    return f"expected Parquet, got {reason!r}; copy or write the file again"
