# SPDX-License-Identifier: Apache-2.0
"""Both tokenizers against the library, tiktoken's own table and byte-pair encoding by hand."""

import itertools
import json
import random
import re
from types import SimpleNamespace

import numpy as np
import pytest
from harmony_cases import TEXTS

from gptoss_jax.harmony import Tokenizer
from gptoss_jax.harmony.tokenizer import HARMONY_SPECIALS, TOKENIZER_FILE
from gptoss_jax.harmony.vocabulary import load_vocabulary


def random_texts(number: int, seed: int = 3) -> list[str]:
    draw = random.Random(seed)
    blocks = [(32, 127), (0xA0, 0x500), (0x600, 0x700), (0x4E00, 0x9FFF), (0x1F300, 0x1FAFF)]
    texts = []
    for _ in range(number):
        low, high = draw.choice(blocks)
        alphabet = [*map(chr, draw.choices(range(low, high), k=8)), " ", "\n", "7", "'s"]
        texts.append("".join(draw.choices(alphabet, k=draw.randrange(40))))
    return texts


def test_published_ids_equal_the_librarys(published, library):
    for text in random_texts(300) + TEXTS:
        ids = published.encode(text, specials="text")

        assert ids == library.encode(text, disallowed_special=())
        assert published.decode(ids) == text


def test_published_tables_equal_tiktokens(published, monkeypatch):
    from tiktoken_ext import openai_public

    monkeypatch.setattr(openai_public, "load_tiktoken_bpe", lambda *args, **options: {})
    theirs = openai_public.o200k_harmony()

    # tiktoken has two names for 200018; the one that Hugging Face also uses is kept.
    del theirs["special_tokens"]["<|reserved_200018|>"]
    assert published.specials == theirs["special_tokens"]
    assert published._encoding._pat_str == theirs["pat_str"]
    assert published.vocab_size == 201_088


def test_specials_equal_the_librarys(published, library):
    for text, token in HARMONY_SPECIALS.items():
        if text == "<|endofprompt|>":
            continue  # the library calls it <|reserved_200018|>
        assert library.encode(text, allowed_special="all") == [token]
        assert published.encode(text, specials="ids") == [token]
    actions = library.stop_tokens_for_assistant_actions()
    assert set(published.stop_ids) == {*actions, 199_999}


def test_compact_texts_come_back(compact):
    for text in random_texts(200, seed=4) + TEXTS:
        ids = compact.encode(text, specials="text")

        assert compact.decode(ids) == text
        assert b"".join(compact.token_bytes(i) for i in ids) == text.encode()
        assert all(i < compact.num_ranks for i in ids)


def byte_pairs(piece: bytes, ranks: dict[bytes, int]) -> list[int]:
    """Byte-pair encoding in its plainest form: merge the pair of lowest rank, again and again."""
    parts = [bytes([byte]) for byte in piece]
    while True:
        pairs = [ranks.get(a + b, len(ranks)) for a, b in itertools.pairwise(parts)]
        best = min(pairs, default=len(ranks))
        if best == len(ranks):
            return [ranks[part] for part in parts]
        i = pairs.index(best)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


def test_compact_ids_equal_byte_pairs_by_hand(compact):
    ranks = {token: rank for rank, token in enumerate(load_vocabulary(compact.num_ranks))}
    draw = random.Random(2)
    for _ in range(200):
        word = "".join(draw.choices("etaoinshr", k=draw.randint(1, 20)))  # one piece, no space

        assert compact.encode(word) == byte_pairs(word.encode(), ranks)


def test_compact_layout(compact):
    assert compact.num_ranks == 1014
    assert compact.specials == {text: 1014 + i for i, text in enumerate(HARMONY_SPECIALS)}
    assert compact.vocab_size == 1024
    assert [compact.decode([i]) for i in compact.stop_ids] == [
        "<|return|>",
        "<|call|>",
        "<|endoftext|>",
    ]


def test_from_library_reencodes_runs_between_specials(compact, published):
    text = "<|start|>user<|message|>Grüße 🤖 1234<|end|><|start|>assistant"
    library_ids = published.encode(text, specials="ids")

    assert compact.from_library(library_ids) == compact.encode(text, specials="ids")
    assert published.from_library(np.array(library_ids)) == library_ids


def test_from_library_keeps_cut_characters(compact, published):
    cut = published.encode("🤖")[:1]

    ids = compact.from_library([*cut, 200_007, *published.encode("a")])

    assert b"".join(map(compact.token_bytes, ids)) == published.token_bytes(cut[0]) + b"<|end|>a"


@pytest.mark.parametrize("name", ["published", "compact"])
def test_decoding_never_fails(name, request):
    tokenizer = request.getfixturevalue(name)
    end = tokenizer.specials["<|end|>"]

    text = tokenizer.decode([-1, *tokenizer.encode("a"), end, tokenizer.vocab_size, 10**12])

    assert text == "\ufffda<|end|>\ufffd\ufffd"
    cut = tokenizer.encode("🤖")[:1]
    assert tokenizer.token_text(cut[0]) == "\ufffd"


