# SPDX-License-Identifier: Apache-2.0
"""Write the golden files: what transformers and gpt_oss answer in float32 on small models.

Needs torch, transformers and gpt_oss (see CONTRIBUTING.md); the files it writes need nothing:

    python tests/golden/make_golden.py

Refuses to write where the oracles differ from each other, or where a choice that a rounding error
could turn (the next token, the experts of a token) is close.
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

import transformers  # noqa: E402 - after the paths of the project
from golden import cases  # noqa: E402
from golden.oracles import GptOssOracle, TransformersOracle, recorded  # noqa: E402

AGREEMENT = 5e-5  # of the standard deviation: float32 rounding through a few layers
TOKEN_MARGIN = 1e-3  # of the standard deviation of the logits
EXPERT_MARGIN = 2e-5  # of that of the router's logits; ten times what rounding does to them


def main() -> None:
    for name, config in cases.CONFIGS.items():
        with tempfile.TemporaryDirectory() as folder:
            hf = TransformersOracle(config, Path(folder), cases.SEEDS[name])
            original = GptOssOracle(config, Path(folder), cases.SEEDS[name])
            arrays = golden_arrays(name, hf, original)
        path = cases.FOLDER / f"{name}.npz"
        np.savez_compressed(path, **arrays)
        print(f"{path.name}: {path.stat().st_size:,} bytes")
    write_config()


def golden_arrays(name, hf, original) -> dict[str, np.ndarray]:
    config = cases.CONFIGS[name]
    arrays = {}

    def keep(case: str, tokens, ours, theirs):
        spread = theirs.std()
        difference = np.abs(ours - theirs).max() / spread
        print(f"{name} {case}: oracles differ by {difference:.1e} of the standard deviation")
        assert difference < AGREEMENT
        arrays[f"{case}.tokens"] = tokens
        arrays[f"{case}.transformers"] = ours
        arrays[f"{case}.gpt_oss"] = theirs

    rows = cases.random_tokens(config, f"rows {name}", 2, cases.ROW_LENGTH)
    keep("rows", rows, hf.logits(rows), original.logits(rows))

    long = cases.random_tokens(config, f"long {name}", 1, cases.LONG[name])
    logits, router_logits = recorded(hf.routers, lambda: hf.logits(long))
    kept = cases.long_positions(name)
    keep("long", long, logits[:, kept], original.logits(long)[:, kept])
    for layer, each in enumerate(router_logits):
        margin = top_margin(each, config.experts_per_token)
        print(f"{name} long: layer {layer} chooses experts by {margin:.1e}")
        assert margin > EXPERT_MARGIN

    far = np.arange(cases.ROW_LENGTH)[None] + cases.FAR[name]
    arrays["far.transformers"] = hf.logits(rows[:1], far)

    short = rows[:1, : cases.BLOCK_LENGTH]
    _, ours = recorded(hf.layers, lambda: hf.logits(short))
    _, theirs = recorded(original.layers, lambda: original.logits(short))
    keep("blocks", short, np.stack(ours)[:, 0], np.stack(theirs))

    for length in cases.PROMPT_LENGTHS:
        prompt = cases.random_tokens(config, f"prompt {length}", length)
        new, logits = hf.greedy(prompt, cases.GREEDY_TOKENS)
        print(f"{name} greedy after {length}: chosen by {top_margin(logits, 1):.1e}")
        assert top_margin(logits, 1) > TOKEN_MARGIN
        # The other oracle, given the whole sequence, chooses each of its tokens again.
        again = original.logits(np.r_[prompt, new[:-1]][None])[0, length - 1 :]
        assert np.array_equal(again.argmax(axis=-1), new)
        arrays[f"greedy{length}.prompt"], arrays[f"greedy{length}.new"] = prompt, new
    return arrays


def top_margin(logits: np.ndarray, count: int) -> float:
    """The least distance between the last logit chosen and the first one not chosen."""
    ordered = np.sort(logits, axis=-1)[..., ::-1]
    return float((ordered[..., count - 1] - ordered[..., count]).min() / logits.std())


def write_config() -> None:
    """The published configuration as this version of transformers saves it."""
    config = transformers.GptOssConfig(
        architectures=["GptOssForCausalLM"], num_hidden_layers=24, num_local_experts=32
    )
    fields = json.loads(config.to_json_string(use_diff=False))
    path = cases.FOLDER / "config-transformers-5.json"
    path.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
