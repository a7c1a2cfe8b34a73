# SPDX-License-Identifier: Apache-2.0
"""Prefill and decode against the full forward pass and float64 loops over its logits.

One small random model; prompts, rows and lengths are chosen so that few programs are compiled.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sampling_oracle as oracle
from flax import nnx

from gptoss_jax import device
from gptoss_jax.inference import decode
from gptoss_jax.inference.decode import Completion, Decoder, generate, stream
from gptoss_jax.inference.sampling import Sampling
from gptoss_jax.model.transformer import Transformer
from gptoss_jax.mxfp4 import Mxfp4

GREEDY = Sampling(temperature=0.0)
LONGEST = 16  # of a prompt, and one more of new tokens: what the shared programs hold
LENGTHS = [1, 7, 8, 9, 16]  # W is 8
EVERYTHING = Sampling(  # all stages at once: every batch that has it runs the same program
    temperature=1.3,
    top_k=40,
    top_p=0.9,
    min_p=0.02,
    repetition_penalty=1.3,
    presence_penalty=0.4,
    frequency_penalty=0.3,
    logit_bias={5: 1.5, 9: -2.0},
    seed=11,
)
PENALISED = Sampling(
    temperature=0.0,
    repetition_penalty=1.7,
    presence_penalty=0.6,
    frequency_penalty=0.4,
    logit_bias={17: 2.0},
)


@pytest.fixture
def model(config) -> Transformer:
    return _model(config)


@pytest.fixture
def decoder(config) -> Decoder:
    return _decoder(config)


@functools.cache
def _decoder(config) -> Decoder:
    return Decoder(_model(config))


@functools.cache
def _model(config) -> Transformer:
    """A window layer and a full one; random everywhere, and made without compiling anything."""
    config = dataclasses.replace(config, num_layers=2)
    shapes = nnx.eval_shape(
        lambda: Transformer(config, rngs=nnx.Rngs(0), dtype=jnp.float32, experts="packed")
    )
    graph, state = nnx.split(shapes)
    rng = np.random.default_rng(0)

    def fill(leaf):
        if isinstance(leaf, Mxfp4):
            codes = rng.integers(0, 256, leaf.blocks.shape, np.uint8)
            return Mxfp4(jnp.asarray(codes), jnp.full(leaf.scales.shape, 127 - 6, jnp.uint8))
        scale = 1.5 * leaf.shape[-1] ** -0.5 if len(leaf.shape) > 1 else 1.0
        return jnp.asarray(rng.normal(0, scale, leaf.shape).astype(np.float32))

    filled = jax.tree.map(fill, state, is_leaf=lambda leaf: isinstance(leaf, Mxfp4))
    return nnx.merge(graph, filled)


@functools.partial(jax.jit, static_argnums=0)
def _forward(graph, state, tokens):
    return nnx.merge(graph, state)(tokens)


def full_logits(model: Transformer, sequences: list[list[int]]) -> list[np.ndarray]:
    """Logits [length V] of each sequence by the whole forward pass, four in one program."""
    tokens = np.zeros((4, 2 * LONGEST + 8), np.int32)  # what comes later is not seen
    for row, sequence in enumerate(sequences):
        tokens[row, : len(sequence)] = sequence
    logits = np.asarray(_forward(*nnx.split(model), jnp.asarray(tokens)))
    return [logits[row, : len(sequence)] for row, sequence in enumerate(sequences)]


def prompts_of(lengths, seed: int = 0, vocab: int = 208) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, vocab, length).tolist() for length in lengths]


def check_replay(model, prompts, hows, completions, *, stop=()) -> None:
    """Every token and log-probability follows from the full forward pass of what came before."""
    whole = [
        prompt + completion.tokens for prompt, completion in zip(prompts, completions, strict=True)
    ]
    for prompt, how, completion, logits in zip(
        prompts, hows, completions, full_logits(model, whole), strict=True
    ):
        assert len(completion.logprobs) == len(completion.tokens)
        for made, token in enumerate(completion.tokens):
            row = logits[len(prompt) - 1 + made]
            possible = oracle.distribution(row, how, prompt, completion.tokens[:made])
            assert possible[token] > 0, f"token {made} of {completion.tokens}"
            expected = oracle.log_softmax(row)[token]
            assert completion.logprobs[made] == pytest.approx(expected, abs=1e-5)
        assert not set(completion.tokens[:-1]) & set(stop)


def same(one: list[Completion], other: list[Completion]) -> bool:
    """Equal tokens and reasons; log-probabilities may differ by rounding."""
    return len(one) == len(other) and all(
        a.tokens == b.tokens
        and a.finish_reason == b.finish_reason
        and a.logprobs == pytest.approx(b.logprobs, abs=1e-5)
        for a, b in zip(one, other, strict=True)
    )


def joined(pieces) -> list[Completion]:
    """The rows of a stream; a reason comes with a row's last token, and nothing after it."""
    pieces = list(pieces)
    rows = []
    for row in zip(*pieces, strict=True):
        ended = [piece.finish_reason is not None for piece in row]
        assert sum(ended) == 1
        assert all(not piece.tokens for piece in row[ended.index(True) + 1 :])
        rows.append(
            Completion(
                [token for piece in row for token in piece.tokens],
                [value for piece in row for value in piece.logprobs],
                row[ended.index(True)].finish_reason,
            )
        )
    return rows


