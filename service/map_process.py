"""Computes one UMAP, in a process of its own that may be killed: started by service.map.

In: a .npy of unit vectors (n, D) float32 on stdin. Out: a .npy (n, 2) float32 on stdout; or an exit
code other than 0 with the reason as the last line on stderr. The compiler that umap brings with it
is loaded here and nowhere else.
"""

import io
import json
import os
import resource
import sys
import warnings
from typing import Any

import numpy as np
from numpy.typing import NDArray

SEED = 0
NEIGHBOURS = 15  # umap's own default
NICE = 10  # answers to requests come first


def main(arguments: dict[str, Any]) -> None:
    """Read, compute, write."""
    os.nice(NICE)
    memory_bytes = arguments["memory_bytes"]
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    vectors = np.load(io.BytesIO(sys.stdin.buffer.read()), allow_pickle=False)
    answer = io.BytesIO()
    np.save(answer, embedded(vectors), allow_pickle=False)
    sys.stdout.buffer.write(answer.getvalue())


def embedded(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """(n, D) -> (n, 2), the same for the same vectors on the same machine; n >= 5."""
    from umap import UMAP  # takes seconds and starts a compiler: not before the limits are set

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one thread, few neighbours: known and meant
        layout = UMAP(
            n_components=2,
            n_neighbors=min(NEIGHBOURS, len(vectors) - 1),
            metric="cosine",
            init="pca",  # defined for any n, and steadier between versions than a random start
            random_state=SEED,
            n_jobs=1,
        )
        return np.asarray(layout.fit_transform(vectors), np.float32)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
