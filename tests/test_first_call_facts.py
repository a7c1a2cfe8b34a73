# SPDX-License-Identifier: Apache-2.0
"""The lines of JSON that a run leaves, on a full disk too, and the summary of them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from gptoss_jax.benchmarking.facts import Facts, append, known, read, summary, write_report


def strict(text: str) -> list[dict]:
    """Lines of JSON without the words for numbers that are not finite."""

    def refuse(word: str):
        raise AssertionError(f"{word} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_not_finite_are_refused(number, tmp_path):
    file = tmp_path / "facts"
    facts = Facts(file, "step")

    with facts.case("a ratio"):
        facts.write("a ratio", number)
    with pytest.raises(ValueError, match="not JSON compliant"):
        append(file, {"deep": [{"in": number}]})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_report({"rows": [number]}, tmp_path / "report")

    (line,) = strict(file.read_text())
    assert line["holds"] is False and line["value"] is None and facts.failed == ["a ratio"]
    assert not (tmp_path / "report").exists()


def test_facts_are_those_of_the_last_run(tmp_path):
    file = tmp_path / "facts"
    for value in (1, 2):
        append(file, {"step": "start", "fact": "machine", "value": "x", "unit": ""})
        if value == 1:
            Facts(file, "a").write("only then", 5.0)
        Facts(file, "a").write("copy", float(value), "GB/s")

    assert known(file, "copy") == 2.0 and known(file, "only then") is None
    assert [line["value"] for line in read(file)] == ["x", 2.0]


def test_a_line_that_was_cut_off_costs_no_other(tmp_path):
    file = tmp_path / "facts"
    append(file, {"step": "start"})
    torn = '{"step": "a", "fact": "copy", "val'
    for cut in (torn, "\0\0\0\0" + torn, "7\n[]\n"):
        with file.open("a") as opened:
            opened.write(cut)
        Facts(file, "a").write("copy", 2.0, "GB/s")

    assert known(file, "copy") == 2.0
    readable = [line for line in read(file) if line["step"] != "unreadable"]
    assert [line["step"] for line in readable] == ["start", "a", "a", "a"]
    assert summary(read(file))[-2] == "       4 lines of the file cannot be read and are left out"


FULL = (  # a disk with room for 100 bytes of each file
    "import resource, sys\nfrom pathlib import Path\n"
    "from gptoss_jax.benchmarking.facts import Facts, append\n"
    "from gptoss_jax.benchmarking.first_call import Runner, Stage\n"
    "file = Path(sys.argv[1])\nappend(file, {'step': 'start'})\n"
    "resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))\n"
)


def in_a_full_folder(file: Path, code: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", FULL + code, file], capture_output=True, text=True, check=True
    )


def test_a_fact_that_finds_no_room_is_printed_and_half_of_it_is_not_left(tmp_path):
    file = tmp_path / "facts"
    code = "facts = Facts(file, 'a')\nfacts.write('x' * 99, 7)\nprint(facts.failed)"

    done = in_a_full_folder(file, code)

    assert strict(file.read_text()) == [{"step": "start"}]
    (line,) = strict(done.stderr)
    assert (line["fact"], line["value"]) == ("x" * 99, 7)
    assert "is not written ([Errno 28] No space left" in done.stdout


def test_a_run_goes_on_where_its_file_has_no_room(tmp_path):
    code = (
        "runner = Runner(file, 60)\nruns = sys.executable, '-c', 'pass'\n"
        "runner.run([Stage(name * 99, 30, command=runs) for name in 'ab'])\n"
        "print(*runner.failed)"
    )

    done = in_a_full_folder(tmp_path / "facts", code)

    assert done.stdout.count("is not written: [Errno 28] No space left") == 2
    assert done.stdout.splitlines()[-1] == f"{'a' * 99} {'b' * 99}"


def test_an_exception_without_words_has_its_place(tmp_path):
    facts = Facts(tmp_path / "facts", "a")

    with facts.case("empty"):
        raise AssertionError

    (line,) = read(tmp_path / "facts")
    place, _, text = line["error"].partition(", ")
    assert place.startswith(f"AssertionError at {__file__}:") and text == "raise AssertionError"


def test_the_steps_that_are_done_are_all_named(tmp_path):
    names = [f"a-long-name-of-step-{number}" for number in range(40)]
    lines = [{"step": name, "status": "ok", "seconds": 1.0, "exit": 0} for name in names]
    facts = [{"step": "a", "fact": f"f{n}", "value": n, "unit": ""} for n in range(90)]

    shown = summary([*facts, *lines])

    assert len(shown) == 60 and max(map(len, shown)) <= 180
    text = " ".join(" ".join(shown).partition("ok: ")[2].split())
    assert text == ", ".join(f"{name} 1 s" for name in names)


def test_the_summary_has_failures_first_and_sixty_lines_at_most(tmp_path):
    file = tmp_path / "facts"
    facts = Facts(file, "decode")
    facts.write("fast", 1.25, "ms", share=0.5, ceiling="the copy")
    facts.write("details", 7, minor=True)
    facts.write("launches", 650, "a step", table=[f"kernel {number}" for number in range(90)])
    with facts.case("right"):
        raise ValueError("quantile 0.99 is 3e-01,\nallowed 2e-02")
    append(file, {"step": "lora", "status": "timed out", "seconds": 75.0, "exit": -9, "error": "x"})
    append(file, {"step": "warm", "status": "failed", "seconds": 1.0, "exit": 1, "optional": True})
    append(file, {"step": "decode", "status": "ok", "seconds": 30.0, "exit": 0})

    lines = summary(read(file))

    assert lines[0] == "FAILED lora: timed out after 75 s: x"
    assert lines[1].startswith("FAILED decode") and "0.99 is 3e-01, allowed 2e-02" in lines[1]
    assert lines[2] == "kernel 0" and len(lines) == 60
    assert any("1.25 ms, 50% of the copy" in line for line in lines)
    assert not any("details" in line for line in lines)
    assert lines[-2:] == ["       warm: failed after 1 s", "ok: decode 30 s"]
