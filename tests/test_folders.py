# SPDX-License-Identifier: Apache-2.0
"""Which folder a user means: a path, or a name in the Hugging Face cache, laid out as its tools do.

The layout, with files as links into `blobs`, is that of huggingface_hub 2.4.
"""

import os
import re
import shutil

import pytest
from checkpoints import write_checkpoint

import gptoss_jax as gj
from gptoss_jax import folders
from gptoss_jax.folders import BUNDLED_MODEL, checkpoint_folder, hub_cache, hub_name

NAME = "openai/gpt-oss-20b"
COMMITS = ("6cee5e81ee83917806bbde320786a8fb61efebee", "d666cf3b67006cf8227666739edf25164aaffdeb")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def put(cache, source, *, name=NAME, commit=COMMITS[0], refs=("main",)):
    """What a download leaves: blobs, links to them, and refs."""
    model = cache / ("models--" + name.replace("/", "--"))
    snapshot = model / "snapshots" / commit
    for file in (file for file in source.rglob("*") if file.is_file()):
        blob = model / "blobs" / f"{commit}-{file.name}"
        link = snapshot / file.relative_to(source)
        for folder in (blob.parent, link.parent):
            folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, blob)
        link.symlink_to(os.path.relpath(blob, link.parent))
    for ref in refs:
        (model / "refs" / ref).parent.mkdir(parents=True, exist_ok=True)
        (model / "refs" / ref).write_text(commit)
    return snapshot


@pytest.fixture
def source(config, tmp_path):
    return write_checkpoint(config, tmp_path / "source", max_shard_bytes=300_000)


def refused(path) -> str:
    with pytest.raises(ValueError, match=r"^path: ") as caught:
        checkpoint_folder(path)
    return str(caught.value)


def test_nothing_is_the_bundled_model_and_a_folder_is_itself(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "owner" / "name").mkdir(parents=True)

    assert checkpoint_folder(None) == BUNDLED_MODEL
    assert checkpoint_folder(tmp_path) == tmp_path
    assert checkpoint_folder("~/owner") == tmp_path / "owner"
    monkeypatch.chdir(tmp_path)
    assert checkpoint_folder("owner/name").resolve() == tmp_path / "owner" / "name"


@pytest.mark.parametrize("path", [NAME, f"{NAME}@main", f"{NAME}@{COMMITS[0]}"])
def test_a_name_loads_from_the_cache(config, cache, source, path):
    snapshot = put(cache, source)

    model = gj.load(path)

    assert model.config == config
    assert model.origin == str(snapshot)
    assert gj.fingerprint(path) == gj.fingerprint(source)
    assert gj.describe(path) == gj.describe(source)


def test_refs_decide_between_snapshots(cache, source):
    old = put(cache, source, refs=("v1", "refs/pr/3"))
    new = put(cache, source, commit=COMMITS[1])

    assert checkpoint_folder(NAME) == new
    assert checkpoint_folder(f"{NAME}@v1") == old
    assert checkpoint_folder(f"{NAME}@refs/pr/3") == old
    assert checkpoint_folder(f"{NAME}@{COMMITS[0]}") == old


def test_without_a_ref_the_only_snapshot_is_meant_and_several_are_named(cache, source):
    only = put(cache, source, refs=())
    assert checkpoint_folder(NAME) == only

    put(cache, source, commit=COMMITS[1], refs=())

    text = refused(NAME)
    assert COMMITS[0] in text and COMMITS[1] in text
    assert f"choose with '{NAME}@{COMMITS[0]}'" in text


@pytest.mark.parametrize("revision", ["v2", "../../outside", "main/.."])
def test_a_revision_that_is_not_there(cache, source, revision):
    put(cache, source)

    text = refused(f"{NAME}@{revision}")

    assert f"expected a revision of {NAME} that was downloaded, got {revision!r}" in text
    assert f"hf download {NAME} --revision {revision}" in text


def test_a_ref_without_its_snapshot(cache, source):
    snapshot = put(cache, source)
    shutil.rmtree(snapshot)

    text = refused(NAME)

    assert f"without the snapshot {COMMITS[0]}" in text
    assert f"finish the download: `hf download {NAME} --exclude '*/*'`" in text


def test_a_ref_that_leads_elsewhere_is_no_commit(cache, source):
    snapshot = put(cache, source)
    (snapshot.parents[1] / "refs" / "main").write_text("../../../source")

    assert checkpoint_folder(NAME) == snapshot


def test_a_download_that_is_not_finished(cache, source):
    snapshot = put(cache, source)
    lost = sorted(snapshot.glob("*.safetensors"))[1]
    lost.unlink()

    with pytest.raises(ValueError, match=f"missing: {lost.name}; `hf download {NAME}") as caught:
        gj.load(NAME)
    assert str(snapshot) in str(caught.value)

    for file in snapshot.glob("*.safetensors*"):
        file.unlink()
    with pytest.raises(ValueError, match=f"did the download finish.*hf download {NAME}"):
        gj.load(NAME)


