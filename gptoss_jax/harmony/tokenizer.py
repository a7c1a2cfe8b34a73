# SPDX-License-Identifier: Apache-2.0
"""Text to token ids and back: the published vocabulary, and the compact one of the tiny model.

A checkpoint counts its rows in model ids; the Harmony library counts in published (library) ids.
This file owns the mapping between the two, everything else sees model ids only. It knows no
messages: `render.py` writes conversations, `parser.py` reads them, `vocabulary.py` finds the bytes.
"""

import functools
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from operator import index
from pathlib import Path
from typing import Any, Literal, SupportsIndex

from gptoss_jax.harmony.library import library_encoding
from gptoss_jax.harmony.vocabulary import NUM_RANKS, load_vocabulary

TOKENIZER_FILE = "gptoss_jax_tokenizer.json"
PUBLISHED_VOCAB_SIZE = 201_088
REPLACEMENT = "\ufffd"

# The ten special tokens in use and their published ids; the other ids up to 201087 are reserved.
HARMONY_SPECIALS = {
    "<|startoftext|>": 199_998,
    "<|endoftext|>": 199_999,
    "<|return|>": 200_002,
    "<|constrain|>": 200_003,
    "<|channel|>": 200_005,
    "<|start|>": 200_006,
    "<|end|>": 200_007,
    "<|message|>": 200_008,
    "<|call|>": 200_012,
    "<|endofprompt|>": 200_018,
}
FEWEST_PUBLISHED = max(HARMONY_SPECIALS.values()) + 1  # rows that a trimmed vocabulary keeps
STOP_TOKENS = ("<|return|>", "<|call|>", "<|endoftext|>")  # <|end|> ends a message, not the turn

# How o200k splits text into pieces before any merge; part of the format, so kept to the letter.
_SUFFIX = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_SPLIT_PATTERN = "|".join(
    [
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_SUFFIX}",
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_SUFFIX}",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)
MAX_WHITESPACE = 65_536  # characters: a longer run in one piece could be too much for tiktoken
_SPECIAL_TEXT = re.compile(r"<\|[a-z0-9_]+\|>")


