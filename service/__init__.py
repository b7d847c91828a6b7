"""The HTTP service: answers embeddings, neighbours and propagated groups from an exported bundle.

In: a bundle (what trainer exports) and a state directory. Out: the routes of openapi.json.
`python -m service.run --bundle DIR --state DIR` starts it; README.md is the operator's chapter.
"""

import os

# onnxruntime reports its use to its makers and keeps an id of the machine, unless told
# not to before it is loaded.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
