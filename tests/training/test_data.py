# SPDX-License-Identifier: Apache-2.0
"""Files to batches: what is loaded, what stands in which row, and that any process can go on."""

import dataclasses
import json
import random
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from small_runs import ONE_LAYER, random_model

from gptoss_jax.harmony import Tokenizer
from gptoss_jax.sharding import make_mesh
from gptoss_jax.training.data import (
    DataOptions,
    batches,
    check_resume,
    load_rows,
    one_pass,
    order_fields,
)
from gptoss_jax.training.documents import Counts, Documents, rows_here
from gptoss_jax.training.formats import conversation_of
from gptoss_jax.training.masks import tokenize
from gptoss_jax.training.packing import RowOrder, first_fit, shuffled
from gptoss_jax.training.sources import SourceRow

FILE = Path(__file__).with_name("conversations.jsonl")
OPTIONS = DataOptions(train=(str(FILE),), length=320, rows=3)


@pytest.fixture(scope="module")
def compact() -> Tokenizer:
    return Tokenizer.compact()


def documents_of(lengths: list[int]) -> Documents:
    """Documents whose ids say where they come from: 100 times the document, plus the place."""
    tokens = [100 * i + at for i, length in enumerate(lengths) for at in range(length)]
    weights = [float(at > 1) for length in lengths for at in range(length)]
    starts = np.cumsum([0, *lengths])
    return Documents(np.array(tokens, np.int32), np.array(weights, np.float32), starts, Counts())


def given(*rows: dict) -> dict:
    """What makes `load_rows` read these rows."""
    found = [SourceRow("a.jsonl", line, row) for line, row in enumerate(rows, start=1)]
    return {"paths": ["a.jsonl"], "read": lambda paths: found}


def chat(question: str, answer: str) -> dict:
    messages = [("user", question), ("assistant", answer)]
    return {"messages": [{"role": role, "content": content} for role, content in messages]}


# Rows of files


def test_rows_are_tokenized_conversations(compact):
    documents = load_rows([str(FILE)], OPTIONS, tokenizer=compact)

    lines = [json.loads(line) for line in FILE.read_text(encoding="utf-8").splitlines()]
    kept = [line for index, line in enumerate(lines) if index not in (5, 7)]
    settings = OPTIONS.settings()
    rows = [tokenize(conversation_of(line), tokenizer=compact, settings=settings) for line in kept]
    assert len(documents) == len(rows)
    assert documents.lengths.tolist() == [len(row.tokens) for row in rows]
    np.testing.assert_array_equal(documents.tokens, np.concatenate([r.tokens for r in rows]))
    np.testing.assert_array_equal(documents.weights, np.concatenate([r.weights for r in rows]))
    assert documents.counts == Counts(read=9, too_long=1, nothing_to_train=1, with_specials=1)


def test_the_report_says_what_became_of_the_rows(compact):
    documents = load_rows([str(FILE)], OPTIONS, tokenizer=compact)
    made = batches(documents, OPTIONS)
    report = made.report
    made.close()

    trained = int(documents.weights.sum())
    assert (report.documents, report.tokens) == (7, len(documents.tokens))
    assert (report.trained_tokens, report.counts) == (trained, documents.counts)
    assert report.fill == len(documents.tokens) / (report.packed_rows * 320)
    assert report.steps_per_epoch == report.packed_rows / 3
    assert str(report).splitlines()[2:] == [
        "1 rows left out: too long",
        "1 rows left out: nothing to train",
        "1 rows spell special tokens, which are learnt as plain text",
    ]
    assert json.loads(json.dumps(dataclasses.asdict(report)))["counts"]["read"] == 9


def test_the_system_message_is_that_of_the_options(compact):
    options = dataclasses.replace(OPTIONS, effort="low", date="2025-08-05", identity="I am Ada.")
    documents = load_rows(**given(chat("q", "a")), options=options, tokenizer=compact)

    text = compact.decode(documents.tokens)
    assert "<|message|>I am Ada.\nKnowledge cutoff: 2024-06\nCurrent date: 2025-08-05\n" in text
    assert "Reasoning: low" in text


