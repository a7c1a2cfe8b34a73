# SPDX-License-Identifier: Apache-2.0
"""THE table: what each array of the model is called on disk, in which shape, and how it gets here.

Three layouts are published. "hf": Hugging Face with `_blocks` and `_scales`. "original": the
`original/` folder, with q, k and v fused. "bf16": Hugging Face with the experts unpacked and
transposed. Every step from disk to model moves bytes and changes none, and has its inverse.
Knows neither files nor modules; checkpoint.py reads with this table, export.py writes with it.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Shaped

from gptoss_jax.config import ModelConfig
from gptoss_jax.mxfp4 import BLOCK

LAYOUTS = ("hf", "original", "bf16")
PACKED_LAYOUTS = ("hf", "original")


# The steps. Each works on any run of rows of the first axis; `shape` is what the result must have.


def regroup(rows: Shaped[np.ndarray, "..."], shape: tuple[int, ...]) -> Shaped[np.ndarray, "..."]:
    """Split or join neighbouring axes, as in [N*H, D] <-> [N, H, D]; its own inverse."""
    return rows.reshape(shape)


def deinterleave(
    rows: Shaped[np.ndarray, "E FF *rest"], shape: tuple[int, ...]
) -> Shaped[np.ndarray, "E 2 F *rest"]:
    """Rows gate 0, up 0, gate 1, up 1, ... -> all gate rows, then all up rows."""
    experts, gate_and_up, hidden, *rest = shape
    return rows.reshape(experts, hidden, gate_and_up, *rest).swapaxes(1, 2)


def interleave(
    rows: Shaped[np.ndarray, "E 2 F *rest"], shape: tuple[int, ...]
) -> Shaped[np.ndarray, "E FF *rest"]:
    """The inverse of `deinterleave`."""
    return rows.swapaxes(1, 2).reshape(shape)


def transpose(
    rows: Shaped[np.ndarray, "E inner outer"], shape: tuple[int, ...]
) -> Shaped[np.ndarray, "E outer inner"]:
    """[E, in, out] <-> [E, out, in]; its own inverse."""
    return rows.swapaxes(1, 2).reshape(shape)


def transpose_deinterleave(
    rows: Shaped[np.ndarray, "E D FF"], shape: tuple[int, ...]
) -> Shaped[np.ndarray, "E 2 F D"]:
    """Columns gate 0, up 0, gate 1, ... -> all gate rows, then all up rows."""
    return deinterleave(rows.swapaxes(1, 2), shape)


def interleave_transpose(
    rows: Shaped[np.ndarray, "E 2 F D"], shape: tuple[int, ...]
) -> Shaped[np.ndarray, "E D FF"]:
    """The inverse of `transpose_deinterleave`."""
    experts, embed, gate_and_up = shape
    return interleave(rows, (experts, gate_and_up, embed)).swapaxes(1, 2)


_INVERSES = {
    regroup: regroup,
    deinterleave: interleave,
    transpose: transpose,
    transpose_deinterleave: interleave_transpose,
}
_COLUMNS = {deinterleave: 2, transpose: 2, transpose_deinterleave: 3}  # see Entry.column_axis


class _Part(NamedTuple):
    """Some rows of a fused tensor: `first` is where they begin, `of` is how many it has."""

    key: str
    first: str
    of: str


class _Row(NamedTuple):
    """One line of the table; shapes are in the letters of shapes.py.

    A layout whose column is None has no such tensor. Unless said otherwise the bf16 layout has what
    the hf layout has.
    """

    name: str  # in the model, below `blocks.<layer>.` for the rows of a block
    shape: str  # in the model
    step: Callable  # from disk to model
    published: str  # the shape on disk
    hf: str | None
    original: str | _Part | None
    bf16: str | None = "as hf"

    def source(self, layout: str) -> str | _Part | None:
        column = getattr(self, layout)
        return self.hf if column == "as hf" else column


# fmt: off
OUTSIDE_BLOCKS = (
    _Row("embed", "V D", regroup, "V D",
         hf="model.embed_tokens.weight", original="embedding.weight"),
    _Row("final_norm.scale", "D", regroup, "D",
         hf="model.norm.weight", original="norm.scale"),
    _Row("unembed", "V D", regroup, "V D",
         hf="lm_head.weight", original="unembedding.weight"),
)

BLOCK_PREFIX = {"hf": "model.layers.{}.", "original": "block.{}.", "bf16": "model.layers.{}."}

IN_BLOCKS = (
    _Row("attn_norm.scale", "D", regroup, "D",
         hf="input_layernorm.weight", original="attn.norm.scale"),
    _Row("attn.q.kernel", "N H D", regroup, "N*H D",
         hf="self_attn.q_proj.weight",
         original=_Part("attn.qkv.weight", first="0", of="N*H+2*K*H")),
    _Row("attn.q.bias", "N H", regroup, "N*H",
         hf="self_attn.q_proj.bias",
         original=_Part("attn.qkv.bias", first="0", of="N*H+2*K*H")),
    _Row("attn.k.kernel", "K H D", regroup, "K*H D",
         hf="self_attn.k_proj.weight",
         original=_Part("attn.qkv.weight", first="N*H", of="N*H+2*K*H")),
    _Row("attn.k.bias", "K H", regroup, "K*H",
         hf="self_attn.k_proj.bias",
         original=_Part("attn.qkv.bias", first="N*H", of="N*H+2*K*H")),
    _Row("attn.v.kernel", "K H D", regroup, "K*H D",
         hf="self_attn.v_proj.weight",
         original=_Part("attn.qkv.weight", first="N*H+K*H", of="N*H+2*K*H")),
    _Row("attn.v.bias", "K H", regroup, "K*H",
         hf="self_attn.v_proj.bias",
         original=_Part("attn.qkv.bias", first="N*H+K*H", of="N*H+2*K*H")),
    _Row("attn.out.kernel", "D N H", regroup, "D N*H",
         hf="self_attn.o_proj.weight", original="attn.out.weight"),
    _Row("attn.out.bias", "D", regroup, "D",
         hf="self_attn.o_proj.bias", original="attn.out.bias"),
    _Row("attn.sinks", "N", regroup, "N",
         hf="self_attn.sinks", original="attn.sinks"),
    _Row("moe_norm.scale", "D", regroup, "D",
         hf="post_attention_layernorm.weight", original="mlp.norm.scale"),
    _Row("moe.router.kernel", "E D", regroup, "E D",
         hf="mlp.router.weight", original="mlp.gate.weight"),
    _Row("moe.router.bias", "E", regroup, "E",
         hf="mlp.router.bias", original="mlp.gate.bias"),
    # On disk gate rows are the even ones, up rows the odd ones.
    _Row("moe.gate_up.kernel.blocks", "E 2 F D/32 16", deinterleave, "E 2*F D/32 16",
         hf="mlp.experts.gate_up_proj_blocks", original="mlp.mlp1_weight.blocks", bf16=None),
    _Row("moe.gate_up.kernel.scales", "E 2 F D/32", deinterleave, "E 2*F D/32",
         hf="mlp.experts.gate_up_proj_scales", original="mlp.mlp1_weight.scales", bf16=None),
    _Row("moe.gate_up.kernel", "E 2 F D", transpose_deinterleave, "E D 2*F",
         hf=None, original=None, bf16="mlp.experts.gate_up_proj"),
    _Row("moe.gate_up.bias", "E 2 F", deinterleave, "E 2*F",
         hf="mlp.experts.gate_up_proj_bias", original="mlp.mlp1_bias"),
    _Row("moe.down.kernel.blocks", "E D F/32 16", regroup, "E D F/32 16",
         hf="mlp.experts.down_proj_blocks", original="mlp.mlp2_weight.blocks", bf16=None),
    _Row("moe.down.kernel.scales", "E D F/32", regroup, "E D F/32",
         hf="mlp.experts.down_proj_scales", original="mlp.mlp2_weight.scales", bf16=None),
    _Row("moe.down.kernel", "E D F", transpose, "E F D",
         hf=None, original=None, bf16="mlp.experts.down_proj"),
    _Row("moe.down.bias", "E D", regroup, "E D",
         hf="mlp.experts.down_proj_bias", original="mlp.mlp2_bias"),
)
# fmt: on


class Published(NamedTuple):
    """One tensor on disk, as it must be."""

    shape: tuple[int, ...]
    spelled: str  # the shape in letters and numbers, for error messages
    is_bytes: bool  # uint8, else bfloat16 (or float32)


class Entry(NamedTuple):
    """One array of the model in one layout: rows of one tensor on disk."""

    name: str
    shape: tuple[int, ...]
    key: str
    published: Published
    first_row: int  # where this array's rows begin in the tensor on disk
    num_rows: int  # how many rows on disk it has
    step: Callable
    column_axis: int | None  # which axis of the model's array is the second on disk

    def rows_on_disk(self, start: int, stop: int) -> tuple[int, int]:
        """The rows on disk that hold rows `start` to `stop` of the model's array."""
        each = self.num_rows // self.shape[0]
        return self.first_row + start * each, self.first_row + stop * each

    def columns_on_disk(self, start: int, stop: int) -> tuple[int, int]:
        """The part of each row on disk that holds `start` to `stop` of the column axis."""
        assert self.column_axis is not None
        each = self.published.shape[1] // self.shape[self.column_axis]
        return start * each, stop * each

    def to_model(self, rows: Shaped[np.ndarray, "..."]) -> Shaped[np.ndarray, "..."]:
        """Rows read from disk, or columns of them, as the model has them (often a view)."""
        shape = [len(rows) * self.shape[0] // self.num_rows, *self.shape[1:]]
        if self.column_axis is not None:
            whole = self.shape[self.column_axis]
            shape[self.column_axis] = rows.shape[1] * whole // self.published.shape[1]
        return self.step(rows, tuple(shape))

    def to_disk(self, rows: Shaped[np.ndarray, "..."]) -> Shaped[np.ndarray, "..."]:
        """Rows of the model's array, as they are on disk: the inverse of `to_model`."""
        count = len(rows) * self.num_rows // self.shape[0]
        return _INVERSES[self.step](rows, (count, *self.published.shape[1:]))


@functools.lru_cache(maxsize=16)
def entries(config: ModelConfig, layout: str) -> tuple[Entry, ...]:
    """Every array of a model of this config in one of LAYOUTS: embed, the blocks, the rest."""
    sizes = axis_sizes(config)
    if layout in PACKED_LAYOUTS:
        _check_blocks(sizes)
    embed, *rest = OUTSIDE_BLOCKS
    found = [_entry(embed, "", "", layout, sizes)]
    for layer in range(config.num_layers):
        prefix = BLOCK_PREFIX[layout].format(layer)
        rows = [row for row in IN_BLOCKS if row.source(layout)]
        found += [_entry(row, f"blocks.{layer}.", prefix, layout, sizes) for row in rows]
    found += [_entry(row, "", "", layout, sizes) for row in rest]
    return tuple(found)


def axis_sizes(config: ModelConfig) -> dict[str, int]:
    """The letters that occur in parameter shapes."""
    return {
        "V": config.vocab_size,
        "D": config.embed_dim,
        "N": config.num_heads,
        "K": config.num_kv_heads,
        "H": config.head_dim,
        "E": config.num_experts,
        "F": config.hidden_dim,
    }


def _entry(row: _Row, ours: str, theirs: str, layout: str, sizes: dict[str, int]) -> Entry:
    source = row.source(layout)
    assert source is not None
    own_rows, *rest = row.published.split()
    part = source if isinstance(source, _Part) else _Part(source, first="0", of=own_rows)
    terms = [part.of, *rest]
    return Entry(
        name=ours + row.name,
        shape=tuple(_size(term, sizes) for term in row.shape.split()),
        key=theirs + part.key,
        published=Published(
            shape=tuple(_size(term, sizes) for term in terms),
            spelled="[" + ", ".join(_spelled(term, sizes) for term in terms) + "]",
            is_bytes=row.name.endswith((".blocks", ".scales")),
        ),
        first_row=_size(part.first, sizes),
        num_rows=_size(own_rows, sizes),
        step=row.step,
        column_axis=_column_axis(row) if rest else None,
    )


def _column_axis(row: _Row) -> int:
    """Axis 1, unless the rows on disk are two axes of the model joined, or axes change places."""
    return _COLUMNS.get(row.step, 1 + row.published.split()[0].count("*"))


def _size(term: str, sizes: dict[str, int]) -> int:
    """The value of a term such as `N*H+2*K*H` or `D/32`."""
    products = [product.split("*") for product in term.split("+")]
    return sum(math.prod(_factor(factor, sizes) for factor in factors) for factors in products)


def _factor(text: str, sizes: dict[str, int]) -> int:
    letter, _, divisor = text.partition("/")
    return (sizes[letter] if letter in sizes else int(letter)) // int(divisor or 1)


def _spelled(term: str, sizes: dict[str, int]) -> str:
    return term if term.isdigit() else f"{term}={_size(term, sizes)}"


def _check_blocks(sizes: dict[str, int]) -> None:
    uneven = [f"{axis}={sizes[axis]}" for axis in "DF" if sizes[axis] % BLOCK]
    if uneven:
        raise ValueError(
            f"config: expected embed_dim D and hidden_dim F in multiples of {BLOCK} for MXFP4 "
            f"experts, got {', '.join(uneven)}; use plain experts (experts='bf16')"
        )
