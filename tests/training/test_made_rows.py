# SPDX-License-Identifier: Apache-2.0
"""Rows from Python: named in a run, made anew by each call, the same within one."""

import copy
import dataclasses
import datetime
import decimal
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from gptoss_jax.harmony import Tokenizer
from gptoss_jax.run_file import from_fields
from gptoss_jax.training.check import check
from gptoss_jax.training.data import DataOptions, load_rows, order_fields
from gptoss_jax.training.made_rows import MadeRows
from gptoss_jax.training.sources import digest, files_of, read_rows


def row(answer):
    return {
        "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": answer}]
    }


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A module whose `rows` a notebook would edit."""
    (tmp_path / "edited_rows.py").write_text("ROWS = []\n\n\ndef rows():\n    return ROWS\n")
    monkeypatch.syspath_prepend(tmp_path)
    import edited_rows

    yield edited_rows
    del sys.modules["edited_rows"]


@pytest.fixture(scope="module")
def compact():
    return Tokenizer.compact()


def number_of(options, tokenizer):
    return len(load_rows(options.train, options, tokenizer=tokenizer))


def test_a_list_that_has_grown_and_a_function_defined_anew_are_read_anew(module, compact):
    options = DataOptions(train=("edited_rows:rows",))
    seen = []

    module.ROWS.append(row("a"))
    seen.append((number_of(options, compact), check(options.train).statistics["rows"]))
    module.ROWS.append(row("b"))
    seen.append((number_of(options, compact), check(options.train).statistics["rows"]))
    before = digest(options.train)
    module.rows = lambda: [row(str(number)) for number in range(7)]
    seen.append((number_of(options, compact), check(options.train).statistics["rows"]))

    assert seen == [(1, 1), (2, 2), (7, 7)]
    assert digest(options.train) != before


def test_a_check_asks_for_the_rows_once(module):
    asked = []

    def rows():
        asked.append(1)
        return [row(str(len(asked)))] * len(asked)

    module.rows = rows

    report = check("edited_rows:rows")

    assert len(asked) == 1
    assert report.files[0]["bytes"] == len(json.dumps(row("1"))) + 1
    assert report.files[0]["rows"] == 1


def test_a_list_a_function_and_a_path_are_data_from_python(tmp_path, compact):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row("c")) + "\n")
    listed = [row("a"), row("b")]

    def made():
        return [row("d")]

    sources = {
        "a list of 2 rows": listed,
        "a tuple of 2 rows": tuple(listed),
        "a generator of 2 rows": (one for one in listed),
        f"rows of {made.__qualname__}()": made,
        str(path): path,
    }
    for name, source in sources.items():
        options = DataOptions(train=source)
        again = dataclasses.replace(options, rows=3)

        assert options.train == again.train == (name,)
        assert (
            number_of(options, compact) == number_of(again, compact) == 2 - (source in (made, path))
        )
    mixed = DataOptions(train=[path, listed, made], eval=str(path))
    assert number_of(mixed, compact) == 4
    assert mixed.eval == (str(path),)


def test_what_is_written_of_a_run_names_the_rows(compact):
    options = DataOptions(train=[row("a")] * 3, eval=[row("b")])

    fields = dataclasses.asdict(options)

    written = json.loads(json.dumps(fields))
    assert (written["train"], written["eval"]) == (["a list of 3 rows"], ["a list of 1 rows"])
    assert json.loads(json.dumps(order_fields(options))) == order_fields(options)
    assert number_of(copy.deepcopy(options), compact) == 3


@pytest.mark.parametrize("wrong", [5, None, "", [5], [None], {"messages": []}, [["a.jsonl"], 5]])
def test_what_is_no_data_is_refused(wrong):
    with pytest.raises(ValueError, match="train: expected paths, rows or functions"):
        DataOptions(train=wrong)


@pytest.mark.parametrize("none", [None, "none", [], ()])
def test_no_held_out_data_in_every_way_to_say_so(none):
    assert DataOptions(train="a", eval=none).eval == ()


def test_what_is_wrong_is_shown_without_the_rows_beside_it():
    with pytest.raises(ValueError, match=r"^train: expected paths, rows or functions, got none$"):
        DataOptions(train=[None, *[row("a")] * 1000])
    with pytest.raises(ValueError, match=r"^eval: expected paths") as raised:
        DataOptions(train="a", eval={"messages": [row("a" * 1000)] * 1000})
    assert len(str(raised.value)) < 1000


def test_rows_in_a_mapping_of_options_are_those_of_the_options():
    deep: list = []
    for _ in range(5000):
        deep = [deep]
    rows = [row("a"), {"x": deep, "day": datetime.date(2026, 1, 1)}]

    made = from_fields(DataOptions, {"train": rows, "eval": lambda: rows}, where="data")

    assert made.train[0].source is rows
    assert made.train == DataOptions(train=rows).train


@pytest.mark.parametrize("none", [[], ()])
def test_no_data_is_refused(none):
    with pytest.raises(ValueError, match="train: expected at least one path, or rows"):
        DataOptions(train=none)


def test_a_home_folder_is_read_as_one(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "rows.jsonl").write_text(json.dumps(row("a")) + "\n")

    for path in ("~/rows.jsonl", "~/*.jsonl", "~"):
        (found,) = read_rows(path)
        assert (found.path, found.fields) == (str(tmp_path / "rows.jsonl"), row("a"))


def test_values_of_python_become_json_and_others_are_errors_of_their_row():
    values = {
        "day": datetime.date(2026, 1, 2),
        "at": datetime.datetime(2026, 1, 2, 3, 4, 5),
        "price": decimal.Decimal("1.20"),
        "raw": b"text",
        "number": np.int64(3),
        "list": np.array([1.5, 2.0]),
    }
    circle: dict = {}
    circle["itself"] = circle
    made = MadeRows("mine", lambda: [values, {"a": object()}, circle, row("a"), {"b": b"\xff"}, 5])

    found = list(read_rows(made))

    assert found[0].fields == {
        "day": "2026-01-02",
        "at": "2026-01-02T03:04:05",
        "price": "1.20",
        "raw": "text",
        "number": 3,
        "list": [1.5, 2.0],
    }
    assert found[3].fields == row("a")
    wrong = {one.line: one.error for one in found if one.error}
    assert set(wrong) == {2, 3, 5, 6}
    assert wrong[2].startswith("expected JSON values, got others (object is no JSON value); conv")
    assert wrong[6].startswith("expected a JSON object, got a number")


def raises():
    raise RuntimeError("the database is gone")


def raises_later():
    yield row("a")
    raise KeyError("b")


def wants(number, *, fast):
    return [row("a")] * number


WRONG = {
    "raises": "expected rows, got RuntimeError: the database is gone, which the code that makes",
    "raises_later": "expected rows, got KeyError: 'b' after 1 rows, which the code that makes them",
    "wants": r"expected a function that is called without arguments, got one with \(number, \*, f",
    "none": "expected a list of rows, or what gives them one by one, got None; return that",
    "mapping": "expected a list of rows, or what gives them one by one, got a dict; return that",
    "VALUE": "expected a list of rows, or what gives them one by one, got a int; return that",
    "TEXT": "expected a list of rows, or what gives them one by one, got a str; return that",
}
MAKERS = {
    "raises": raises,
    "raises_later": raises_later,
    "wants": wants,
    "none": lambda: None,
    "mapping": lambda: row("a"),
    "VALUE": 5,
    "TEXT": "a.jsonl",
}


@pytest.mark.parametrize("name", WRONG)
def test_python_that_makes_no_rows_is_one_error_with_its_name(module, compact, name):
    setattr(module, name, MAKERS[name])
    path = f"edited_rows:{name}"
    looked_at = name in ("wants", "VALUE", "TEXT")

    with pytest.raises(ValueError, match=f"^{path}: {WRONG[name]}") as raised:
        load_rows([path], DataOptions(train="x"), tokenizer=compact)
    report = check(path)
    if looked_at:
        with pytest.raises(ValueError, match=f"^{path}: expected"):
            files_of(path)
    else:
        assert files_of(path) == [path]

    assert report.kinds["error"] == {"unreadable": 1}
    assert f"{path}: {report.findings[0].text}" == str(raised.value)
    assert isinstance(raised.value.__cause__, RuntimeError | KeyError) == ("raises" in name)


def test_rows_under_a_name_are_rows(module, compact):
    module.ROWS.extend([row("a"), row("b")])

    assert number_of(DataOptions(train="edited_rows:ROWS"), compact) == 2


def test_a_module_that_fails_is_one_error_before_its_rows_are_read(tmp_path, monkeypatch):
    (tmp_path / "broken_rows.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)

    with pytest.raises(ValueError, match=r"broken_rows:rows: expected a module .* ZeroDivis"):
        files_of("broken_rows:rows")
    with pytest.raises(ValueError, match=r"no_module:a: expected a file(.|\n)*broken_rows:b: exp"):
        files_of(["no_module:a", "broken_rows:b"])


def test_a_function_that_is_not_there_is_an_error_of_both(compact):
    with pytest.raises(ValueError, match="no_such_module:rows: expected a file of rows, or a fun"):
        load_rows(["no_such_module:rows"], DataOptions(train="x"), tokenizer=compact)

    report = check(["no_such_module:rows", str(Path(__file__).parent / "none.jsonl")])

    assert report.kinds["error"] == {"found": 2}
    assert report.findings[0].text.startswith("expected a file of rows, or a function that makes")
