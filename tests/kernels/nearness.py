# SPDX-License-Identifier: Apache-2.0
"""How near is near enough: a difference held against a table of quantiles."""

import jax.numpy as jnp
import numpy as np


def assert_near(name: str, got, exact: np.ndarray, table) -> None:
    """Every (quantile, bound) of `table` holds for |got - exact| over exact's root mean square.

    What rounding the exact result to the dtype of `got` costs is no error: in a gradient of which
    most is zero, the last bit of the largest number is more than the root mean square of all.
    """
    half_a_bit = jnp.finfo(got.dtype).eps / 2
    got = np.asarray(got).astype(np.float64)
    assert got.shape == exact.shape, f"{name}: {got.shape} instead of {exact.shape}"
    assert np.isfinite(got).all(), f"{name}: not finite"
    size = np.sqrt(np.mean(exact**2))
    error = np.maximum(np.abs(got - exact) - float(half_a_bit) * np.abs(exact), 0.0)
    error /= size if size > 0 else 1.0
    for quantile, bound in table:
        found = np.quantile(error, quantile)
        assert found <= bound, f"{name}: quantile {quantile} is {found:.2e}, allowed {bound:.1e}"