@pytest.mark.parametrize("lengths", [LENGTHS[:4], LENGTHS[1:]], ids=str)
def test_greedy_continuation_is_the_argmax_of_the_full_forward(model, decoder, lengths):
    prompts = prompts_of(lengths)

    completions = generate(decoder, prompts, max_new_tokens=17, sampling=GREEDY)

    whole = [prompt + row.tokens for prompt, row in zip(prompts, completions, strict=True)]
    for prompt, row, logits in zip(prompts, completions, full_logits(model, whole), strict=True):
        assert len(row.tokens) == 17 and row.finish_reason == "length"
        assert row.tokens == logits[len(prompt) - 1 : -1].argmax(axis=-1).tolist()
        assert len(set(row.tokens)) > 4, "too monotonous to show a fault"
    check_replay(model, prompts, [GREEDY] * 4, completions)


def test_rows_alone_in_any_order_and_beside_spare_rows_are_the_same(decoder):
    prompts = prompts_of([16, 1, 9, 4])
    hows = [GREEDY, EVERYTHING, Sampling(temperature=0.9, seed=3), PENALISED]
    limits = [17, 17, 5, 12]

    def run(rows):
        return generate(
            decoder,
            [prompts[row] for row in rows],
            max_new_tokens=[limits[row] for row in rows],
            sampling=[hows[row] for row in rows],
        )

    together = run([0, 1, 2, 3])

    assert [len(row.tokens) for row in together] == limits
    reordered = run([2, 0, 3, 1])
    assert same(reordered, [together[row] for row in [2, 0, 3, 1]])
    assert same(run([1, 3, 2]), [together[row] for row in [1, 3, 2]])  # and one spare row
    assert same(run([0, 0, 0]), together[:1] * 3)  # the program without draws and penalties
    assert same(run([1]), together[1:2])


@pytest.mark.parametrize(
    ("how", "tokens_per_dispatch"),
    [(GREEDY, 1), (GREEDY, 16), (EVERYTHING, 16), (EVERYTHING, None)],
    ids=["greedy-1", "greedy-16", "everything-16", "everything-None"],
)
def test_streaming_is_generating(decoder, how, tokens_per_dispatch):
    prompts = prompts_of([3, 12, 9, 1], seed=1)
    rest = {"max_new_tokens": [17, 6, 11, 1], "sampling": how, "stop": (3, 50, 100, 101, 102)}
    whole = generate(decoder, prompts, **rest)

    pieces = list(stream(decoder, prompts, **rest, tokens_per_dispatch=tokens_per_dispatch))

    assert same(joined(pieces), whole)
    assert all(len(row.tokens) == 1 for row in pieces[0]), "the first tokens come with the prefill"
    most = max(len(row.tokens) for piece in pieces[1:] for row in piece)
    assert most <= (tokens_per_dispatch or 16)
    assert any(row.tokens for row in pieces[-1]), "the last dispatch was needed"


def test_stop_tokens_end_rows_and_are_included(decoder):
    prompts = prompts_of([5, 1, 9, 16], seed=2)
    free = generate(decoder, prompts, max_new_tokens=17, sampling=GREEDY)
    stop = (free[0].tokens[4], free[1].tokens[0])  # the latter is the first one of its row

    ended = generate(decoder, prompts, max_new_tokens=[17, 17, 3, 1], sampling=GREEDY, stop=stop)

    limits = [17, 17, 3, 1]
    for row, (got, whole, limit) in enumerate(zip(ended, free, limits, strict=True)):
        stops = [at + 1 for at, token in enumerate(whole.tokens[:limit]) if token in stop]
        length = min([*stops, limit])
        assert got.tokens == whole.tokens[:length], row
        assert got.logprobs == pytest.approx(whole.logprobs[:length], abs=1e-5)
        assert got.finish_reason == ("stop" if stops else "length")
    assert len(ended[0].tokens) <= 5 and len(ended[1].tokens) == 1
    assert {row.finish_reason for row in ended} == {"stop", "length"}


