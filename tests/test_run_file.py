# SPDX-License-Identifier: Apache-2.0
"""Strict reading of TOML files into dataclasses."""

import dataclasses
import datetime
import math
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from gptoss_jax.field_kinds import in_words, settle, shown
from gptoss_jax.mesh_file import read_mesh
from gptoss_jax.run_file import fields_table, from_fields, read_run


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wheel:
    size: int
    colour: Literal["red", "blue"] = "red"
    load: float = 1.0

    def __post_init__(self):
        if self.size < 1:
            raise ValueError(f"expected a size of at least 1, got {self.size}")
        if self.load <= 0 or self.load > self.size:
            raise ValueError(f"load: expected above 0, got {self.load}, for size={self.size}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cart:
    name: str
    wheels: tuple[Wheel, ...] = ()
    spare: Wheel | None = None
    tags: tuple[str, ...] = ()
    day: str | None = None
    born: datetime.date | None = None
    cargo: Any = dataclasses.field(default=None, metadata={"words": "whatever it carries"})
    limit: float | None = 2.0
    span: tuple[int, int] | None = None
    spokes: Mapping[str, int] = dataclasses.field(default_factory=dict)
    others: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def read(tmp_path, text: str, *overrides: str) -> Cart:
    path = tmp_path / "cart.toml"
    path.write_text(text)
    return read_run(Cart, path, overrides)


def test_nested_tables(tmp_path):
    cart = read(
        tmp_path,
        'name = "n"\ntags = ["a"]\n[[wheels]]\nsize = 2\n[[wheels]]\nsize = 3\ncolour = "blue"\n',
    )

    assert cart == Cart(name="n", tags=("a",), wheels=(Wheel(size=2), Wheel(size=3, colour="blue")))


def test_overrides(tmp_path):
    text = 'name = "n"\n[spare]\nsize = 2\n'

    cart = read(
        tmp_path, text, "spare.size=5", "name=other", 'tags=["x", "y"]', "spare.colour=blue"
    )

    assert cart == Cart(name="other", tags=("x", "y"), spare=Wheel(size=5, colour="blue"))


def test_an_override_makes_its_table(tmp_path):
    assert read(tmp_path, 'name = "n"', "spare.size=4").spare == Wheel(size=4)


@pytest.mark.parametrize(
    ("text", "overrides", "expected"),
    [
        ("nam = 'n'", (), ["nam: unknown key (did you mean name?)", "name: missing"]),
        ("name = 'n'\nzzz = 1", (), ["zzz: unknown key (expected one of name, wheels"]),
        ("name = 'n'\n[spare]\nsiz = 2", (), ["spare.siz: unknown key (did you mean size?)"]),
        ("name = 'n'\n[[wheels]]\nsize = 1\nx = 2", (), ["wheels.0.x: unknown key"]),
        ("name = 'n'\n[spare]\nsize = 'big'", (), ["spare.size: ", "got 'big'"]),
        ("name = 'n'\n[spare]\nsize = 1\ncolour = 'green'", (), ["'red' or 'blue'", "'green'"]),
        ("name = 'n'\n[spare]\nsize = 0", (), ["spare: expected a size of at least 1, got 0"]),
        ("name =", (), ["expected TOML"]),
        ("name = 'n'", ("spare",), ["spare: expected a field and its value"]),
        ("name = 'n'", ("name.x=1",), ["expected a table at name, got 'n'"]),
        ("name = 'n'", ("x[0]=1", "tags=[a]"), ["x[0]=1: expected a", "tags=[a]: expected TOML"]),
        ("name = 3", (), ["cart.toml: name: expected text in quotes, got 3"]),
        ("name = 'n'\nwheels = 3", (), ["wheels: expected a list, got 3"]),
        ("name = 'n'\nspare = 3", (), ["spare: expected a table or none, got 3"]),
        ("name = 'n'\n[spare]\nsize = 2.5", (), ["spare.size: expected a whole number, got 2.5"]),
        ("name = 'n'\n[spare]\nsize = true", (), ["spare.size: expected a whole number, got true"]),
        ("name = 'n'\n[[wheels]]\nsize = 2\nload = false", (),
         ["wheels.0.load: expected a number, got false"]),
        ("name = 'n'\n[spokes]\nfront = true", (), ["spokes.front: expected a whole number, g"]),
        ("name = 'n'\nspan = [1, 2, 3]", (), ["span: expected 2 values, got 3"]),
        ("name = 'n'\nspan = [1]", (), ["span: expected more values, got [1]"]),
        ("name = 'n'\n[spare]\nsize = 1\nload = 0", (),
         ["spare.load: expected above 0, got 0.0"]),
        ("name = 'n'\ncolour = 'red'", (), ["colour: unknown key (did you mean wheels.N.colour "]),
        ("name = 'n'\n[spare]\nsize = 1\ntags = []", (),
         ["spare.tags: unknown key (did you mean tags?)"]),
    ],
)  # fmt: skip
def test_everything_wrong_is_in_one_error(tmp_path, text, overrides, expected):
    with pytest.raises(ValueError) as caught:
        read(tmp_path, text, *overrides)

    assert [part for part in expected if part not in str(caught.value)] == []


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match=r"cart\.toml: expected a TOML file"):
        read_run(Cart, tmp_path / "cart.toml")


