# SPDX-License-Identifier: Apache-2.0
"""Rows of a dataset: every kind of file, where each row stands, and what cannot be read."""

import datetime
import decimal
import gzip
import hashlib
import io
import json
import sys

import fsspec
import pyarrow
import pyarrow.parquet
import pytest

from gptoss_jax.training.formats import conversation_of
from gptoss_jax.training.sources import digest, files_of, parquet_header, read_rows

ROWS = [
    {"messages": [{"role": "user", "content": "é\n\u2028"}], "id": 1},
    {"messages": [{"role": "user", "content": "漢"}, {"role": "assistant"}], "id": 2},
    {"messages": [], "id": 3},
]
JSONL = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()


def parquet(rows: list[dict], **options) -> bytes:
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file, **options)
    return file.getvalue()


KINDS = {
    "rows.jsonl": JSONL,
    "rows.jsonl.gz": gzip.compress(JSONL),
    "rows.jsonl.zst": pyarrow.compress(JSONL, codec="zstd", asbytes=True),
    "rows.json": json.dumps(ROWS).encode(),
    "rows.parquet": parquet(ROWS, row_group_size=2),
}


@pytest.fixture
def memory():
    """A file system of fsspec's that nothing else has seen."""
    system = fsspec.filesystem("memory")
    system.store.clear()
    system.pseudo_dirs[:] = [""]
    return system


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_file_has_the_same_rows(name, tmp_path):
    path = tmp_path / name
    path.write_bytes(KINDS[name])

    rows = list(read_rows(str(path)))

    assert [row.fields for row in rows] == ROWS
    assert [row.path for row in rows] == [str(path)] * 3
    assert [row.line for row in rows] == ([1, 1, 1] if name == "rows.json" else [1, 2, 3])


@pytest.mark.parametrize("name", KINDS)
def test_a_url_is_read_as_a_path_is(name, memory):
    memory.pipe(f"/data/{name}", KINDS[name])

    rows = list(read_rows([f"memory://data/{name}"]))

    assert [row.fields for row in rows] == ROWS
    assert rows[0].path == f"memory://data/{name}"


def test_folders_and_globs_are_sorted_and_hold_known_files(tmp_path, memory):
    for name in ("b.jsonl", "a.json", "c.parquet", "README.md", "d.txt"):
        (tmp_path / name).write_bytes(b"")
        memory.pipe(f"/data/{name}", b"")
    (tmp_path / "deeper").mkdir()
    (tmp_path / "deeper" / "e.jsonl").write_bytes(b"")

    def names(path):
        return [file.rpartition("/")[2] for file in files_of(path)]

    assert names(str(tmp_path)) == names("memory://data") == ["a.json", "b.jsonl", "c.parquet"]
    assert names(f"{tmp_path}/*.json*") == names("memory://data/*.json*") == ["a.json", "b.jsonl"]
    assert names(f"{tmp_path}/**/*.jsonl") == ["b.jsonl", "e.jsonl"]
    assert names([f"{tmp_path}/c.parquet", f"{tmp_path}/a.json"]) == ["c.parquet", "a.json"]


def test_a_name_with_brackets_is_a_name(tmp_path):
    path = tmp_path / "rows[1].jsonl"
    path.write_bytes(JSONL)

    assert files_of(str(path)) == [str(path)]


def test_all_paths_without_files_are_named_before_the_first_row(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "empty").mkdir()
    paths = [str(tmp_path / name) for name in ("gone.jsonl", "notes.txt", "empty", "*.parquet")]

    with pytest.raises(ValueError) as caught:
        read_rows(paths)
    with pytest.raises(ValueError, match="expected at least one, got none"):
        read_rows([])

    assert [line.partition(": expected")[0] for line in str(caught.value).splitlines()] == paths