@pytest.mark.parametrize("path", [NAME, "openai/gpt-oss-120b"])
def test_a_model_that_is_nowhere_is_told_how_to_get_it(cache, path):
    text = refused(path)

    assert f"got {path!r}: nothing is there on this machine, nor of that name in" in text
    assert repr(str(cache)) in text
    assert f"`hf download {path} --exclude '*/*'`" in text
    config = gj.ModelConfig.preset(path)
    assert f"{gj.describe(config).total_bytes / 1e9:.1f} GB" in text
    assert folders.PUBLISHED[path] == gj.describe(config).total_bytes
    assert "*.safetensors and their index, config.json, generation_config.json" in text


@pytest.mark.parametrize("path", ["20b", "models/of/mine", "./openai/gpt-oss-20b", "~/nothing"])
def test_a_path_that_leads_nowhere(cache, path):
    text = refused(path)

    assert f"got {path!r}: nothing is there on this machine. Nothing is downloaded" in text
    assert f"`hf download {NAME} " in text


def test_an_empty_path_is_not_the_current_folder():
    assert "expected a checkpoint folder, a name such as" in refused("")


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, "{home}/.cache/huggingface/hub"),
        ({"XDG_CACHE_HOME": "/x"}, "/x/huggingface/hub"),
        ({"XDG_CACHE_HOME": "/x", "HF_HOME": "~/hf"}, "{home}/hf/hub"),
        ({"HF_HOME": "/hf", "HF_HUB_CACHE": "$HOME/a"}, "{home}/a"),
        ({"HUGGINGFACE_HUB_CACHE": "/b"}, "/b"),
    ],
)
def test_the_cache_is_where_its_tools_have_it(tmp_path, monkeypatch, variables, expected):
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name, value in variables.items():
        monkeypatch.setenv(name, value)

    assert str(hub_cache()) == expected.format(home=tmp_path)


def test_a_snapshot_has_a_name(cache, source):
    assert hub_name(put(cache, source)) == NAME
    assert hub_name(put(cache, source, name="a/b--c")) == "a/b--c"
    assert hub_name(source) is None
    assert hub_name("x") is None


@pytest.mark.parametrize("with_index", [True, False])
def test_a_link_that_leads_nowhere_is_a_file_that_is_missing(cache, source, with_index):
    snapshot = put(cache, source)
    lost = sorted(snapshot.glob("*.safetensors"))[1]
    lost.resolve().unlink()
    if not with_index:
        (snapshot / "model.safetensors.index.json").unlink()

    with pytest.raises(ValueError, match=f"missing: {lost.name}; `hf download {NAME} --exclude"):
        gj.load(NAME)


@pytest.mark.parametrize("name", ["model.safetensors.index.json", "generation_config.json"])
def test_a_link_in_place_of_a_text_file(cache, source, name):
    snapshot = put(cache, source)
    (snapshot / name).unlink(missing_ok=True)
    (snapshot / name).symlink_to("../../blobs/gone")

    with pytest.raises(ValueError, match=rf"{name}: expected a file to read, got No such file"):
        gj.generate(gj.load(NAME), [[1]], max_new_tokens=1)


def test_a_download_is_finished_in_the_revision_that_was_meant(cache, source):
    put(cache, source, commit=COMMITS[1])
    old = put(cache, source, refs=("v1.0",))
    next(old.glob("*.safetensors")).unlink()
    again = f"`hf download {NAME} --revision {COMMITS[0]} --exclude '*/*'` goes on with it"

    with pytest.raises(ValueError, match=re.escape(again)):
        gj.describe(f"{NAME}@v1.0")
    (old / "config.json").unlink()
    with pytest.raises(ValueError, match=re.escape(again)):
        gj.describe(f"{NAME}@v1.0")
    assert folders.finish_command(source) is None


def test_a_revision_of_a_model_that_is_nowhere(cache):
    text = refused(f"{NAME}@v1.0")

    assert f"`hf download {NAME} --revision v1.0 --exclude '*/*'` fetches what is needed" in text


def test_the_home_of_somebody_unknown(cache, tmp_path):
    expected = "expected .*, got '~nosuchuser/x', and there is no home of that name"

    assert re.search(expected, refused("~nosuchuser/x"))
    with pytest.raises(ValueError, match=f"^adapter: {expected}"):
        gj.load(adapter="~nosuchuser/x")
    with pytest.raises(ValueError, match=f"^folder: {expected}"):
        gj.export(gj.load(), "~nosuchuser/x")


@pytest.mark.parametrize("path", ["x" * 5000, "a/" + "b" * 5000, NAME + "@" + "c" * 5000, "a\0b"])
def test_a_path_that_no_file_can_have(cache, path):
    assert "nothing is there on this machine" in refused(path)
