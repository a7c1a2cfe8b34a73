# SPDX-License-Identifier: Apache-2.0
"""The axis letters: one meaning each, everywhere (types, einsum strings, comments, tables).

B  batch rows              D  model width            E  experts
T  new tokens (queries)    V  vocabulary             A  active experts per token
S  key positions           N  query heads = K * G    F  expert hidden width
W  sliding window          K  key/value heads        C  MXFP4 blocks along the packed axis
L  layers                  G  query heads per kv head   (32 values in 16 bytes each)
                           H  head width             M  routed rows = B * T * A

The real sizes coincide (N = H, K = G, D = F), so tests use sizes that are pairwise different.
Named aliases below are for shapes that several files share.
"""

import jax
import numpy as np
from jaxtyping import Float, Int

Array = jax.Array

# What callers make, which NumPy may hold as well.
Tokens = Int[Array | np.ndarray, "B T"]
Positions = Int[Array | np.ndarray, "B T"]  # -1 marks padding: never seen, never cached
Segments = Int[Array | np.ndarray, "B T"]  # tokens of one document, in a row of several
Hidden = Float[Array, "B T D"]
Logits = Float[Array, "B T V"]