def test_expanded_turns_are_documents_of_their_own(compact):
    options = dataclasses.replace(OPTIONS, expand_turns=True)
    rows = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "a", "thinking": "b"},
    ]

    documents = load_rows(**given({"messages": rows * 3}), options=options, tokenizer=compact)

    assert (len(documents), documents.counts.read) == (3, 3)
    text = compact.decode(documents.tokens)
    assert text.count("<|channel|>analysis<|message|>b") == 3
    assert text.count("<|return|>") == 3


def test_a_row_that_is_too_long_is_left_out_cut_or_an_error(compact):
    rows = given(chat("q", "short"), chat("q", "long " * 400), chat("long " * 400, "q"))

    def load(too_long):
        options = dataclasses.replace(OPTIONS, too_long=too_long)
        return load_rows(**rows, options=options, tokenizer=compact)

    assert load("leave-out").counts == Counts(read=3, too_long=2)
    cut = load("truncate")
    assert cut.counts == Counts(read=3, truncated=1, nothing_to_train=1)
    assert cut.lengths.tolist() == [load("leave-out").lengths[0], 320]
    with pytest.raises(ValueError, match="got 2 problems") as raised:
        load("error")
    assert "\na.jsonl:2: row: expected at most length=320 tokens, got " in str(raised.value)


def test_all_errors_of_all_rows_are_raised_at_once(compact):
    wrong = [{"messages": [{"role": "robot", "content": "x"}, {"role": "user"}]}] * 15
    rows = given({"answer": 1}, chat("q", "a"), *wrong)
    rows["read"]([]).append(SourceRow("b.jsonl", 4, None, "expected JSON, got nothing"))

    with pytest.raises(ValueError, match="got 32 problems") as raised:
        load_rows(**rows, options=OPTIONS, tokenizer=compact)

    lines = str(raised.value).splitlines()
    assert len(lines) == 22 and lines[-1] == "and 12 more"
    assert lines[1].startswith("a.jsonl:1: row: expected the columns of one format, ")
    assert lines[2].startswith("a.jsonl:3: messages[0].role: expected ")
    assert lines[3].startswith("a.jsonl:3: messages[1].content: expected ")


def test_an_unreadable_row_is_an_error(compact):
    read = [SourceRow("b.jsonl", 4, None, "expected JSON, got nothing")]

    with pytest.raises(ValueError, match=r"1 problems.*\nb.jsonl:4: expected JSON, got nothing"):
        load_rows(["b"], OPTIONS, tokenizer=compact, read=lambda paths: read)


def made_of(**fields):
    """Options, past the tests' own check of types."""
    options = DataOptions(train=("a",))
    for name, value in fields.items():
        object.__setattr__(options, name, value)
    options.__post_init__()
    return options


def test_no_row_left_is_an_error(compact):
    rows = given(chat("q", "long " * 400), chat("q", ""))
    rows["read"]([])[1].fields["messages"][1]["weight"] = 0

    with pytest.raises(ValueError, match=r"a.jsonl: expected rows .* 2 rows, of them 1 .* 1 with"):
        load_rows(**rows, options=OPTIONS, tokenizer=compact)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("train", ()),
        ("length", 1),
        ("rows", 0),
        ("mask", "all"),
        ("too_long", "drop"),
        ("seed", -1),
        ("epochs", 0),
        ("effort", "max"),
        ("date", "today"),
        ("date", 2026),
        ("length", "256"),
        ("length", 256.5),
        ("length", 2**31),
        ("rows", None),
        ("rows", 10**20),
        ("rows", 2**20),  # with the default length, 2^31 tokens
        ("seed", None),
        ("seed", True),
        ("seed", 10**26),
        ("epochs", "2"),
        ("epochs", 10**12),
        ("packing", "false"),
        ("shuffle", "no"),
        ("expand_turns", 1),
        ("builtin_tools", None),
        ("builtin_tools", (1,)),
        ("builtin_tools", ("calculator",)),
        ("identity", 5),
        ("eval", 5),
    ],
)
def test_wrong_options_are_refused(name, value):
    with pytest.raises(ValueError, match=rf"^{name}(\.0)?: expected .*, got ") as raised:
        made_of(**{name: value})
    assert "; " not in str(raised.value).replace("; describe another", "")


