# SPDX-License-Identifier: Apache-2.0
"""Strict reading of TOML files into dataclasses."""

import dataclasses
from typing import Literal

import pytest

from gptoss_jax.run_file import read_run


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wheel:
    size: int
    colour: Literal["red", "blue"] = "red"

    def __post_init__(self):
        if self.size < 1:
            raise ValueError(f"expected a size of at least 1, got {self.size}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cart:
    name: str
    wheels: tuple[Wheel, ...] = ()
    spare: Wheel | None = None
    tags: tuple[str, ...] = ()


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
        ("name = 'n'", ("name.x=1",), ["expected a table at name"]),
    ],
)  # fmt: skip
def test_everything_wrong_is_in_one_error(tmp_path, text, overrides, expected):
    with pytest.raises(ValueError) as caught:
        read(tmp_path, text, *overrides)

    assert [part for part in expected if part not in str(caught.value)] == []


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match=r"cart\.toml: expected a TOML file"):
        read_run(Cart, tmp_path / "cart.toml")