def test_a_stop_token_at_the_limit_counts_as_a_stop(decoder):
    prompts = prompts_of([5, 1, 9, 16], seed=2)
    free = generate(decoder, prompts, max_new_tokens=1, sampling=GREEDY)

    ended = generate(decoder, prompts, max_new_tokens=1, sampling=GREEDY, stop=[free[2].tokens[0]])

    assert [row.tokens for row in ended] == [row.tokens for row in free]
    assert [len(row.tokens) for row in ended] == [1] * 4
    assert [row.finish_reason for row in free] == ["length"] * 4
    assert ended[2].finish_reason == "stop"


def test_long_prompts_go_in_pieces(model, decoder, monkeypatch):
    prompts = prompts_of([16, 5, 6, 13], seed=3)  # in pieces of 5: 4, exactly 1, 2 and 3
    hows = [EVERYTHING, PENALISED, GREEDY, dataclasses.replace(PENALISED, repetition_penalty=0.8)]
    rest = {"max_new_tokens": 17, "sampling": hows, "stop": [77]}
    whole = generate(decoder, prompts, **rest)

    monkeypatch.setattr(decode, "PREFILL_LENGTHS", (5,))
    pieces = generate(decoder, prompts, **rest)

    assert same(pieces, whole)
    check_replay(model, prompts, hows, pieces, stop=[77])


def test_what_an_earlier_call_returned_stays_as_it_was(decoder):
    """The state is donated to the next call, the arrays given to the caller are not."""
    prompts = prompts_of([4, 6, 1, 2])
    run, first, logprobs = decoder.start(prompts, sampling=[GREEDY] * 4, limits=[40] * 4, stop=())
    copies = first.copy(), logprobs.copy()
    given = run.advance(16)
    copies += given[0].copy(), given[1].copy()

    assert not run.done
    run.advance(16)
    last, _ = run.advance(16)

    assert run.done
    assert (last >= 0).sum(axis=1).tolist() == [7] * 4  # 1 + 16 + 16 + 7
    for array, copy in zip((first, logprobs, *given), copies, strict=True):
        assert array.tobytes() == copy.tobytes()


def test_nothing_is_compiled_again_for_prompts_of_the_same_bucket(model, decoder):
    def run(decoder, lengths, how, limit, stop):
        prompts = prompts_of(lengths, seed=sum(lengths))
        settings = [dataclasses.replace(how, seed=7), GREEDY, GREEDY, GREEDY][: len(lengths)]
        started, *_ = decoder.start(
            prompts, sampling=settings, limits=[limit] * len(lengths), stop=stop
        )
        started.advance(16)
        return decoder._prefill._cache_size(), started._advance._cache_size()

    before = run(decoder, [3, 1, 9, 2], EVERYTHING, 17, ())

    other = dataclasses.replace(EVERYTHING, temperature=0.4, top_k=3, logit_bias={1: 2.0})
    assert run(decoder, [16, 15, 1, 1], other, 3, (1, 2, 3)) == before
    assert run(decoder, [7, 8, 9], other, 90, (4,)) == before
    assert run(Decoder(model), [2, 2, 2, 2], other, 17, ()) == before


def test_other_kernels_are_other_programs(decoder):
    """Taken out in a process that has compiled for them, they must not run on."""
    prompts = [[3, 1, 4]]

    def start():
        sampling, limits = [GREEDY], [LONGEST]
        return decoder.start(prompts, sampling=sampling, limits=limits, stop=())[0]

    usual = start()
    with device.use_kernels("xla"):
        taken_out, prefill = start(), decoder._prefill

    assert prefill is not decoder._prefill
    assert taken_out._advance is not usual._advance
    assert start()._advance is usual._advance
    np.testing.assert_array_equal(taken_out.advance(4)[0], usual.advance(4)[0])


def test_a_stream_runs_by_the_kernels_of_where_it_was_asked_for(decoder):
    """As chat does, and reads it later."""
    with device.use_kernels("mosaic_gpu"):
        there = stream(decoder, [[3, 1, 4]], max_new_tokens=2, sampling=GREEDY)
    here = stream(decoder, [[3, 1, 4]], max_new_tokens=2, sampling=GREEDY)

    with pytest.raises(ValueError, match=r"'mosaic_gpu' cannot run .* here: needs a GPU"):
        next(there)
    with device.use_kernels("mosaic_gpu"):
        assert len(next(here)[0].tokens) == 1


def test_dispatches_of_all_sizes_share_one_program(decoder):
    prompts = prompts_of([5, 2, 9, 1], seed=6)
    hows, limits = [EVERYTHING, GREEDY, GREEDY, GREEDY], [40, 40, 7, 40]

    def start():
        return decoder.start(prompts, sampling=hows, limits=limits, stop=())[0]

    whole, run = start(), start()
    expected = whole.advance(32)
    programs = whole._advance._cache_size()
    sizes = [1, 3, 8, 20]
    pieces = [run.advance(size) for size in sizes]

    assert run._advance._cache_size() == programs
    assert [tokens.shape for tokens, _ in pieces] == [(4, size) for size in sizes]
    for piece, wanted in zip(zip(*pieces, strict=True), expected, strict=True):
        assert np.concatenate(piece, axis=1).tobytes() == wanted.tobytes()
    assert (expected[0] >= 0).sum(axis=1).tolist() == [32, 32, 6, 32]