class Tokenizer:
    """Text <-> model ids.

    Ids 0..num_ranks-1 are the first ranks of o200k_base, `specials` maps the text of every special
    token to its id, and rows without either are unused padding up to `vocab_size`.
    """

    def __init__(self, ordinary: list[bytes], specials: Mapping[str, int], vocab_size: int):
        import tiktoken

        self.num_ranks = len(ordinary)
        self.specials = dict(specials)
        self.vocab_size = vocab_size
        self.stop_ids = tuple(self.specials[text] for text in STOP_TOKENS)
        self._special_text = {token: text for text, token in self.specials.items()}
        self._rows = ordinary + [REPLACEMENT.encode()] * (vocab_size - len(ordinary))
        for token, text in self._special_text.items():
            self._rows[token] = text.encode()
        self._encoding = tiktoken.Encoding(
            f"o200k_prefix_{self.num_ranks}",
            pat_str=_SPLIT_PATTERN,
            mergeable_ranks={token: rank for rank, token in enumerate(ordinary)},
            special_tokens=self.specials,
        )

    @classmethod
    def published(
        cls,
        *,
        vocab_size: int = PUBLISHED_VOCAB_SIZE,
        vocabulary: str | Path | None = None,
    ) -> "Tokenizer":
        """The tokenizer of the published checkpoints: model ids are library ids.

        A smaller `vocab_size` leaves out the last reserved ids, which a model may have trimmed.
        `vocabulary` is the path of o200k_base.tiktoken, where it is not to be looked for.
        """
        if not FEWEST_PUBLISHED <= vocab_size <= PUBLISHED_VOCAB_SIZE:
            raise ValueError(
                f"vocab_size: expected {FEWEST_PUBLISHED} (all ids in use) to "
                f"{PUBLISHED_VOCAB_SIZE}, got {vocab_size}; take a compact tokenizer"
            )
        specials = {f"<|reserved_{token}|>": token for token in range(NUM_RANKS, vocab_size)}
        for text, token in HARMONY_SPECIALS.items():
            del specials[f"<|reserved_{token}|>"]
            specials[text] = token
        return cls(load_vocabulary(path=vocabulary), specials, vocab_size)

    @classmethod
    def compact(
        cls,
        num_ranks: int = 1014,
        vocab_size: int = 1024,
        *,
        vocabulary: str | Path | None = None,
    ) -> "Tokenizer":
        """The first `num_ranks` ranks, then the ten special tokens, then padding."""
        specials = {text: num_ranks + i for i, text in enumerate(HARMONY_SPECIALS)}
        _check_compact(num_ranks, specials, vocab_size)
        return cls(load_vocabulary(num_ranks, path=vocabulary), specials, vocab_size)

    @classmethod
    def from_folder(
        cls, folder: str | Path, *, vocabulary: str | Path | None = None
    ) -> "Tokenizer":
        """The tokenizer declared by gptoss_jax_tokenizer.json, else the published one."""
        folder = Path(folder)
        if not folder.is_dir():
            raise ValueError(
                f"folder: expected the folder of a checkpoint, got {str(folder)!r}; check the path"
            )
        file = folder / TOKENIZER_FILE
        if not file.exists():
            return cls.published(vocabulary=vocabulary)
        num_ranks, specials, vocab_size = _read_declaration(file)
        return cls(load_vocabulary(num_ranks, path=vocabulary), specials, vocab_size)

    def save(self, folder: str | Path) -> None:
        """Write the declaration that `from_folder` reads; the published one is declared by none."""
        file = Path(folder) / TOKENIZER_FILE
        if self.is_published:
            if file.exists():
                raise ValueError(
                    f"folder: expected none of {TOKENIZER_FILE} beside the published vocabulary, "
                    f"got {str(file)!r}; delete it or save elsewhere"
                )
            return
        declaration = {
            "format": "o200k_prefix",
            "num_ranks": self.num_ranks,
            "specials": self.specials,
            "vocab_size": self.vocab_size,
        }
        file.write_text(json.dumps(declaration, indent=2) + "\n", encoding="utf-8")

    def trimmed_to(self, vocab_size: int) -> "Tokenizer":
        """The published tokenizer without the last reserved ids, for a model that has trimmed
        them; every other, and one that would lose ids in use, is itself."""
        trims = self.is_published and vocab_size < self.vocab_size
        return (published_rows(vocab_size) if trims else None) or self

    @property
    def is_published(self) -> bool:
        """Whether model ids are library ids."""
        return self.num_ranks == NUM_RANKS

    def encode(
        self, text: str, *, specials: Literal["reject", "text", "ids"] = "reject"
    ) -> list[int]:
        """The ids of `text`.

        Text that spells a special token is refused, encoded as ordinary text ("text"), or turned
        into the special token ("ids", for prompts written by hand). Lone surrogates become U+FFFD.
        """
        if not isinstance(text, str):
            raise ValueError(f"text: expected text, got {text!r}; decode makes text of ids")
        if specials == "text":
            return self._ordinary(text)
        if specials == "ids":
            pieces = _digestible(text)
            return [i for p in pieces for i in self._encoding.encode(p, allowed_special="all")]
        if specials != "reject":
            raise ValueError(
                f'specials: expected "reject", "text" or "ids", got {specials!r}; choose one'
            )
        for place, special in self.spelled_specials(text):
            raise ValueError(
                f"text: expected no special token, got {special!r} at character {place}; pass "
                'specials="text" to encode it as ordinary text or specials="ids" to mean the token'
            )
        return self._ordinary(text)

    def _ordinary(self, text: str) -> list[int]:
        if len(text) <= MAX_WHITESPACE:
            return self._encoding.encode_ordinary(text)
        return [i for piece in _digestible(text) for i in self._encoding.encode_ordinary(piece)]

    def spelled_specials(self, text: str) -> Iterator[tuple[int, str]]:
        """Where `text` spells a special token, and which."""
        for match in _SPECIAL_TEXT.finditer(text):
            if match.group() in self.specials:
                yield match.start(), match.group()

    def decode(self, ids: Iterable[SupportsIndex]) -> str:
        """The text of any ids, never an error; what is no text becomes U+FFFD."""
        if isinstance(ids, str | bytes) or not isinstance(ids, Iterable):
            raise ValueError(f"ids: expected a list of token ids, got {ids!r}; write [id] for one")
        rows, outside = self._rows, REPLACEMENT.encode()
        pieces = [rows[i] if 0 <= i < len(rows) else outside for i in map(index, ids)]
        return b"".join(pieces).decode("utf-8", errors="replace")

    def token_bytes(self, token: int) -> bytes:
        """The bytes of one id, perhaps a part of a character; special tokens are spelled out."""
        return self._rows[token] if 0 <= token < self.vocab_size else REPLACEMENT.encode()

    def token_text(self, token: int) -> str:
        """The text of one id by itself."""
        return self.decode([token])

    def special_text(self, token: int) -> str | None:
        """The text of a special token, None for every other id."""
        return self._special_text.get(token)

    def from_library(self, ids: Iterable[SupportsIndex]) -> list[int]:
        """Model ids for the published ids that the Harmony library makes.

        Special tokens are mapped one by one; each run of ordinary ids between them is turned into
        bytes and encoded again, so a shorter list of ranks gives other splits of the same text.
        """
        library_ids = list(map(index, ids))
        if self.is_published:
            return library_ids
        model_ids: list[int] = []
        run: list[int] = []
        for token in library_ids:
            if token < NUM_RANKS:
                run.append(token)
                continue
            model_ids += self._encode_run(run)
            model_ids.append(self._from_library_special(token))
            run = []
        return model_ids + self._encode_run(run)

    def _encode_run(self, run: list[int]) -> list[int]:
        if not run:
            return []
        text = library_encoding().decode(run, errors="surrogateescape")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:  # a cut character: fall back to one id a byte, losing nothing
            byte_ids = {token: rank for rank, token in enumerate(self._rows[:256])}
            return [byte_ids[bytes([byte])] for byte in text.encode("utf-8", "surrogateescape")]
        return self._ordinary(text)

    def _from_library_special(self, token: int) -> int:
        text = _HARMONY_SPECIAL_TEXT.get(token, f"<|reserved_{token}|>")
        if text not in self.specials:
            raise ValueError(
                f"ids: expected the special tokens of this vocabulary, got {text} ({token}); "
                f"it has {', '.join(self.specials)}"
            )
        return self.specials[text]


