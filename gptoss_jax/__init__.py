# SPDX-License-Identifier: Apache-2.0
"""OpenAI's gpt-oss in JAX: load it, talk to it, look inside.

Importing this does nothing; each public name is fetched at first use. Read model/transformer.py
first.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from jax.sharding import Mesh

    from gptoss_jax.config import ModelConfig
    from gptoss_jax.conversation import (
        Conversation,
        Reply,
        chat,
        stream_chat,
    )
    from gptoss_jax.device import use_kernels
    from gptoss_jax.finetuning.options import FinetuneRun
    from gptoss_jax.finetuning.run import finetune
    from gptoss_jax.generation import generate, tokenizer_of
    from gptoss_jax.harmony import FunctionTool, Message, Tokenizer, ToolNamespace
    from gptoss_jax.inference.finite import NotFiniteError
    from gptoss_jax.inference.sampling import Sampling
    from gptoss_jax.model.placed import place
    from gptoss_jax.model.transformer import Transformer
    from gptoss_jax.mxfp4 import Mxfp4
    from gptoss_jax.sharding import Placement, make_mesh
    from gptoss_jax.training.hooks import Hook
    from gptoss_jax.weights.describe import describe
    from gptoss_jax.weights.export import export
    from gptoss_jax.weights.fingerprint import fingerprint

__version__ = "0.1.0"

__all__ = [
    # weights
    "load",
    "export",
    "describe",
    "fingerprint",
    # text
    "chat",
    "stream_chat",
    "Conversation",
    "Reply",
    "Message",
    "FunctionTool",
    "ToolNamespace",
    # tokens
    "generate",
    "Sampling",
    "Tokenizer",
    "tokenizer_of",
    "NotFiniteError",
    # fine-tuning
    "finetune",
    "FinetuneRun",
    "Hook",
    # the model
    "ModelConfig",
    "Transformer",
    "Mxfp4",
    # devices
    "make_mesh",
    "place",
    "use_kernels",
    "__version__",
]

_HOMES = {
    "ModelConfig": "config",
    "Conversation": "conversation",
    "Reply": "conversation",
    "chat": "conversation",
    "stream_chat": "conversation",
    "use_kernels": "device",
    "FinetuneRun": "finetuning.options",
    "finetune": "finetuning.run",
    "generate": "generation",
    "tokenizer_of": "generation",
    "FunctionTool": "harmony",
    "Message": "harmony",
    "Tokenizer": "harmony",
    "ToolNamespace": "harmony",
    "NotFiniteError": "inference.finite",
    "Sampling": "inference.sampling",
    "place": "model.placed",
    "Transformer": "model.transformer",
    "Mxfp4": "mxfp4",
    "make_mesh": "sharding",
    "Hook": "training.hooks",
    "describe": "weights.describe",
    "export": "weights.export",
    "fingerprint": "weights.fingerprint",
}


def load(
    path: "str | Path | None" = None,
    *,
    experts: str | None = None,
    dtype: Any = None,
    mesh: "Mesh | Placement | None" = None,
    rules: "Mapping[str, Sequence[str]] | None" = None,
    adapter: "str | Path | None" = None,
    any_base: bool = False,
    progress: bool | None = None,
) -> "Transformer":
    """The model in a checkpoint folder of any layout; without a path the bundled tiny one.

    `path` may be a name such as "openai/gpt-oss-20b" that is in the Hugging Face cache: nothing is
    downloaded. `experts` None holds experts as the checkpoint does; "packed" keeps the published
    MXFP4 bytes, "bf16" unpacks them. `dtype`, "bfloat16" or "float32", is that of all the rest;
    None is bfloat16 on accelerators and float32 on CPU. `mesh`, as from `make_mesh`, splits the
    model over devices, straight from the files: each process reads what its own devices hold.
    `rules` override lines of `sharding.RULES`. `adapter` is a folder that fine-tuning has written,
    refused if it was trained on other weights, unless `any_base`. `progress` None shows a bar on a
    terminal if it takes long. Raises ValueError that says what is wrong. Compiled programs are
    kept from here on: see inference/compilation.py.
    """
    from gptoss_jax.inference.compilation import enable_compilation_cache
    from gptoss_jax.weights.load import load as load_checkpoint

    enable_compilation_cache()
    return load_checkpoint(
        path,
        experts=experts,
        dtype=dtype,
        mesh=mesh,
        rules=rules,
        adapter=adapter,
        any_base=any_base,
        progress=progress,
    )


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