@pytest.mark.parametrize("name", ["published", "compact"])
@pytest.mark.parametrize("special", HARMONY_SPECIALS)
def test_specials_in_text(special, name, request):
    tokenizer = request.getfixturevalue(name)
    text = f"ab{special}c"

    with pytest.raises(ValueError, match=r"text: expected no special token.*character 2; pass"):
        tokenizer.encode(text)

    plain = tokenizer.encode(text, specials="text")
    meant = tokenizer.encode(text, specials="ids")
    assert all(i < tokenizer.num_ranks for i in plain)
    assert tokenizer.specials[special] in meant
    assert tokenizer.decode(plain) == tokenizer.decode(meant) == text


def test_text_that_only_looks_special_is_text(published):
    assert published.decode(published.encode("<|nothing|> <| end |>")) == "<|nothing|> <| end |>"


# The declaration beside a checkpoint


def test_saved_and_read_again(tmp_path):
    made = Tokenizer.compact(num_ranks=300, vocab_size=320)

    made.save(tmp_path)
    read = Tokenizer.from_folder(tmp_path)

    assert (read.num_ranks, read.specials, read.vocab_size) == (300, made.specials, 320)
    assert json.loads((tmp_path / TOKENIZER_FILE).read_text()) == {
        "format": "o200k_prefix",
        "num_ranks": 300,
        "specials": {text: 300 + i for i, text in enumerate(HARMONY_SPECIALS)},
        "vocab_size": 320,
    }
    assert read.decode([315]) == "\ufffd"  # padding


def test_a_folder_without_a_declaration_is_published(tmp_path, published):
    published.save(tmp_path)

    assert list(tmp_path.iterdir()) == []
    assert Tokenizer.from_folder(tmp_path).is_published


def test_a_stale_declaration_is_not_left_beside_the_published_one(tmp_path, published, compact):
    compact.save(tmp_path)

    with pytest.raises(ValueError, match=r"folder: expected none of gptoss_jax_tokenizer.json"):
        published.save(tmp_path)


GOOD = {
    "format": "o200k_prefix",
    "num_ranks": 300,
    "specials": {text: 300 + i for i, text in enumerate(HARMONY_SPECIALS)},
    "vocab_size": 320,
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "o200k_suffix"}, "format: expected 'o200k_prefix', got 'o200k_suffix'"),
        ({"note": "x"}, "expected the keys .*got .*note"),
        ({"num_ranks": 255}, "num_ranks: expected 256 .* got 255"),
        ({"num_ranks": "300"}, "num_ranks: expected 256 .* got '300'"),
        ({"num_ranks": 305}, "specials: expected different ids from 305"),
        ({"vocab_size": 309}, r"vocab_size: expected at least 300 ranks \+ 10 .* got 309"),
        ({"specials": {"<|end|>": 300}}, "specials: expected ids for"),
        ({"specials": dict.fromkeys(HARMONY_SPECIALS, 300)}, "specials: expected different ids"),
        ({"specials": [1, 2]}, "specials: expected ids for"),
    ],
)
def test_wrong_declarations(change, message, tmp_path):
    (tmp_path / TOKENIZER_FILE).write_text(json.dumps({**GOOD, **change}))

    with pytest.raises(ValueError, match=f"{TOKENIZER_FILE}: .*{message}"):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", '"o200k_prefix"', ""])
def test_declarations_that_are_no_object(text, tmp_path):
    (tmp_path / TOKENIZER_FILE).write_text(text)

    with pytest.raises(ValueError, match=f"{TOKENIZER_FILE}: expected"):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda t: Tokenizer.from_folder("/no/such"),
            "folder: expected the folder of a checkpoint",
        ),
        (lambda t: Tokenizer.compact(num_ranks=100), "num_ranks: expected 256"),
        (lambda t: Tokenizer.compact(1020, 1024), "vocab_size: expected at least 1020 ranks"),
        (lambda t: t.from_library([200_013]), r"ids: .*got <\|reserved_200013\|> \(200013\)"),
    ],
)
def test_wrong_arguments(call, message, compact):
    with pytest.raises(ValueError, match=message):
        call(compact)


@pytest.mark.parametrize("specials", ["text", "ids", "reject"])
@pytest.mark.parametrize("space", [" ", "\n", " \t", "\u3000", "\r\n"])
def test_no_piece_has_more_white_space_than_tiktoken_takes(space, specials, published, monkeypatch):
    """What is handed on is looked at; tiktoken itself sees only what it can take."""
    monkeypatch.setattr("gptoss_jax.harmony.tokenizer.MAX_WHITESPACE", 50)
    handed = []
    encoding = published._encoding
    recorder = SimpleNamespace(
        encode_ordinary=lambda text: handed.append(text) or encoding.encode_ordinary(text),
        encode=lambda text, **options: handed.append(text) or encoding.encode(text, **options),
    )
    text = f"a{space * 120}b {space * 20}c{space * 51}"
    monkeypatch.setattr(published, "_encoding", recorder)

    ids = published.encode(text, specials=specials)

    assert "".join(handed) == text == published.decode(ids)
    assert max(len(run) for piece in handed for run in re.findall(r"\s+", piece)) <= 50


def test_only_long_runs_of_white_space_are_cut(published):
    texts = ["a" * 70_000, "a b " * 20_000, "\u0e01" * 70_000, f"x{' ' * 65_536}y"]

    for text in texts:
        assert published.encode(text) == published._encoding.encode_ordinary(text)
