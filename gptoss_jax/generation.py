# SPDX-License-Identifier: Apache-2.0
"""Continue token ids with a loaded model: its tokenizer, its sampling defaults, its stop tokens.

Knows no messages: `conversation.py` writes prompts and reads replies. What is not asked for is left
to the checkpoint's generation_config.json, then to OpenAI's advice: temperature and top-p 1.
"""

import dataclasses
import difflib
import functools
import json
import secrets
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict, Unpack

import jax

from gptoss_jax import distributed
from gptoss_jax.generation_config import GenerationConfig, read_generation_config
from gptoss_jax.harmony import Tokenizer
from gptoss_jax.harmony.tokenizer import TOKENIZER_FILE, published_rows
from gptoss_jax.inference import decode
from gptoss_jax.inference.arguments import Integers, Prompts, one_each, prompt_list
from gptoss_jax.inference.sampling import Sampling
from gptoss_jax.model.inputs import described
from gptoss_jax.model.transformer import Transformer

TOKENS_PER_DISPATCH = 8  # text appears in steps of this many
NEW_TOKENS = 64  # that `generate` adds unless told otherwise


class SamplingFields(TypedDict, total=False):
    """The fields of `Sampling` beside temperature and seed, which have their own arguments.

    None is as if it were not given.
    """

    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    logit_bias: Mapping[int, float] | None


# What `generate` and `chat` both take.
SHARED_NAMES = ("temperature", "seed", "max_new_tokens", *SamplingFields.__annotations__)
# What other libraries call these, or what to do instead.
_ELSEWHERE = {
    **dict.fromkeys(
        ("max_tokens", "max_completion_tokens", "max_output_tokens", "max_length", "num_predict"),
        "max_new_tokens",
    ),
    **dict.fromkeys(("stop_token_ids", "stop_ids", "eos_token_id"), "stop"),
    **dict.fromkeys(("system", "system_prompt", "developer"), "instructions"),
    **{"effort": "reasoning_effort", "functions": "tools"},
    **{"repeat_penalty": "repetition_penalty", "do_sample": "temperature"},
}
_INSTEAD = {
    "stop": "a reply ends at the model's stop tokens; generate takes it",
    **dict.fromkeys(
        ("reasoning_effort", "instructions", "tools", "builtin_tools", "date"), "chat takes it"
    ),
    **dict.fromkeys(
        ("n", "num_return_sequences", "best_of"),
        "give a prompt as often as it is to be continued, or ask again",
    ),
    **dict.fromkeys(
        ("sampling", "sampling_params", "generation_config"), "give the settings as arguments"
    ),
}


def generate(
    model: Transformer,
    prompts: str | Prompts | Sequence[str],
    *,
    max_new_tokens: Integers | None = None,
    temperature: float | None = None,
    seed: Integers | None = None,
    stop: Integers | None = None,
    **sampling: Unpack[SamplingFields],
) -> list[list[int]]:
    """Continue prompts; returns the new ids of each, a stop token included.

    A prompt is a list or an array of token ids, or a text, which the model's tokenizer encodes; an
    array of two axes has a prompt in each row. Stops at the model's stop tokens, or at `stop`;
    `stop=()` runs on. `max_new_tokens` is one number or one per prompt; None is 64.
    A row depends, up to rounding, on its prompt and seed alone. Without `seed` each row draws one
    of its own; give one, or one per prompt, to get the same ids again.
    Raises ValueError for what is out of range, and NotFiniteError as `chat` does.
    """
    check_model(model)
    check_names(sampling, (*SHARED_NAMES, "stop"))
    rows = prompt_list([prompts] if isinstance(prompts, str) else prompts)
    rows = [_encoded(model, row) for row in rows]
    how = sampling_for(model, temperature=temperature, **sampling)
    ends = stop_ids_of(model) if stop is None else stop
    seeds = new_seeds(model, len(rows)) if seed is None else one_each("seed", seed, len(rows))
    completions = decode.generate(
        model,
        rows,
        max_new_tokens=NEW_TOKENS if max_new_tokens is None else max_new_tokens,
        sampling=[dataclasses.replace(how, seed=number) for number in seeds],
        stop=ends,
    )
    return [completion.tokens for completion in completions]


def _encoded(model: Transformer, prompt: Any) -> Any:
    """The ids of a prompt that is text; every other as it is."""
    return tokenizer_of(model).encode(prompt) if isinstance(prompt, str) else prompt


def check_model(model: Any) -> None:
    """Raise ValueError for what is no model, a path or a name above all."""
    if not isinstance(model, Transformer):
        raise ValueError(
            f"model: expected a Transformer, got {described(model)}; gptoss_jax.load(FOLDER) makes "
            "one"
        )