BAD_LINES = [
    (b"", "expected a JSON object, got a blank line; delete the line"),
    (b"{", "got 'Expecting property name enclosed in double quotes' at character 3"),
    (b"[1]", "expected a JSON object, got a list"),
    (b'"a"', "expected a JSON object, got text"),
    (b"null", "expected a JSON object, got null"),
    (b"true", "expected a JSON object, got true or false"),
    (b"1.5", "expected a JSON object, got a number"),
    (b'{"a": 1} {"b": 2}', "got 'Extra data' at character 10"),
    (b"\xef\xbb\xbf{}", "got a byte order mark; save the file as UTF-8 without one"),
    ('{"é": "\xff"}'.encode("latin-1"), "expected UTF-8, got byte 0xe9 at byte 3"),
    ('{"é": "'.encode() + b"\xff", "expected UTF-8, got byte 0xff at byte 9"),
    (b"[" * 100_000, "recursion"),
    (b'{"a": ' + b"9" * 5000 + b"}", "Exceeds the limit"),
]


def test_bad_lines_are_rows_with_errors_between_good_ones(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"".join(line + b'\n{"good": 1}\n' for line, _ in BAD_LINES))

    rows = list(read_rows(str(path)))

    assert [row.line for row in rows] == list(range(1, 2 * len(BAD_LINES) + 1))
    assert [row.fields for row in rows[1::2]] == [{"good": 1}] * len(BAD_LINES)
    for row, (line, error) in zip(rows[::2], BAD_LINES, strict=True):
        assert row.fields is None
        assert error in row.error, line


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("rows.jsonl.gz", "cut"),
        ("rows.jsonl.gz", "changed"),
        ("rows.jsonl.zst", "cut"),
        ("rows.parquet", "cut"),
        ("rows.parquet", "changed"),
    ],
)
def test_a_damaged_file_is_an_error_and_no_exception(name, damage, tmp_path):
    many = [
        {"id": number, "text": hashlib.sha256(b"%d" % number).hexdigest()} for number in range(999)
    ]
    jsonl = "".join(json.dumps(row) + "\n" for row in many).encode()
    data = {
        "rows.jsonl.gz": gzip.compress(jsonl),
        "rows.jsonl.zst": pyarrow.compress(jsonl, codec="zstd", asbytes=True),
        "rows.parquet": parquet(many, use_dictionary=False, write_page_checksum=True),
    }[name]
    middle = len(data) // 2
    path = tmp_path / name
    if damage == "cut":
        path.write_bytes(data[:middle])
    else:
        path.write_bytes(data[:middle] + b"\x00\xff" * 8 + data[middle + 16 :])

    *good, last = read_rows(str(path))

    assert last.fields is None
    assert "copy" in last.error
    assert last.line == len(good) + 1
    assert all(row.fields in many or row.error for row in good)


def test_json_is_a_list_or_objects_one_after_the_other(tmp_path):
    def read(text):
        path = tmp_path / "rows.json"
        path.write_text(text)
        return [
            (row.line, row.fields if row.error is None else row.error[:60])
            for row in read_rows(str(path))
        ]

    assert read('{"a": 1}\n') == [(1, {"a": 1})]
    assert read('\n[\n{"a": 1},\n\n{"a":\n2}, {"a": 3}\n]\n') == [
        (3, {"a": 1}),
        (5, {"a": 2}),
        (6, {"a": 3}),
    ]
    assert read(" [ ] ") == read("") == []
    assert read('[{"a": 1},\n2]') == [
        (1, {"a": 1}),
        (2, 'expected a JSON object, got a number; write {"messages": [..'),
    ]
    assert read('[{"a": 1},\n{]') == [
        (1, {"a": 1}),
        (2, "expected a JSON object, got 'Expecting property name enclosed"[:60]),
    ]
    assert read('[{"a": 1}\n{"a": 2}]') == [
        (1, {"a": 1}),
        (2, "expected `,` or the end of the list, got something else; cor"),
    ]
    assert read('[{"a": 1},\n') == [
        (1, {"a": 1}),
        (2, "expected a JSON object, got the end of the file; copy or wri"),
    ]
    assert read('{"a": 1}\n{"a":\n2}\n\n{"a": 3}') == [
        (1, {"a": 1}),
        (2, {"a": 2}),
        (5, {"a": 3}),
    ]
    assert read('{"a": 1}\n,{"a": 2}\n') == [
        (1, {"a": 1}),
        (2, "expected an object, a list of them or one a line, got someth"),
    ]
    assert read('{"a": 1}\n{') == [
        (1, {"a": 1}),
        (2, "expected a JSON object, got 'Expecting property name enclosed"[:60]),
    ]