def test_all_that_is_wrong_with_options_is_said_at_once():
    with pytest.raises(ValueError, match=r"^train: .*; rows: .*; packing: "):
        made_of(train=5, rows=None, packing="false")
    with pytest.raises(ValueError, match=r"^length: .*; effort: .*; date: "):
        made_of(length=1, effort="max", date="2026")


def test_numbers_of_numpy_are_whole_numbers():
    options = made_of(length=np.int64(256), rows=np.int32(4))

    assert (options.length, options.rows) == (256, 4)
    assert type(options.length) is type(options.rows) is int
    assert made_of(epochs="none", builtin_tools="python") == made_of(builtin_tools=["python"])


# Which documents stand in which row


def test_packing_puts_every_document_whole_into_one_row():
    for seed in range(40):
        draw = random.Random(seed)
        capacity = draw.randint(20, 3000)
        lengths = [draw.randint(1, capacity) for _ in range(draw.randint(1, 2500))]
        order = shuffled(len(lengths), seed, 0)

        rows = first_fit(np.array(lengths), order, capacity)

        documents = [document for row in rows for document in row.tolist()]
        assert sorted(documents) == list(range(len(lengths)))
        sums = [sum(lengths[document] for document in row) for row in rows]
        assert max(sums) <= capacity
        firsts = [np.flatnonzero(order == row[0])[0] for row in rows]
        assert firsts == sorted(firsts)


def test_packed_rows_are_full():
    lengths = np.random.default_rng(0).integers(20, 901, size=3000)

    rows = first_fit(lengths, shuffled(3000, 0, 0), 2048)

    assert lengths.sum() / (2048 * len(rows)) >= 0.98


def test_first_fit_by_hand():
    rows = first_fit(np.array([6, 5, 4, 2, 3, 7]), np.array([0, 1, 2, 3, 4, 5]), 10)

    assert [row.tolist() for row in rows] == [[0, 2], [1, 3, 4], [5]]


def test_each_epoch_has_an_order_of_its_own():
    assert sorted(shuffled(100, 7, 3)) == list(range(100))
    assert shuffled(8, 0, 0).tolist() == [3, 2, 1, 6, 0, 7, 4, 5]  # for ever: runs go on with it
    orders = {tuple(shuffled(100, seed, epoch)) for seed in (0, 1) for epoch in (0, 1)}
    assert len(orders) == 4


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("epochs", [None, 4])
def test_any_row_is_known_without_those_before(packing, epochs):
    lengths = np.random.default_rng(0).integers(3, 30, size=41)
    options = {"capacity": 50, "packing": packing, "seed": 5, "epochs": epochs}
    in_order = RowOrder(lengths, **options)
    number = sum(len(in_order.epoch(epoch)) for epoch in range(4))
    rows = [in_order[index].tolist() for index in range(number)]

    for index in random.Random(0).sample(range(number), k=40):
        assert RowOrder(lengths, **options)[index].tolist() == rows[index]

    at = 0
    for epoch in range(4):
        many = len(in_order.epoch(epoch))
        documents = [document for row in rows[at : at + many] for document in row]
        assert sorted(documents) == list(range(41))
        at += many
    if epochs:
        assert len(in_order) == number
        with pytest.raises(IndexError):
            in_order[number]


# Batches