TEXT = 'name = "n"\n[spare]\nsize = 2\n'


@pytest.mark.parametrize(
    ("override", "field", "right"),
    [
        ("day=2026-01-02", "day", "2026-01-02"),
        ("day=2026-01-02T03:04:05", "day", "2026-01-02T03:04:05"),
        ("day=2026", "day", "2026"),
        ("day=none", "day", None),
        ("day='None'", "day", None),
        ("day=nonesuch", "day", "nonesuch"),
        ("name=none", "name", "none"),
        ("limit=none", "limit", None),
        ("limit=3", "limit", 3.0),
        ("span=NONE", "span", None),
        ("spare=none", "spare", None),
        ("tags=a", "tags", ("a",)),
        ("tags=7", "tags", ("7",)),
        ("tags=['a', 'none']", "tags", ("a", "none")),
        ('spokes."a.b*=c"=4', "spokes", {"a.b*=c": 4}),
        ("spokes.'a.b'=4", "spokes", {"a.b": 4}),
        ("name=a=b", "name", "a=b"),
        ("others={a=[2026-01-02, true], b='none'}", "others",
         {"a": ["2026-01-02", True], "b": "none"}),
    ],
)  # fmt: skip
def test_what_may_be_written(tmp_path, override, field, right):
    """A date for text, `none` where a field may be that, one text for several, quoted names."""
    assert getattr(read(tmp_path, TEXT, override), field) == right


def test_the_same_in_the_file(tmp_path):
    text = 'name = "n"\nday = 2026-01-02\nlimit = "none"\ntags = "a"\nothers.x = 10:11:12\n'

    cart = read(tmp_path, text)

    assert (cart.day, cart.limit, cart.tags) == ("2026-01-02", None, ("a",))
    assert cart.others == {"x": "10:11:12"}


def test_a_byte_order_mark(tmp_path):
    path = tmp_path / "cart.toml"
    path.write_bytes(b"\xef\xbb\xbf" + TEXT.encode())

    assert read_run(Cart, path).name == "n"
    path.write_bytes(b"\xef\xbb\xbf[mesh]\ndata = 2\n")
    assert read_mesh(path).sizes == {"data": 2}


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("spare.size=big", "spare.size: expected a whole number, got 'big' (set on the comman"),
        ("spare.size=0", "spare: expected a size of at least 1, got 0 (spare.size is set on the"),
        ("spare.size=1", "for size=1 (spare.size is set on the command line)"),
        ("spare={size='x'}", "spare.size: expected a whole number, got 'x' (set on the comma"),
        ("spare.siz=3", "spare.siz: unknown key (did you mean size?) (set on the command line)"),
        ("spar.size=3", "spar: unknown key (did you mean spare?) (spar.size is set on the command"),
        ("tags=x", "for size=2"),
    ],
)  # fmt: skip
def test_who_has_set_what_is_wrong(tmp_path, override, expected):
    text = TEXT + f"load = {1.5 if override != 'tags=x' else 3.0}\n"

    with pytest.raises(ValueError) as caught:
        read(tmp_path, text, override)

    said = str(caught.value)
    assert expected in said
    assert said.count("the command line)") == (override != "tags=x")


