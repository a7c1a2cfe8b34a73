# SPDX-License-Identifier: Apache-2.0
"""What is wrong with a checkpoint, in at most a dozen lines.

A real model has hundreds of tensors, and what is wrong with one is wrong with all of them. The
likely cause is found in causes.py.
"""

from collections.abc import Iterable, Sequence

MOST_LINES = 12


def listing(title: str, *kinds: Sequence[str], advice: str = "") -> str:
    """A title, problems of each kind, how many more there are, and what to do about them."""
    count, shown = sum(map(len, kinds)), shortened(kinds)
    lines = [f"{title}:", *(f"  {line}" for line in shown)]
    if count > len(shown):
        lines.append(f"  ... and {count - len(shown)} more")
    return "\n".join([*lines, advice] if advice else lines)


def shortened(kinds: Iterable[Sequence[str]], most: int = MOST_LINES) -> list[str]:
    """All, if they are at most that many; else one less, as many of each kind as can be."""
    kinds = [list(kind) for kind in kinds]
    count = sum(map(len, kinds))
    if count <= most:
        return [line for kind in kinds for line in kind]
    room, shares = most - 1, [0] * len(kinds)
    while room:
        for number, kind in enumerate(kinds):
            if room and shares[number] < len(kind):
                shares[number] += 1
                room -= 1
    return [line for kind, share in zip(kinds, shares, strict=True) for line in kind[:share]]


def names(found: Sequence[str]) -> str:
    """Names in one line, at most a dozen."""
    shown = shortened([found])
    more = f" and {len(found) - len(shown)} more" if len(found) > len(shown) else ""
    return ", ".join(shown) + more