def test_json_that_is_not_utf8_names_the_line(tmp_path):
    (tmp_path / "rows.json").write_bytes(b'[{"a": 1},\n{"b": "\xff"}]')

    (row,) = read_rows(str(tmp_path / "rows.json"))

    assert (row.line, row.error[:26]) == (2, "expected UTF-8, got byte 0")


def test_null_fields_of_a_parquet_struct_were_not_there(tmp_path):
    rows = [{"a": {"b": 1, "c": None}, "d": None}, {"a": {"b": None, "c": [{"e": None}]}, "d": 2}]
    (tmp_path / "rows.parquet").write_bytes(parquet(rows))

    read = [row.fields for row in read_rows(str(tmp_path / "rows.parquet"))]

    assert read == [{"a": {"b": 1}}, {"a": {"c": [{}]}, "d": 2}]


def test_values_that_json_has_no_word_for_are_text(tmp_path):
    at = datetime.datetime(2025, 3, 1, 10, tzinfo=datetime.UTC)
    values = {
        "day": datetime.date(2025, 3, 1),
        "at": datetime.datetime(2025, 3, 1, 10, 0, 0, 500),
        "there": at,
        "hour": datetime.time(10, 30),
        "took": datetime.timedelta(days=1, microseconds=-500_000),
        "back": datetime.timedelta(seconds=-90),
        "price": decimal.Decimal("-1.50"),
        "name": "é".encode(),
        "raw": b"\xff",
    }
    (tmp_path / "rows.parquet").write_bytes(parquet([{"a": [values]}]))

    (row,) = read_rows(str(tmp_path / "rows.parquet"))

    assert row.fields["a"] == [
        {
            "day": "2025-03-01",
            "at": "2025-03-01T10:00:00.000500",
            "there": "2025-03-01T10:00:00+00:00",
            "hour": "10:30:00",
            "took": "PT86399.5S",
            "back": "-PT90S",
            "price": "-1.50",
            "name": "é",
            "raw": b"\xff",
        }
    ]


def test_a_map_of_arrow_is_an_object(tmp_path):
    kind = pyarrow.map_(pyarrow.string(), pyarrow.date32())
    days = pyarrow.array([[("a", datetime.date(2025, 3, 1)), ("b", None)], None], kind)
    pyarrow.parquet.write_table(pyarrow.table({"days": days}), tmp_path / "rows.parquet")

    rows = list(read_rows(str(tmp_path / "rows.parquet")))

    assert [row.fields for row in rows] == [{"days": {"a": "2025-03-01"}}, {}]


UNHELD = {
    "a date beyond the year 9999": pyarrow.array([0, 10**7, 1], pyarrow.date32()),
    "seconds beyond it": pyarrow.array([0, 2**40, 86400], pyarrow.timestamp("s")),
    "seconds within a struct": pyarrow.array(
        [{"a": [0]}, {"a": [2**40]}, None],
        pyarrow.struct([("a", pyarrow.list_(pyarrow.timestamp("s")))]),
    ),
    "a time zone that nobody knows": pyarrow.array(
        [None, 1, None], pyarrow.timestamp("s", tz="Nowhere/X")
    ),
}