class Driver:
    pass


@dataclasses.dataclass(frozen=True, kw_only=True)
class Yard:
    carts: tuple[Cart | Driver, ...] = ()
    first: Cart | None = None
    folder: str = "."
    tags: tuple[str, ...] = ()

    def __post_init__(self):
        settle(self)


def test_what_python_gives():
    """Paths, lists, mappings, one text: as a file would have them. Objects stay what they are."""
    driver, cart = Driver(), Cart(name="a")
    given: Any = {"folder": Path("x") / "y", "tags": "t", "first": {"name": "b", "tags": "u"}}

    yard = Yard(**given, carts=[cart, driver])  # pyright: ignore[reportArgumentType]

    assert yard == Yard(
        folder="x/y", tags=("t",), first=Cart(name="b", tags=("u",)), carts=(cart, driver)
    )
    described: Any = [{"name": "a"}, driver]
    assert Yard(carts=described).carts == (cart, driver)
    listed: Any = [PurePosixPath("p"), "q"]
    assert Yard(tags=listed).tags == ("p", "q")
    wrong: Any = {"first": {"nam": "b"}, "carts": (), "folder": "none"}
    with pytest.raises(
        ValueError, match=r"first.nam: unknown key \(did you mean name\?\); first.name: m"
    ):
        Yard(**wrong)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gauge:
    other_names = {"bore": "size"}

    size: int = 1
    load: float = 1.0
    shown: bool = False
    mode: Literal["a", "b"] | None = None
    sizes: Mapping[str, int] = dataclasses.field(default_factory=dict)
    span: tuple[int, int] | None = None
    tags: tuple[str, ...] = ()

    def __post_init__(self):
        settle(self)