def test_one_seed_one_text(decoder):
    prompts = prompts_of([4, 4, 11, 16], seed=4)
    hows = [dataclasses.replace(EVERYTHING, seed=seed) for seed in (0, 1, 2, 3)]

    def run(hows):
        return generate(decoder, prompts, max_new_tokens=17, sampling=hows)

    first = run(hows)

    assert run(hows) == first  # to the bit
    other = run([dataclasses.replace(how, seed=how.seed + 100) for how in hows])
    assert all(a.tokens != b.tokens for a, b in zip(first, other, strict=True))


def test_a_model_does_as_well_as_a_decoder(model, decoder):
    prompts = prompts_of([4, 4, 11, 16], seed=5)

    one, other = (
        generate(maker, prompts, max_new_tokens=9, sampling=GREEDY) for maker in (model, decoder)
    )

    assert one == other


@pytest.mark.parametrize("seed", range(10))
def test_anything_goes(model, decoder, seed):
    """Random prompts, limits, stops and settings: every token follows from what came before."""
    rng = np.random.default_rng(seed)
    rows = int(rng.integers(3, 5))
    prompts = prompts_of(rng.integers(1, LONGEST + 1, rows), seed)
    limits = rng.integers(1, 18, rows).tolist()
    stop = rng.integers(0, 208, rng.integers(0, 60)).tolist()[: 4 * (seed % 2)]
    pool = [GREEDY, PENALISED, EVERYTHING, Sampling(seed=seed), Sampling(top_k=3, seed=1)]
    hows = [EVERYTHING, *(pool[kind] for kind in rng.integers(0, len(pool), rows - 1))]
    hows = [dataclasses.replace(how, seed=int(rng.integers(2**32))) for how in hows]

    completions = generate(decoder, prompts, max_new_tokens=limits, sampling=hows, stop=stop)

    check_replay(model, prompts, hows, completions, stop=stop)
    for row, limit in zip(completions, limits, strict=True):
        stopped = row.tokens[-1] in stop
        assert row.finish_reason == ("stop" if stopped else "length")
        assert 1 <= len(row.tokens) <= limit and (stopped or len(row.tokens) == limit)
    turned = generate(
        decoder,
        prompts[::-1],
        max_new_tokens=limits[::-1],
        sampling=hows[::-1],
        stop=stop,
    )
    assert same(turned[::-1], completions)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": []}, "prompts: expected at least one, got none"),
        ({"prompts": [[1], []]}, r"prompts\[1\]: expected at least one token id, got none"),
        ({"prompts": [[1], [3, 208, -1]]}, r"prompts\[1\]: .*\[0, V=208\), got \[208, -1\]; "),
        ({"max_new_tokens": 0}, "max_new_tokens: expected at least 1, got 0"),
        ({"max_new_tokens": [3, -2]}, "max_new_tokens: expected at least 1, got -2"),
        ({"max_new_tokens": [3]}, "max_new_tokens: expected one or 2, one per prompt, got 1"),
        ({"sampling": [GREEDY] * 3}, "sampling: expected one or 2, one per prompt, got 3"),
        ({"sampling": Sampling(logit_bias={208: 1.0})}, r"logit_bias: .*V=208\), got \[208\]"),
        (
            {"max_new_tokens": [3, 131072]},
            r"prompts\[1\]: expected .* context of 131072 tokens, got 1 \+ 131072; shorten",
        ),
    ],
    ids=str,
)
def test_bad_requests_are_one_clear_error(decoder, changes, message):
    request = {"prompts": [[1, 2], [3]], "max_new_tokens": 5, "sampling": GREEDY} | changes

    with pytest.raises(ValueError, match=f"^{message}"):
        generate(decoder, request.pop("prompts"), **request)


@pytest.mark.parametrize("number", [0, -1])
def test_a_dispatch_of_no_tokens_is_an_error(decoder, number):
    with pytest.raises(ValueError, match=f"^tokens_per_dispatch: expected .*, got {number}$"):
        next(stream(decoder, [[1]], max_new_tokens=2, tokens_per_dispatch=number))


def test_the_context_is_the_limit_to_the_token(config):
    """16 positions hold a prompt of 10 and 6 new tokens, not 7."""
    rope = dataclasses.replace(config.rope, original_context=4, scaling_factor=4.0)
    short = Decoder(_model(dataclasses.replace(config, rope=rope)))

    short.check([list(range(10))], [6])

    with pytest.raises(ValueError, match=r"context of 16 tokens, got 10 \+ 7"):
        short.check([list(range(10))], [7])
