# SPDX-License-Identifier: Apache-2.0
"""Why the tensors of a checkpoint are not those that are expected: the likely cause, in a sentence.

Compares names, shapes and dtypes only. What is wrong is listed by checkpoint.py; here is what a
tool has probably done to all of them, and what to do about it.
"""

import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping

from gptoss_jax.weights.names import Entry
from gptoss_jax.weights.safetensors_file import Tensor

# What another tool writes: a pattern of names, what it is, what to do. The first that fits is told.
_RESAVE = (
    "load it with the tool that wrote it and save the whole model in BF16, or take the published "
    "checkpoint"
)
_SIGNS = (
    (r"\.lora_[AB]\b|\.base_layer\.", "LoRA that is not merged into its base (lora_A, base_layer)",
     "merge it: in PEFT model.merge_and_unload(), then save_pretrained"),
    (r"\.qweight$|\.qzeros$|\.g_idx$", "GPTQ or AWQ quantization", _RESAVE),
    (r"\.absmax$|\.quant_map$|\.quant_state", "bitsandbytes quantization",
     _RESAVE),
    (r"weight_packed$|weight_scale(_inv)?$|input_scale$", "another quantization, with scales of "
     "its own", _RESAVE),
    (r"experts\.(gate|up|down|gate_up)_projs?\.(scales|biases)$", "MLX's own quantization",
     _RESAVE),
    (r"_projs\.\d+\.", "experts in a list of their own (_projs.0), as Unsloth has them while it "
     "trains", "save it there with save_pretrained_merged"),
    (r"experts\.\d+\.", "experts one by one (experts.0), not joined to one tensor",
     "load it with the tool that wrote it and save it as gpt-oss, whose experts are joined: "
     "mlp.experts.gate_up_proj"),
    (r"experts\.(gate|up)_proj\b", "gate and up in two tensors, where gpt-oss has gate_up_proj "
     "with their columns in turn", "save it as gpt-oss with the tool that wrote it"),
    (r"router\.linear\.", "a router inside another module (router.linear)",
     "rename router.linear.weight and .bias to router.weight and .bias"),
)  # fmt: skip


def likely_cause(
    expected: Mapping[str, Entry],
    tensors: Mapping[str, Tensor],
    others: Mapping[str, Collection[str]],
) -> str:
    """What has probably happened and what to do, or "" if nothing known fits.

    `expected` has the table of the layout by names on disk, `others` the names of other layouts.
    """
    found = next(_causes(expected, tensors, others), None)
    return f"likely cause: {found}" if found else ""


def _causes(
    expected: Mapping[str, Entry],
    tensors: Mapping[str, Tensor],
    others: Mapping[str, Collection[str]],
) -> Iterator[str]:
    unknown = [key for key in tensors if key not in expected]
    missing = [key for key in expected if key not in tensors]
    for pattern, what, advice in _SIGNS:
        if any(re.search(pattern, key) for key in unknown):
            yield f"{what}; {advice}"
    yield from _another_layout(expected, unknown, others)
    yield from _prefix(expected, unknown)
    yield from _layers(expected, unknown, missing)
    yield from _one_dtype(expected, tensors)
    yield from _empty(expected, tensors)


def _another_layout(
    expected: Collection[str], unknown: list[str], others: Mapping[str, Collection[str]]
) -> Iterator[str]:
    for layout, keys in others.items():
        own = set(keys) - set(expected)
        if len(own.intersection(unknown)) > len(own) // 2:
            yield (
                f"these are the names of the {layout!r} layout; put its own config.json beside "
                "them, or take the tensors that belong to this one"
            )


def _prefix(expected: Collection[str], unknown: list[str]) -> Iterator[str]:
    """One prefix too many, such as `base_model.model.`, one inside, or none where one belongs."""
    changes = Counter(filter(None, (_change(key, expected) for key in unknown)))
    if not changes:
        return
    (got, wanted), count = changes.most_common(1)[0]
    if count <= len(unknown) // 2:
        return
    what = f"begin with {got!r}, as of a model inside another one"
    if wanted:
        what = f"have {got!r} where {wanted!r} is expected, as of a model inside another one"
    if not got:
        what = f"lack {wanted!r} at their beginning, as of a model without its head"
    yield (
        f"{count} names {what}; rename the tensors, or save the model as GptOssForCausalLM "
        "(PEFT's merge_and_unload() gives that)"
    )


def _change(key: str, expected: Collection[str]) -> tuple[str, str] | None:
    """Which beginning of a name to replace, by what, to have a name that is expected."""
    parts = key.split(".")
    for length in range(min(len(parts), 5)):
        begin, rest = ("".join(f"{part}." for part in parts[:length]), ".".join(parts[length:]))
        for wanted in ("", "model."):
            if wanted + rest in expected:
                return begin, wanted
    return None


def _layers(expected: Collection[str], unknown: list[str], missing: list[str]) -> Iterator[str]:
    """More or fewer layers in the files than in the config, and nothing else."""
    wrong = unknown or missing
    layers = {found for key in wrong if (found := _layer(key)) is not None}
    if not (unknown and missing) and layers and all(_layer(key) is not None for key in wrong):
        in_config = len({_layer(key) for key in expected} - {None})
        numbers = f"{min(layers)} to {max(layers)}" if len(layers) > 1 else f"{min(layers)}"
        if unknown and min(layers) >= in_config:
            yield (
                f"the files have layer {numbers}, the config has num_hidden_layers={in_config}; "
                "is it the config of this checkpoint?"
            )
        whole = [key for key in expected if _layer(key) in layers]
        if missing and len(missing) == len(whole):
            yield (
                f"the files lack layer {numbers} of num_hidden_layers={in_config}; is it the "
                "config of this checkpoint, and did the download finish?"
            )


def _layer(key: str) -> int | None:
    found = re.match(r"(?:model\.layers|block)\.(\d+)\.", key)
    return int(found[1]) if found else None


def _one_dtype(expected: Mapping[str, Entry], tensors: Mapping[str, Tensor]) -> Iterator[str]:
    there = Counter(
        tensors[key].dtype
        for key, entry in expected.items()
        if key in tensors and not entry.published.is_bytes
    )
    if len(there) == 1 and not there.keys() <= {"BF16", "F32", "F16", "F64"}:
        (dtype,) = there
        yield f"everything is stored in {dtype}; save it in BF16 with the tool that wrote it"


def _empty(expected: Collection[str], tensors: Mapping[str, Tensor]) -> Iterator[str]:
    there = [key for key in expected if key in tensors]
    empty = [key for key in there if not tensors[key].num_bytes]
    if empty and len(empty) > len(there) // 2:
        yield (
            f"{len(empty)} tensors are empty, as where parameters were split over processes when "
            "they were saved; gather them first (DeepSpeed's zero_to_fp32 does)"
        )