@pytest.mark.parametrize("name", UNHELD)
def test_what_python_cannot_hold_is_an_error_only_of_whom_it_is_for(tmp_path, name):
    texts = pyarrow.array(["a", "b", "c"])
    table = pyarrow.table({"text": texts, "at": UNHELD[name]})
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")

    rows = list(read_rows(str(tmp_path / "rows.parquet")))

    assert [row.error for row in rows] == [None] * 3
    assert [conversation_of(row.fields).text for row in rows] == ["a", "b", "c"]
    assert repr(rows[1].fields["at"]).startswith("what Python cannot hold (")
    assert "cannot hold" not in f"{rows[0].fields} {rows[2].fields}"
    with pytest.raises(ValueError, match=r"messages: expected a list .* Python cannot hold \("):
        conversation_of({"messages": rows[1].fields["at"]})


def test_an_empty_map_of_arrow_is_an_empty_object(tmp_path):
    text = pyarrow.string()
    arguments = pyarrow.map_(text, pyarrow.map_(text, text))
    kind = pyarrow.list_(pyarrow.struct([("arguments", arguments), ("list", pyarrow.list_(text))]))
    calls = [[{"arguments": [], "list": []}, {"arguments": [("a", []), ("b", [("c", "d")])]}], None]
    table = pyarrow.table({"calls": pyarrow.array(calls, kind)})
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")

    rows = list(read_rows(str(tmp_path / "rows.parquet")))

    made = [{"arguments": {}, "list": []}, {"arguments": {"a": {}, "b": {"c": "d"}}}]
    assert [row.fields for row in rows] == [{"calls": made}, {}]


def test_folders_that_hold_rows_in_another_way_are_told_apart(tmp_path):
    saved, snapshot = tmp_path / "saved", tmp_path / "snapshot"
    for folder, name in ((saved, "data-00000-of-00001.arrow"), (snapshot / "data", "a.parquet")):
        folder.mkdir(parents=True)
        (folder / name).write_bytes(parquet(ROWS))
    (saved / "state.json").write_text("{}")

    with pytest.raises(ValueError) as caught:
        files_of([str(saved), str(snapshot)])

    assert str(caught.value).splitlines() == [
        f"{saved}: expected a file of rows, got a folder of Arrow files, as datasets' save_to_disk "
        "makes it; write Parquet instead, with to_parquet",
        f"{snapshot}: expected a file of rows, got a folder that has some in {snapshot / 'data'}; "
        "name that",
    ]


def test_the_header_of_a_parquet_file(tmp_path):
    (tmp_path / "rows.parquet").write_bytes(KINDS["rows.parquet"])
    (tmp_path / "none.parquet").write_bytes(JSONL)

    assert parquet_header(str(tmp_path / "rows.parquet")) == (["messages", "id"], 3)
    with pytest.raises(ValueError, match="expected Parquet, got"):
        parquet_header(str(tmp_path / "none.parquet"))


def test_the_digest_is_of_the_bytes_in_order(tmp_path):
    for name, data in (("a.jsonl", b"{}\n"), ("b.jsonl", JSONL)):
        (tmp_path / name).write_bytes(data)
    sums = [hashlib.sha256(data).digest() for data in (b"{}\n", JSONL)]

    whole = digest(str(tmp_path))

    assert whole == hashlib.sha256(sums[0] + sums[1]).hexdigest()
    (tmp_path / "a.jsonl").rename(tmp_path / "0.jsonl")
    assert digest(str(tmp_path)) == whole
    (tmp_path / "0.jsonl").rename(tmp_path / "c.jsonl")
    assert digest(str(tmp_path)) == hashlib.sha256(sums[1] + sums[0]).hexdigest()


def test_local_files_need_no_optional_package(tmp_path, monkeypatch):
    for name in ("fsspec", "pyarrow"):
        monkeypatch.setitem(sys.modules, name, None)
    (tmp_path / "rows.jsonl").write_bytes(JSONL)
    (tmp_path / "rows.parquet").write_bytes(KINDS["rows.parquet"])

    assert [row.fields for row in read_rows(str(tmp_path / "rows.jsonl"))] == ROWS
    with pytest.raises(ImportError, match=r"gptoss-jax\[train\]"):
        list(read_rows(str(tmp_path / "rows.parquet")))
    with pytest.raises(ImportError, match=r"gptoss-jax\[train\]"):
        read_rows("memory://data/rows.jsonl")
