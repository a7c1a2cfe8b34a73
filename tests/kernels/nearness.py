# SPDX-License-Identifier: Apache-2.0
"""How near is near enough: a difference held against a table of quantiles."""

import jax.numpy as jnp
import numpy as np


def assert_near(name: str, got, exact: np.ndarray, table) -> None:
    """Every (quantile, bound) of `table` holds for |got - exact| over exact's root mean square.

    That is the root mean square of what is not zero: an expert that nobody chose makes the others'
    gradients no smaller. What rounding the exact result to the dtype of `got` costs is no error.
    """
    half_a_bit = jnp.finfo(got.dtype).eps / 2
    got = np.asarray(got).astype(np.float64)
    assert got.shape == exact.shape, f"{name}: {got.shape} instead of {exact.shape}"
    assert np.isfinite(got).all(), f"{name}: not finite"
    size = np.sqrt(np.sum(exact**2) / max(np.count_nonzero(exact), 1))
    error = np.maximum(np.abs(got - exact) - float(half_a_bit) * np.abs(exact), 0.0)
    error /= size if size > 0 else 1.0
    for quantile, bound in table:
        found = np.quantile(error, quantile)
        assert found <= bound, f"{name}: quantile {quantile} is {found:.2e}, allowed {bound:.1e}"
