"""onnxruntime, loaded so that it reports nothing.

In: nothing. Out: the package. Its wheels report their use to its makers, and keep an id of the
machine in the user's cache, unless told not to before they are loaded.
"""

import os

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import onnxruntime

__all__ = ["onnxruntime"]
