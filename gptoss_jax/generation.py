# SPDX-License-Identifier: Apache-2.0
"""Continue token ids with a loaded model: its tokenizer, its sampling defaults, its stop tokens.

Knows no messages: `conversation.py` writes prompts and reads replies. What is not asked for is left
to the checkpoint's generation_config.json, then to OpenAI's advice: temperature and top-p 1.
"""

import functools
import json
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict, Unpack

import jax

from gptoss_jax import distributed
from gptoss_jax.harmony import Tokenizer
from gptoss_jax.inference import decode
from gptoss_jax.inference.sampling import Sampling
from gptoss_jax.model.transformer import Transformer

TOKENS_PER_DISPATCH = 8  # text appears in steps of this many


class SamplingFields(TypedDict, total=False):
    """The fields of `Sampling` beside temperature and seed, which have their own arguments."""

    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float]


def generate(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int | Sequence[int] = 64,
    temperature: float | None = None,
    seed: int | Sequence[int] = 0,
    stop: Sequence[int] | None = None,
    **sampling: Unpack[SamplingFields],
) -> list[list[int]]:
    """Continue lists of ids; returns the new ids of each, a stop token included.

    Stops at the model's stop tokens, or at `stop`; `stop=()` runs on. A row depends on its prompt
    and seed alone, so for several samples of one prompt give several seeds: `seed=range(4)`.
    """
    if prompts and not hasattr(prompts[0], "__len__"):
        raise ValueError(
            "prompts: expected lists of token ids, got a list of ids; write [prompt] for one"
        )
    seeds = [seed] * len(prompts) if isinstance(seed, int) else list(seed)
    if len(seeds) != len(prompts):
        raise ValueError(f"seed: expected one or {len(prompts)}, one per prompt, got {len(seeds)}")
    rows = [sampling_for(model, temperature=temperature, seed=s, **sampling) for s in seeds]
    if stop is None:
        stop = tokenizer_of(model).stop_ids
    completions = decode.generate(
        model, prompts, max_new_tokens=max_new_tokens, sampling=rows, stop=stop
    )
    return [completion.tokens for completion in completions]


def new_seed(model: Transformer) -> int:
    """Draw a seed in [0, 2^32), the same on all processes that share the model."""
    seed = secrets.randbits(32)
    if model.placement is None or jax.process_count() == 1:
        return seed
    return int(distributed.everyones(str(seed), "seed")[0])


def tokenizer_of(model: Transformer) -> Tokenizer:
    """The tokenizer that belongs to a model: declared beside its weights, else by vocabulary."""
    vocab_size = model.config.vocab_size
    tokenizer = tokenizer_in(model.origin) if model.origin else _tokenizer_of_size(vocab_size)
    if tokenizer is None or tokenizer.vocab_size > vocab_size:
        got = f"one of {tokenizer.vocab_size} ids" if tokenizer else "none"
        raise ValueError(
            f"tokenizer: expected one for the model's V={vocab_size}, got {got} from "
            f"{model.origin or 'a model made in memory'}; pass tokenizer= to chat, and stop= to "
            "generate"
        )
    return tokenizer


@functools.lru_cache(maxsize=4)
def tokenizer_in(folder: str) -> Tokenizer:
    """The tokenizer of a checkpoint folder, read once."""
    return Tokenizer.from_folder(folder)


@functools.lru_cache(maxsize=4)
def _tokenizer_of_size(vocab_size: int) -> Tokenizer | None:
    made = {201_088: Tokenizer.published, 1024: Tokenizer.compact}.get(vocab_size)
    return made() if made else None


def sampling_for(
    model: Transformer,
    *,
    temperature: float | None = None,
    seed: int | None = None,
    **fields: Unpack[SamplingFields],
) -> Sampling:
    """What is asked for; the rest as the model's generation_config.json says, then as advised."""
    asked = dict(fields) if temperature is None else {"temperature": temperature, **fields}
    return Sampling(**{**_checkpoint_sampling(model.origin), **asked, "seed": seed or 0})


def _checkpoint_sampling(origin: str | None) -> dict[str, Any]:
    file = Path(origin, "generation_config.json") if origin else None
    if file is None or not file.is_file():
        return {}
    try:
        said = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: expected JSON, got {error}; copy the file again") from None
    if said.get("do_sample") is False:
        return {"temperature": 0.0}
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    return {name: said[name] for name in names if said.get(name) is not None}