@pytest.mark.parametrize(
    ("given", "field", "right"),
    [
        (np.int64(3), "size", 3),
        (jnp.int32(3), "size", 3),
        (3.0, "size", 3),
        (2, "load", 2.0),
        (np.float32(0.5), "load", 0.5),
        (np.bool_(True), "shown", True),
        ({"x": np.int32(2)}, "sizes", {"x": 2}),
        ([1, np.int64(2)], "span", (1, 2)),
        (iter("ab"), "tags", ("a", "b")),
        ("ab", "tags", ("ab",)),
    ],
)
def test_numbers_and_lists_of_python(given, field, right, monkeypatch):
    """Whatever library made them; the kinds are exactly those of a file."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)

    found = getattr(Gauge(**{field: given}), field)

    assert found == right and type(found) is type(right)


@pytest.mark.parametrize(
    ("field", "given", "said"),
    [
        ("size", "3", "size: expected a whole number, got '3'"),
        ("size", True, "size: expected a whole number, got True"),
        ("size", 2.5, "size: expected a whole number, got 2.5"),
        ("size", np.float64(2.5), "size: expected a whole number, got 2.5"),
        ("size", math.inf, "size: expected a whole number, got inf"),
        ("size", None, "size: expected a whole number, got None"),
        ("load", "1e-3", "load: expected a number, got '1e-3'"),
        ("load", math.nan, "load: expected a finite number, got nan"),
        ("load", -math.inf, "load: expected a finite number, got -inf"),
        ("load", 10**400, f"load: expected a number, got {str(10**400)[:200]}..."),
        ("shown", "no", "shown: expected True or False, got 'no'"),
        ("shown", 1, "shown: expected True or False, got 1"),
        ("mode", "c", "mode: expected 'a', 'b' or None, got 'c'"),
        ("sizes", 2, "sizes: expected a mapping, got 2"),
        ("sizes", {"x": "2"}, "sizes.x: expected a whole number, got '2'"),
        ("sizes", {1: 2}, "sizes: expected names of text, got 1"),
        ("span", 5, "span: expected a list or tuple or None, got 5"),
        ("span", [1], "span: expected more values, got [1]"),
        ("span", (1, "2"), "span.1: expected a whole number, got '2'"),
        ("tags", [5], "tags.0: expected text, got 5"),
        ("tags", None, "tags: expected a list or tuple, got None"),
    ],
)
def test_what_python_cannot_give(field, given, said):
    with pytest.raises(ValueError) as caught:
        Gauge(**{field: given})

    assert str(caught.value) == said


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("load=.5", Gauge(load=0.5)),
        ("size=007", Gauge(size=7)),
        ("shown=True", Gauge(shown=True)),
        ("shown=off", Gauge(shown=False)),
    ],
)
def test_words_of_the_command_line(tmp_path, override, expected):
    """There everything is text, which a file or Python would not have for a number."""
    path = tmp_path / "gauge.toml"
    path.write_text("")

    assert read_run(Gauge, path, [override]) == expected
    path.write_text("load = '.5'")
    with pytest.raises(ValueError, match=r"load: expected a number, got '\.5'"):
        read_run(Gauge, path)


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("bore", "did you mean size?"),
        ("tag", "did you mean tags?"),
        ("lod", "did you mean load?"),
        ("zzz", "expected one of size, load, shown, mode, sizes, span, tags"),
    ],
)
def test_the_field_that_is_meant(key, hint):
    with pytest.raises(ValueError) as caught:
        from_fields(Gauge, {key: 1}, where="gauge")

    assert str(caught.value) == f"gauge: {key}: unknown key ({hint})"


def test_brackets_without_end(tmp_path):
    path = tmp_path / "gauge.toml"
    path.write_text(f"size = {'[' * 5000}")

    with pytest.raises(ValueError, match=r"gauge\.toml: expected TOML"):
        read_run(Gauge, path)
    path.write_text("")
    with pytest.raises(ValueError, match=r"tags=\[.*: expected TOML"):
        read_run(Gauge, path, [f"tags={'[' * 5000}"])


def test_a_table_that_may_be_an_object(tmp_path):
    """In a file it is the table, and errors speak of it alone."""
    made = from_fields(Yard, {"carts": [{"name": "a", "tags": "t"}]}, where="yard")

    assert made == Yard(carts=(Cart(name="a", tags=("t",)),))
    for table, expected in (
        ({"name": 3}, "carts.0.name: expected text"),
        (3, "carts.0: expected a"),
    ):
        with pytest.raises(ValueError) as caught:
            from_fields(Yard, {"carts": [table]}, where="yard")
        assert str(caught.value).startswith(f"yard: {expected}")
        assert ";" not in str(caught.value)


def test_dates_become_text_in_a_free_table_and_a_free_field_is_left_alone():
    day = datetime.date(2026, 1, 2)

    cart = from_fields(Cart, {"name": "n", "others": {"a": [{"b": day}]}, "cargo": [day]}, where="")

    assert cart.others == {"a": [{"b": "2026-01-02"}]}
    assert cart.cargo == [day]


def test_a_long_value_is_shown_shortened():
    assert shown([1, {"a": (True, None)}, "b"]) == "[1, {a = [true, none]}, 'b']"
    assert shown(list(range(30))).endswith("18, 19, ...]")
    assert shown([[[[1]]]]) == "[[[[...]]]]"
    assert len(shown(["x" * 300] * 1000)) == 503


def test_a_table_of_the_fields():
    lines = fields_table(Cart).splitlines()

    rows = [tuple(part.strip() for part in line.split("  ") if part) for line in lines]
    assert rows == [
        ("name", "text", "required"),
        ("wheels", "list of tables", "[]"),
        ("wheels.N.size", "whole number", "required"),
        ("wheels.N.colour", "'red' or 'blue'", "'red'"),
        ("wheels.N.load", "number", "1.0"),
        ("spare", "table or none", "none"),
        ("spare.size", "whole number", "required"),
        ("spare.colour", "'red' or 'blue'", "'red'"),
        ("spare.load", "number", "1.0"),
        ("tags", "list of texts", "[]"),
        ("day", "text or none", "none"),
        ("born", "date or none", "none"),
        ("cargo", "whatever it carries", "none"),
        ("limit", "number or none", "2.0"),
        ("span", "list of whole number and whole number or none", "none"),
        ("spokes", "table", "{}"),
        ("others", "table", "{}"),
    ]
    assert len({line.index(f" {row[1]}  ") for line, row in zip(lines, rows, strict=True)}) == 1
    assert in_words(Wheel) == ""