def test_a_batch_by_hand():
    options = DataOptions(train=("a",), length=8, rows=3, shuffle=False, epochs=1)
    made = batches(documents_of([4, 3, 5]), options)

    batch = next(made)

    x = [0, 1, 2, 3, 100, 101, 102]
    assert batch.tokens.tolist() == [[*x, 0], [200, 201, 202, 203, 204, 0, 0, 0], [0] * 8]
    no = [-1] * 8
    assert batch.positions.tolist() == [[0, 1, 2, 3, 0, 1, 2, -1], [0, 1, 2, 3, 4, *no[:3]], no]
    assert batch.segments.tolist() == [[1, 1, 1, 1, 2, 2, 2, 0], [1] * 5 + [0] * 3, [0] * 8]
    assert batch.weights.tolist() == [[0, 0, 1, 1, 0, 0, 1, 0], [0, 0, 1, 1, 1] + [0] * 3, [0] * 8]
    assert {leaf.dtype.name for leaf in jax.tree.leaves(batch)} == {"int32", "float32"}
    with pytest.raises(StopIteration):
        next(made)


SMALL = DataOptions(train=("a",), length=40, rows=4, epochs=3, seed=2)
LENGTHS = np.random.default_rng(1).integers(3, 30, size=37).tolist()


def arrays(batch) -> list[np.ndarray]:
    return [batch.tokens, batch.positions, batch.segments, batch.weights]