def check_names(
    given: Iterable[str], known: Collection[str], *, near: Collection[str] | None = None
) -> None:
    """Raise TypeError for arguments that are not known, each with the nearest, known or `near`."""
    unknown = [name for name in given if name not in known]
    if unknown:
        hints = [f"{name}: no such argument ({_hint(name, near or known)})" for name in unknown]
        raise TypeError("; ".join(hints))


def _hint(name: str, known: Collection[str]) -> str:
    name = _ELSEWHERE.get(name, name)
    if name in _INSTEAD and name not in known:
        return _INSTEAD[name]
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]}?" if near else f"expected one of {', '.join(known)}"


def new_seed(model: Transformer) -> int:
    """Draw a seed in [0, 2^32), the same on all processes that share the model."""
    return new_seeds(model, 1)[0]


def new_seeds(model: Transformer, count: int) -> list[int]:
    """Draw several, all in one exchange between the processes."""
    seeds = [secrets.randbits(32) for _ in range(count)]
    if model.placement is None or jax.process_count() == 1:
        return seeds
    return json.loads(distributed.everyones(json.dumps(seeds), "seed")[0])


def tokenizer_of(model: Transformer) -> Tokenizer:
    """The tokenizer that belongs to a model: declared beside its weights, else by vocabulary."""
    check_model(model)
    tokenizer = _candidate(model)
    if not _fits(tokenizer, model):
        raise ValueError(
            f"tokenizer: expected one for the model's V={model.config.vocab_size}, got "
            f"{_what_there_is(tokenizer, model.origin)}; pass tokenizer= to chat, and to generate "
            "token ids and stop="
        )
    assert tokenizer is not None
    return tokenizer


def _what_there_is(tokenizer: Tokenizer | None, origin: str | None) -> str:
    """Of a tokenizer that does not fit, where it is from."""
    if tokenizer is None:
        return "none from a model made in memory"
    if tokenizer.is_published:
        return f"the published one of {tokenizer.vocab_size} ids, as {origin} declares none"
    return f"one of {tokenizer.vocab_size} ids, which {origin} declares"


def _candidate(model: Transformer) -> Tokenizer | None:
    """The tokenizer of the model's folder; the published one with as many rows as the model has."""
    vocab_size = model.config.vocab_size
    if model.origin is None:
        return Tokenizer.compact() if vocab_size == 1024 else published_rows(vocab_size)
    return tokenizer_in(model.origin).trimmed_to(vocab_size)


def _fits(tokenizer: Tokenizer | None, model: Transformer) -> bool:
    return tokenizer is not None and tokenizer.vocab_size <= model.config.vocab_size


def tokenizer_in(folder: str) -> Tokenizer:
    """The tokenizer of a checkpoint folder, read once and again when its declaration changes."""
    file = Path(folder, TOKENIZER_FILE)
    return _tokenizer_in(folder, file.stat().st_mtime_ns if file.exists() else None)


@functools.lru_cache(maxsize=4)
def _tokenizer_in(folder: str, changed: int | None) -> Tokenizer:
    return Tokenizer.from_folder(folder)


def stop_ids_of(model: Transformer, tokenizer: Tokenizer | None = None) -> tuple[int, ...]:
    """The ids that end a reply: those of the tokenizer, and eos_token_id of generation_config.json.

    Without a `tokenizer` the model's own is taken; where none fits, the file alone decides.
    Raises ValueError if it says nothing either.
    """
    check_model(model)
    said = _checkpoint_says(model).stop
    if tokenizer is None and said and not _fits(_candidate(model), model):
        return said
    tokenizer = tokenizer or tokenizer_of(model)
    return tuple(dict.fromkeys((*tokenizer.stop_ids, *said)))


def sampling_for(
    model: Transformer,
    *,
    temperature: float | None = None,
    seed: int | None = None,
    **fields: Unpack[SamplingFields],
) -> Sampling:
    """What is asked for; the rest as the model's generation_config.json says, then as advised.

    Raises TypeError for a field that there is not, with the argument of `chat` and `generate` that
    is nearest.
    """
    check_model(model)
    check_names(fields, SamplingFields.__annotations__, near=SHARED_NAMES)
    given: dict[str, Any] = {"temperature": temperature, "seed": seed, **fields}
    asked = {name: value for name, value in given.items() if value is not None}
    return Sampling(**{**_checkpoint_says(model).sampling, **asked})


def _checkpoint_says(model: Transformer) -> GenerationConfig:
    return read_generation_config(model.origin, model.config.vocab_size)
