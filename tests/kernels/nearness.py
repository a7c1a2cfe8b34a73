# SPDX-License-Identifier: Apache-2.0
"""How near is near enough: a difference held against a table of quantiles."""

import numpy as np


def assert_near(name: str, got, exact: np.ndarray, table) -> None:
    """Every (quantile, bound) of `table` holds for |got - exact| over exact's root mean square."""
    got = np.asarray(got).astype(np.float64)
    assert got.shape == exact.shape, f"{name}: {got.shape} instead of {exact.shape}"
    assert np.isfinite(got).all(), f"{name}: not finite"
    size = np.sqrt(np.mean(exact**2))
    error = np.abs(got - exact) / (size if size > 0 else 1.0)
    for quantile, bound in table:
        found = np.quantile(error, quantile)
        assert found <= bound, f"{name}: quantile {quantile} is {found:.2e}, allowed {bound:.1e}"
