"""ONNX Runtime, that tells nobody: whoever needs it takes it from here, never by its own name.

Its official builds tell their maker of each process that uses it, and keep an identity of the machine in the user's
folder, unless it is told not to before it is first imported. ``ORT_DISABLE_TELEMETRY=0`` in the environment lets it.
"""

from __future__ import annotations

import os

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import onnxruntime

if os.environ["ORT_DISABLE_TELEMETRY"] != "0":  # where somebody imported it before, this is what is left to say
    onnxruntime.disable_telemetry_events()

__all__ = ["onnxruntime"]