def starts_of(made) -> list[int]:
    """The documents in batches, in their order."""
    found = []
    for batch in made:
        first = (batch.positions == 0) & (batch.segments > 0)
        found += (batch.tokens[first] // 100).tolist()
    return found


def test_epochs_follow_one_another_and_hold_every_document_once():
    made = batches(documents_of(LENGTHS), SMALL)

    documents = starts_of(made)

    epochs = [documents[at : at + 37] for at in (0, 37, 74)]
    assert len(documents) == 111
    assert all(sorted(epoch) == list(range(37)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_evaluation_is_one_pass_in_order():
    options = dataclasses.replace(SMALL, packing=False)

    assert starts_of(one_pass(documents_of(LENGTHS), options)) == list(range(37))


def test_a_run_goes_on_from_every_position():
    documents = documents_of(LENGTHS)
    made = batches(documents, SMALL)
    states, whole = [], []
    states.append(json.dumps(made.get_state()))
    for batch in made:
        whole.append(arrays(batch))
        states.append(json.dumps(made.get_state()))
    again = batches(documents, SMALL)
    assert len(whole) > 8

    for at in random.Random(0).sample(range(len(states)), k=len(states)):
        for goes_on in (again, batches(documents, SMALL)):
            goes_on.set_state(json.loads(states[at]))
            rest = [arrays(batch) for batch in goes_on]
            assert json.dumps(goes_on.get_state()) == states[-1]
            assert len(rest) == len(whole) - at
            for ours, theirs in zip(rest, whole[at:], strict=True):
                np.testing.assert_equal(ours, theirs)


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_fill_their_rows_of_the_same_batches(processes):
    documents = documents_of(LENGTHS)
    shares = [range(part, 4, processes) for part in range(processes)]
    made = [batches(documents, SMALL, here=share) for share in shares]
    whole = batches(documents, SMALL)

    for batch, *parts in zip(whole, *made, strict=True):
        for share, part in zip(shares, parts, strict=True):
            others = [row for row in range(4) if row not in share]
            for ours, theirs, padding in zip(
                arrays(part), arrays(batch), (0, -1, 0, 0), strict=True
            ):
                np.testing.assert_array_equal(ours[list(share)], theirs[list(share)])
                assert (ours[others] == padding).all()
    assert len({each.digest for each in (whole, *made)}) == 1


class PartOf(jax.sharding.Sharding):
    """A sharding as a process sees it that has some of the devices."""

    def __init__(self, sharding, devices):
        self.sharding, self.devices = sharding, devices

    def addressable_devices_indices_map(self, shape):
        parts = self.sharding.devices_indices_map(shape)
        return {device: parts[device] for device in self.devices}


def test_rows_of_a_process_are_those_of_its_devices():
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    by_row = NamedSharding(mesh, PartitionSpec(("data", "fsdp"), None))
    devices = mesh.devices.ravel()

    assert rows_here(by_row, (8, 16)) == list(range(8))
    assert rows_here(PartOf(by_row, devices[:4]), (8, 16)) == [0, 1, 2, 3]
    assert rows_here(PartOf(by_row, devices[6:]), (8, 16)) == [6, 7]
    whole = NamedSharding(mesh, PartitionSpec(None, None))
    assert rows_here(PartOf(whole, devices[:1]), (8, 16)) == list(range(8))


def test_the_digest_is_that_of_tokens_weights_and_order():
    documents = documents_of(LENGTHS)

    def digest(documents=documents, **changes):
        made = batches(documents, dataclasses.replace(SMALL, **changes))
        made.close()
        return made.digest

    other_weights = dataclasses.replace(documents, weights=1 - documents.weights)
    digests = [digest(), digest(seed=3), digest(length=50), digest(other_weights)]
    assert digest() == digests[0] == digest(epochs=None, rows=2)
    assert len(set(digests)) == 4


def test_what_changes_the_order_on_resume_is_an_error():
    stored = json.loads(json.dumps(order_fields(SMALL) | {"digest": "a"}))

    moved = dataclasses.replace(SMALL, train=("b",), eval=("c",), epochs=9)
    check_resume(stored, order_fields(moved) | {"digest": "a"})
    changes = {
        "length": 80,
        "rows": 2,
        "mask": "final",
        "expand_turns": True,
        "too_long": "error",
        "packing": False,
        "share_beginning": True,
        "shuffle": False,
        "seed": 9,
        "effort": "low",
        "date": "2026-01-01",
        "knowledge_cutoff": None,
        "identity": None,
        "builtin_tools": ("python",),
    }
    fields = {field.name for field in dataclasses.fields(DataOptions)}
    assert set(changes) == fields - {"train", "eval", "epochs"}
    for name, value in changes.items():
        other = dataclasses.replace(SMALL, **{name: value})
        with pytest.raises(ValueError, match=rf"^data\.{name}: expected .* got "):
            check_resume(stored, order_fields(other) | {"digest": "b"})
    with pytest.raises(ValueError, match=r"data\.train: expected the rows with which"):
        check_resume(stored, order_fields(SMALL) | {"digest": "b"})


def test_without_grain_one_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "grain", None)

    with pytest.raises(ImportError, match=r"grain: expected .*'gptoss-jax\[train\]'"):
        batches(documents_of([3]), SMALL)


def test_packed_documents_have_the_loss_and_gradient_of_single_ones():
    model = random_model(dataclasses.replace(ONE_LAYER, num_layers=2))
    draw = np.random.default_rng(0)
    lengths = [9, 17, 5, 13, 21, 7]
    documents = dataclasses.replace(
        documents_of(lengths), tokens=draw.integers(208, size=sum(lengths)).astype(np.int32)
    )
    options = DataOptions(train=("a",), length=40, rows=6, epochs=1)

    @jax.jit
    def measured(batch):
        def nats(params):
            logits = nnx.merge(graph, params)(batch.tokens, batch.positions, batch.segments)
            logs = jax.nn.log_softmax(logits[:, :-1])
            picked = jnp.take_along_axis(logs, batch.tokens[:, 1:, None], axis=-1)[..., 0]
            return -(picked * batch.weights[:, 1:]).sum()

        return jax.value_and_grad(nats)(params)

    graph, params = nnx.split(model)
    packed = next(batches(documents, options))
    single = next(batches(documents, dataclasses.replace(options, packing=False)))
    (loss, gradient), (expected, expected_gradient) = map(measured, (packed, single))

    assert (np.asarray(packed.segments).max(), np.asarray(single.segments).max()) == (3, 1)
    assert packed.weights.sum() == single.weights.sum() == sum(lengths) - 2 * len(lengths)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    for ours, theirs in zip(*map(jax.tree.leaves, (gradient, expected_gradient)), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-5 * float(abs(theirs).max()))