@functools.lru_cache(maxsize=4)
def published_rows(vocab_size: int) -> Tokenizer | None:
    """The published tokenizer for so many rows; None if they are too few or too many."""
    if FEWEST_PUBLISHED <= vocab_size <= PUBLISHED_VOCAB_SIZE:
        return Tokenizer.published(vocab_size=vocab_size)
    return None


def _digestible(text: str) -> Iterator[str]:
    """The text in pieces, none of which has a run of white space that is longer than tiktoken 0.14
    takes, with an order of magnitude to spare. Ids differ from those of the whole at most where
    such a run was cut."""
    start = 0
    for run in re.finditer(r"\s+", text) if len(text) > MAX_WHITESPACE else ():
        for cut in range(run.start() + MAX_WHITESPACE, run.end(), MAX_WHITESPACE):
            yield text[start:cut]
            start = cut
    yield text[start:]


_HARMONY_SPECIAL_TEXT = {token: text for text, token in HARMONY_SPECIALS.items()}


def _read_declaration(file: Path) -> tuple[int, dict[str, int], int]:
    try:
        declared = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: expected JSON, got {error}; copy the file again") from error
    expected = {"format", "num_ranks", "specials", "vocab_size"}
    got = set(declared) if isinstance(declared, dict) else {type(declared).__name__}
    if got != expected:
        raise ValueError(
            f"{file}: expected the keys {sorted(expected)}, got {sorted(got)}; is the file of a "
            "newer version?"
        )
    if declared["format"] != "o200k_prefix":
        raise ValueError(
            f"{file}: format: expected 'o200k_prefix', got {declared['format']!r}; is the file of "
            "a newer version?"
        )
    num_ranks, specials, vocab_size = (
        declared["num_ranks"],
        declared["specials"],
        declared["vocab_size"],
    )
    try:
        _check_compact(num_ranks, specials, vocab_size)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    return num_ranks, specials, vocab_size


def _check_compact(num_ranks: Any, specials: Any, vocab_size: Any) -> None:
    if type(num_ranks) is not int or not 256 <= num_ranks < NUM_RANKS:
        raise ValueError(
            f"num_ranks: expected 256 (every single byte) to {NUM_RANKS - 1}, got {num_ranks!r}; "
            "choose another number"
        )
    if not isinstance(specials, dict) or set(specials) != set(HARMONY_SPECIALS):
        raise ValueError(
            f"specials: expected ids for {', '.join(HARMONY_SPECIALS)}, got {specials!r}; name "
            "exactly these"
        )
    if type(vocab_size) is not int or vocab_size < num_ranks + len(specials):
        raise ValueError(
            f"vocab_size: expected at least {num_ranks} ranks + {len(specials)} special tokens, "
            f"got {vocab_size!r}; enlarge it or take fewer ranks"
        )
    ids = list(specials.values())
    fit = all(type(token) is int and num_ranks <= token < vocab_size for token in ids)
    if not fit or len(set(ids)) != len(ids):
        raise ValueError(
            f"specials: expected different ids from {num_ranks} to {vocab_size - 1}, got {ids}; "
            "give each token a row of its own"
        )
