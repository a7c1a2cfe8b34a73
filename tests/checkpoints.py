# SPDX-License-Identifier: Apache-2.0
"""Random checkpoints of any size, in the three layouts that gpt-oss is found in.

One seed is one model: its layouts hold the same numbers, on every machine and NumPy version, since
every tensor is the raw stream of a counter-based generator keyed by its name, turned into values by
exact arithmetic. Memory stays below 300 MB at any size. Knows the published names and shapes by
itself and nothing of `gptoss_jax.weights`, which is tested with it.

    python tests/checkpoints.py --preset 20b --layout hf FOLDER
"""

import argparse
import dataclasses
import functools
import hashlib
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from gptoss_jax.config import ModelConfig, RopeConfig

# A model with the vocabulary of `Tokenizer.compact`, so small that it compiles in seconds.
COMPACT = ModelConfig(
    num_layers=2,
    embed_dim=96,
    num_heads=6,
    num_kv_heads=2,
    head_dim=16,
    num_experts=5,
    experts_per_token=4,
    hidden_dim=64,
    vocab_size=1024,
    sliding_window=8,
    rope=RopeConfig(
        theta=150000.0, scaling_factor=8.0, original_context=64, beta_fast=32.0, beta_slow=1.0
    ),
    norm_eps=1e-5,
    swiglu_alpha=1.702,
    swiglu_limit=7.0,
)
LAYOUTS = ("hf", "original", "bf16")
CHUNK = 1 << 23  # values or bytes made at a time
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
NUM_SCALES = 6  # adjacent scale bytes that a packed tensor uses
# Root mean square of uniform E2M1 codes, times that of 2^-5 .. 2^0, each as likely.
PACKED_RMS = math.sqrt(68.5 / 8) * math.sqrt(sum(4.0**-n for n in range(NUM_SCALES)) / NUM_SCALES)


