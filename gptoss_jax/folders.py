# SPDX-License-Identifier: Apache-2.0
"""Where things are kept: the model inside the package, the user's cache, and Hugging Face's.

Knows paths only; it makes no folder, reads no weights and asks nobody over the network. What is in
a checkpoint folder is the business of weights/checkpoint.py.
"""

import os
import re
import reprlib
from pathlib import Path
from typing import Any

BUNDLED_MODEL = Path(__file__).parent / "bundled" / "tiny"

# The published models and the bytes of their tensors.
PUBLISHED = {"openai/gpt-oss-20b": 13_761_264_768, "openai/gpt-oss-120b": 65_248_815_744}
_HUB_NAME = re.compile(r"(?P<owner>[A-Za-z0-9][\w.-]*)/(?P<name>[\w.-]+)(@(?P<revision>[\w./-]+))?")


def cache_folder() -> Path:
    """What may be thrown away: $GPTOSS_JAX_CACHE, else gptoss_jax in the user's cache folder."""
    own = os.environ.get("GPTOSS_JAX_CACHE")
    if own:
        return Path(own)
    parent = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(parent) / "gptoss_jax"


def hub_cache() -> Path:
    """Where the tools of Hugging Face keep what they download; the same variables decide."""
    variables = os.environ
    parent = variables.get("XDG_CACHE_HOME") or "~/.cache"
    home = variables.get("HF_HOME") or os.path.join(parent, "huggingface")
    own = variables.get("HF_HUB_CACHE") or variables.get("HUGGINGFACE_HUB_CACHE")
    return Path(os.path.expandvars(os.path.expanduser(own or os.path.join(home, "hub"))))


def checkpoint_folder(path: str | Path | None) -> Path:
    """The folder that a user means: one on this machine, or a name in the Hugging Face cache.

    None is the bundled model. A path that exists is itself, `~` expanded. "owner/name", or
    "owner/name@revision", is the snapshot that was downloaded last under that name. Nothing is
    downloaded. Raises ValueError that says where was looked and how to get the weights.
    """
    if path is None:
        return BUNDLED_MODEL
    expected = (
        "a checkpoint folder, a name such as 'openai/gpt-oss-20b', or None for the bundled model"
    )
    folder = user_folder("path", path, expected)
    if os.path.exists(folder):  # unlike Path.exists, False also of a name that is too long
        return folder
    name = _HUB_NAME.fullmatch(str(path))
    if name is None:
        raise ValueError(_not_found(str(path)))
    model, revision = f"{name['owner']}/{name['name']}", name["revision"]
    kept = hub_cache() / f"models--{name['owner']}--{name['name']}"
    if os.path.isdir(kept):
        return _snapshot(kept, model, revision)
    raise ValueError(_not_found(str(path), model, revision))


def user_folder(argument: str, path: Any, expected: str = "a folder") -> Path:
    """A path that a user gave, `~` expanded. Raises ValueError for what is none, and for the home
    of somebody who is not known here."""
    if not isinstance(path, str | os.PathLike) or not str(path):
        raise ValueError(f"{argument}: expected {expected}, got {reprlib.repr(path)}")
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise ValueError(
            f"{argument}: expected {expected}, got {_short(str(path))}, and there is no home of "
            "that name on this machine; write the path out, or ./~... for a name with a tilde"
        ) from None


def download_command(name: str, revision: str | None = None) -> str:
    """What fetches a published model, or goes on fetching it, into the Hugging Face cache."""
    wanted = f" --revision {revision}" if revision else ""
    return f"hf download {name}{wanted} --exclude '*/*'"


def _snapshot(kept: Path, name: str, revision: str | None) -> Path:
    """One of the snapshots of a model: a ref that has the revision's name says which, as does a
    commit; without a revision the ref `main`, else the only one there is."""
    there = sorted(folder.name for folder in kept.glob("snapshots/*") if folder.is_dir())
    commit = revision if revision in there else _commit(kept, revision or "main")
    if commit is None and revision is None and len(there) == 1:
        commit = there[0]
    if commit in there:
        return kept / "snapshots" / commit
    again = f"`{download_command(name, revision)}`"
    if not there or commit is not None:
        raise ValueError(
            f"path: expected the weights of {name} in the Hugging Face cache, got {str(kept)!r} "
            f"without the snapshot {commit or revision or 'main'}; finish the download: {again}"
        )
    found, one = ", ".join(there), f"{name}@{there[0]}"
    if revision is None:
        raise ValueError(
            f"path: expected one snapshot of {name}, or one that is called main, got {found} in "
            f"{str(kept)!r}; choose with {one!r}"
        )
    raise ValueError(
        f"path: expected a revision of {name} that was downloaded, got {revision!r}; there are "
        f"{found}: choose as with {one!r}, or fetch it: {again}"
    )


def _commit(kept: Path, ref: str) -> str | None:
    """The commit that a ref was at when it was downloaded."""
    file = kept / "refs" / ref
    if ".." in file.parts or not os.path.isfile(file):
        return None
    text = file.read_text(encoding="utf-8", errors="replace").strip()
    return text if re.fullmatch(r"[0-9A-Za-z]+", text) else None


def _not_found(path: str, hub_name: str | None = None, revision: str | None = None) -> str:
    """What is said where there is nothing, and how to get something."""
    model = hub_name or "openai/gpt-oss-20b"
    given = f"{model}@{revision}" if revision else model
    size = f", {PUBLISHED[model] / 1e9:.1f} GB" if model in PUBLISHED else ""
    looked = f", nor of that name in {str(hub_cache())!r}" if hub_name else ""
    return (
        f"path: expected a checkpoint folder, got {_short(path)}: nothing is there on this machine"
        f"{looked}. Nothing is downloaded for you: `{download_command(model, revision)}` fetches "
        f"what is needed of {given}{size}, and that name may then be given as the path. Needed are "
        "*.safetensors and their index, config.json, generation_config.json and the tokenizer's "
        "files; original/ and metal/ have the same weights again"
    )


def _short(path: str) -> str:
    """A path for an error; of a very long one both ends."""
    return repr(path if len(path) <= 200 else f"{path[:100]}...{path[-80:]}")


def hub_name(folder: str | Path) -> str | None:
    """The name "owner/name" of a snapshot in the layout of the Hugging Face cache, else None."""
    *_, model, snapshots, _revision = ("", "", "", *Path(folder).parts)
    if snapshots != "snapshots" or not model.startswith("models--"):
        return None
    return model.removeprefix("models--").replace("--", "/", 1)


def finish_command(folder: str | Path) -> str | None:
    """What goes on with the download of a snapshot, of the revision that it is; None elsewhere."""
    name, folder = hub_name(folder), Path(folder)
    if name is None:
        return None
    is_main = _commit(folder.parents[1], "main") == folder.name
    return download_command(name, None if is_main else folder.name)