class Stream:
    """The random bytes that belong to one name, taken in order."""

    def __init__(self, seed: int, name: str):
        digest = hashlib.sha256(f"gptoss {seed} {name}".encode()).digest()
        self.words = np.random.Philox(key=int.from_bytes(digest[:16], "little"))
        self.left = np.zeros(0, np.uint8)

    def take(self, count: int) -> np.ndarray:
        missing = max(0, count - len(self.left))
        words = self.words.random_raw(-(-missing // 8)).astype("<u8", copy=False)
        found = np.concatenate([self.left, words.view(np.uint8)]) if len(self.left) else words
        found = found.view(np.uint8)
        self.left = found[count:].copy()
        return found[:count]


@dataclasses.dataclass(frozen=True)
class Plain:
    """A BF16 tensor whose values are uniform over centre +- reach."""

    key: str
    shape: tuple[int, ...]
    centre: float
    reach: float

    dtype = "BF16"

    def chunks(self, seed: int) -> Iterator[np.ndarray]:
        stream, left = Stream(seed, self.key), math.prod(self.shape)
        table = _uniform_table(self.centre, self.reach)
        while left:
            count = min(left, CHUNK)
            yield table[stream.take(2 * count).view("<u2")]
            left -= count


@functools.lru_cache(maxsize=32)
def _uniform_table(centre: float, reach: float) -> np.ndarray:
    """The BF16 value of every 16-bit integer."""
    steps = (np.arange(1 << 16, dtype=np.float64) - 32767.5) / 32768
    return (centre + reach * steps).astype(np.float32).astype(ml_dtypes.bfloat16)


@dataclasses.dataclass(frozen=True)
class Packed:
    """The MXFP4 bytes of all experts: `shape` is [E, out, in], `rms` that of the values."""

    key: str
    shape: tuple[int, ...]
    rms: float

    @property
    def first_scale(self) -> int:
        return 127 - NUM_SCALES + 1 + round(math.log2(self.rms / PACKED_RMS))

    def experts(self, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Blocks [out, C, 16] and scales [out, C] of one expert after another."""
        num_experts, out, width = self.shape
        blocks, scales = Stream(seed, self.key + " blocks"), Stream(seed, self.key + " scales")
        for _ in range(num_experts):
            codes = blocks.take(out * width // 2).reshape(out, width // 32, 16)
            spread = scales.take(out * width // 32).reshape(out, width // 32) % NUM_SCALES
            yield codes, (spread + self.first_scale).astype(np.uint8)


@dataclasses.dataclass(frozen=True)
class Member:
    """One member of a packed tensor as it is stored: its blocks, its scales, or its values."""

    packed: Packed
    member: str

    @property
    def dtype(self) -> str:
        return "BF16" if self.member == "values" else "U8"

    @property
    def shape(self) -> tuple[int, ...]:
        num_experts, out, width = self.packed.shape
        return {
            "blocks": (num_experts, out, width // 32, 16),
            "scales": (num_experts, out, width // 32),
            "values": (num_experts, width, out),  # transposed, as BF16 exports have it
        }[self.member]

    def chunks(self, seed: int) -> Iterator[np.ndarray]:
        for blocks, scales in self.packed.experts(seed):
            if self.member == "values":
                yield np.ascontiguousarray(decode(blocks, scales).T)
            else:
                yield blocks if self.member == "blocks" else scales


def decode(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """MXFP4 to BF16, exactly: [out, C, 16] and [out, C] to [out, 32 * C]."""
    out, num_blocks = scales.shape
    codes = np.stack([blocks & 15, blocks >> 4], axis=-1).reshape(out, num_blocks, 32)
    values = E2M1[codes]
    np.ldexp(values, scales.astype(np.int32)[..., None] - 127, out=values)
    return values.reshape(out, -1).astype(ml_dtypes.bfloat16)


@dataclasses.dataclass(frozen=True)
class Fused:
    """Tensors stored one after another under one name, joined along their first axis."""

    parts: tuple[Plain, ...]

    dtype = "BF16"

    @property
    def shape(self) -> tuple[int, ...]:
        return (sum(part.shape[0] for part in self.parts), *self.parts[0].shape[1:])

    def chunks(self, seed: int) -> Iterator[np.ndarray]:
        for part in self.parts:
            yield from part.chunks(seed)


def model_tensors(config: ModelConfig) -> dict[str, Plain | Packed]:
    """Every tensor of the model under names of no layout.

    The spread is such that every part of the model matters: attention logits and sinks are of
    order 1, routers are decided, and gates and ups sometimes pass the clamp.
    """
    c = config
    q_width, kv_width = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    tensors: dict[str, Plain | Packed] = {}

    def weights(name: str, rows: int, width: int, gain: float = 1.0):
        tensors[name] = Plain(name, (rows, width), 0.0, gain * math.sqrt(3 / width))

    def vector(name: str, shape: tuple[int, ...], centre: float, reach: float):
        tensors[name] = Plain(name, shape, centre, reach)

    tensors["embed"] = Plain("embed", (c.vocab_size, c.embed_dim), 0.0, math.sqrt(3))
    for layer in range(c.num_layers):
        at = f"layer {layer} "
        vector(at + "attn norm", (c.embed_dim,), 1.0, 0.5)
        for name, rows in [("q", q_width), ("k", kv_width), ("v", kv_width)]:
            weights(at + name, rows, c.embed_dim)
            vector(at + name + " bias", (rows,), 0.0, 0.5)
        vector(at + "sinks", (c.num_heads,), 0.0, 2.0)
        weights(at + "out", c.embed_dim, q_width)
        vector(at + "out bias", (c.embed_dim,), 0.0, 0.25)
        vector(at + "moe norm", (c.embed_dim,), 1.0, 0.5)
        weights(at + "router", c.num_experts, c.embed_dim, gain=2.0)
        vector(at + "router bias", (c.num_experts,), 0.0, 1.0)
        shape = (c.num_experts, 2 * c.hidden_dim, c.embed_dim)
        tensors[at + "gate up"] = Packed(at + "gate up", shape, 2.5 * c.embed_dim**-0.5)
        vector(at + "gate up bias", shape[:2], 0.0, 1.0)
        shape = (c.num_experts, c.embed_dim, c.hidden_dim)
        tensors[at + "down"] = Packed(at + "down", shape, 0.25 * c.hidden_dim**-0.5)
        vector(at + "down bias", shape[:2], 0.0, 0.5)
    vector("final norm", (c.embed_dim,), 1.0, 0.5)
    weights("unembed", c.vocab_size, c.embed_dim)
    return tensors


HF_NAMES = {
    "attn norm": "input_layernorm.weight",
    "q": "self_attn.q_proj.weight",
    "q bias": "self_attn.q_proj.bias",
    "k": "self_attn.k_proj.weight",
    "k bias": "self_attn.k_proj.bias",
    "v": "self_attn.v_proj.weight",
    "v bias": "self_attn.v_proj.bias",
    "sinks": "self_attn.sinks",
    "out": "self_attn.o_proj.weight",
    "out bias": "self_attn.o_proj.bias",
    "moe norm": "post_attention_layernorm.weight",
    "router": "mlp.router.weight",
    "router bias": "mlp.router.bias",
    "gate up": "mlp.experts.gate_up_proj",
    "gate up bias": "mlp.experts.gate_up_proj_bias",
    "down": "mlp.experts.down_proj",
    "down bias": "mlp.experts.down_proj_bias",
}
ORIGINAL_NAMES = {
    "attn norm": "attn.norm.scale",
    "sinks": "attn.sinks",
    "out": "attn.out.weight",
    "out bias": "attn.out.bias",
    "moe norm": "mlp.norm.scale",
    "router": "mlp.gate.weight",
    "router bias": "mlp.gate.bias",
    "gate up": "mlp.mlp1_weight",
    "gate up bias": "mlp.mlp1_bias",
    "down": "mlp.mlp2_weight",
    "down bias": "mlp.mlp2_bias",
}


def stored_tensors(config: ModelConfig, layout: str) -> dict[str, Plain | Member | Fused]:
    """What one layout stores, by its names, in file order."""
    if layout not in LAYOUTS:
        raise ValueError(f"layout: expected one of {', '.join(LAYOUTS)}, got {layout!r}")
    ours = model_tensors(config)
    original = layout == "original"
    stored: dict[str, Plain | Member | Fused] = {}
    stored["embedding.weight" if original else "model.embed_tokens.weight"] = ours["embed"]
    for layer in range(config.num_layers):
        prefix = f"block.{layer}." if original else f"model.layers.{layer}."
        if original:
            for end in ("weight", "bias"):
                names = [p if end == "weight" else p + " bias" for p in "qkv"]
                parts = tuple(ours[f"layer {layer} {name}"] for name in names)
                stored[f"{prefix}attn.qkv.{end}"] = Fused(parts)
        for name, theirs in (ORIGINAL_NAMES if original else HF_NAMES).items():
            tensor = ours[f"layer {layer} {name}"]
            if isinstance(tensor, Plain):
                stored[prefix + theirs] = tensor
            elif layout == "bf16":
                stored[prefix + theirs] = Member(tensor, "values")
            else:
                for member in ("blocks", "scales"):
                    mark = "." if original else "_"
                    stored[prefix + theirs + mark + member] = Member(tensor, member)
    stored["norm.scale" if original else "model.norm.weight"] = ours["final norm"]
    stored["unembedding.weight" if original else "lm_head.weight"] = ours["unembed"]
    return stored


def checkpoint_arrays(config: ModelConfig, *, layout: str, seed: int = 0) -> dict[str, np.ndarray]:
    """The whole checkpoint in memory: for small configs."""
    return {
        name: np.concatenate([part.reshape(-1) for part in tensor.chunks(seed)]).reshape(
            tensor.shape
        )
        for name, tensor in stored_tensors(config, layout).items()
    }


def num_bytes(tensor: Plain | Member | Fused) -> int:
    return math.prod(tensor.shape) * (2 if tensor.dtype == "BF16" else 1)


def write_checkpoint(
    config: ModelConfig,
    folder: str | Path,
    *,
    layout: str = "hf",
    seed: int = 0,
    max_shard_bytes: int | None = None,
    misleading_names: bool = False,
) -> Path:
    """Write `config.json` and its companions and the tensors, and return the folder.

    Without `max_shard_bytes` there is one file and no index. `misleading_names` numbers the shards
    as the published files are, where "00002-of-00002" is the last of three.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = stored_tensors(config, layout)
    for name, fields in _json_files(config, layout).items():
        (folder / name).write_text(json.dumps(fields, indent=2) + "\n")
    shards = _split(tensors, max_shard_bytes)
    names = _shard_names(len(shards), layout, misleading_names)
    if max_shard_bytes is None:
        names = ["model.safetensors"]
    for name, keys in zip(names, shards, strict=True):
        _write_safetensors(folder / name, {key: tensors[key] for key in keys}, seed)
    if max_shard_bytes is not None:
        index = {
            "metadata": {"total_size": sum(map(num_bytes, tensors.values()))},
            "weight_map": {
                key: name for name, keys in zip(names, shards, strict=True) for key in keys
            },
        }
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return folder


def _split(tensors, max_shard_bytes: int | None) -> list[list[str]]:
    """Names in order, a new shard whenever the next tensor does not fit."""
    shards: list[list[str]] = [[]]
    room = limit = math.inf if max_shard_bytes is None else max_shard_bytes
    for name, tensor in tensors.items():
        if shards[-1] and num_bytes(tensor) > room:
            shards.append([])
            room = limit
        shards[-1].append(name)
        room -= num_bytes(tensor)
    return shards


def _shard_names(count: int, layout: str, misleading: bool) -> list[str]:
    dash = "--" if layout == "original" else "-"
    first, last = (0, count - 1) if misleading else (1, count)
    return [f"model{dash}{first + n:05d}-of-{last:05d}.safetensors" for n in range(count)]


def _write_safetensors(path: Path, tensors, seed: int) -> None:
    header: dict = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + num_bytes(tensor)
        header[name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            for chunk in tensor.chunks(seed):
                file.write(np.ascontiguousarray(chunk).view(np.uint8).data)


def _json_files(config: ModelConfig, layout: str) -> dict[str, dict]:
    if layout == "original":
        kinds = {"blocks": "FP4", "scales": "UE8"}
        dtypes = {
            name: kinds[tensor.member] if isinstance(tensor, Member) else tensor.dtype
            for name, tensor in stored_tensors(config, layout).items()
        }
        return {"config.json": original_config(config), "dtypes.json": dtypes}
    generation = {
        "bos_token_id": special_ids(config)["bos"],
        "do_sample": True,
        "eos_token_id": [special_ids(config)[name] for name in ("return", "pad", "call")],
        "pad_token_id": special_ids(config)["pad"],
        "transformers_version": "4.55.0.dev0",
    }
    fields = hf_config(config, packed=layout == "hf")
    return {"config.json": fields, "generation_config.json": generation}


def special_ids(config: ModelConfig) -> dict[str, int]:
    """The ids of the published files, moved to the end of a vocabulary that is too small."""
    ids = {"bos": 199998, "pad": 199999, "return": 200002, "call": 200012}
    if config.vocab_size <= max(ids.values()):
        ids = {name: config.vocab_size - 1 - n for n, name in enumerate(ids)}
    return ids


def hf_config(config: ModelConfig, *, packed: bool) -> dict:
    """The keys of the published `config.json`, in its spelling."""
    c = config
    fields = {
        "architectures": ["GptOssForCausalLM"],
        "attention_bias": True,
        "attention_dropout": 0.0,
        "eos_token_id": special_ids(c)["return"],
        "experts_per_token": c.experts_per_token,
        "head_dim": c.head_dim,
        "hidden_act": "silu",
        "hidden_size": c.embed_dim,
        "initial_context_length": c.rope.original_context,
        "initializer_range": 0.02,
        "intermediate_size": c.hidden_dim,
        "layer_types": [
            "full_attention" if layer % 2 else "sliding_attention" for layer in range(c.num_layers)
        ],
        "max_position_embeddings": round(c.rope.original_context * c.rope.scaling_factor),
        "model_type": "gpt_oss",
        "num_attention_heads": c.num_heads,
        "num_experts_per_tok": c.experts_per_token,
        "num_hidden_layers": c.num_layers,
        "num_key_value_heads": c.num_kv_heads,
        "num_local_experts": c.num_experts,
        "output_router_logits": False,
        "pad_token_id": special_ids(c)["pad"],
        "rms_norm_eps": c.norm_eps,
        "rope_scaling": {
            "beta_fast": c.rope.beta_fast,
            "beta_slow": c.rope.beta_slow,
            "factor": c.rope.scaling_factor,
            "original_max_position_embeddings": c.rope.original_context,
            "rope_type": "yarn",
            "truncate": False,
        },
        "rope_theta": c.rope.theta,
        "router_aux_loss_coef": 0.9,
        "sliding_window": c.sliding_window,
        "swiglu_limit": c.swiglu_limit,
        "tie_word_embeddings": False,
        "transformers_version": "4.55.0.dev0",
        "use_cache": True,
        "vocab_size": c.vocab_size,
    }
    if c.swiglu_alpha != 1.702:  # the published file leaves it out
        fields["swiglu_alpha"] = c.swiglu_alpha
    if packed:
        fields["quantization_config"] = {
            "modules_to_not_convert": [
                "model.layers.*.self_attn",
                "model.layers.*.mlp.router",
                "model.embed_tokens",
                "lm_head",
            ],
            "quant_method": "mxfp4",
        }
    return fields


def original_config(config: ModelConfig) -> dict:
    """The keys of the published `original/config.json`."""
    c = config
    if (c.norm_eps, c.swiglu_alpha) != (1e-5, 1.702):
        raise ValueError("config: the original layout cannot say another norm_eps or swiglu_alpha")
    return {
        "num_hidden_layers": c.num_layers,
        "num_experts": c.num_experts,
        "experts_per_token": c.experts_per_token,
        "vocab_size": c.vocab_size,
        "hidden_size": c.embed_dim,
        "intermediate_size": c.hidden_dim,
        "swiglu_limit": c.swiglu_limit,
        "head_dim": c.head_dim,
        "num_attention_heads": c.num_heads,
        "num_key_value_heads": c.num_kv_heads,
        "sliding_window": c.sliding_window,
        "initial_context_length": c.rope.original_context,
        "rope_theta": c.rope.theta,
        "rope_scaling_factor": c.rope.scaling_factor,
        "rope_ntk_alpha": c.rope.beta_slow,
        "rope_ntk_beta": c.rope.beta_fast,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a random gpt-oss checkpoint.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--preset", default="20b", help="20b or 120b")
    parser.add_argument("--layout", default="hf", choices=LAYOUTS)
    parser.add_argument("--layers", type=int, help="fewer layers than the preset has")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-shard-bytes", type=int)
    parser.add_argument("--misleading-names", action="store_true")
    args = parser.parse_args()
    config = ModelConfig.preset(args.preset)
    if args.layers:
        config = dataclasses.replace(config, num_layers=args.layers)
    write_checkpoint(
        config,
        args.folder,
        layout=args.layout,
        seed=args.seed,
        max_shard_bytes=args.max_shard_bytes,
        misleading_names=args.misleading_names,
    )
    tensors = stored_tensors(config, args.layout)
    total = sum(map(num_bytes, tensors.values()))
    print(f"{args.folder}: {len(tensors)} tensors, {total:,} bytes of tensors")


if __name__ == "__main__":
    main()
