# SPDX-License-Identifier: Apache-2.0
"""What ONNX Runtime takes once for itself, so that no model is blamed for it: some 10 MiB.

And numpy's random numbers, which models are tried with: 1 MiB, imported when they are asked for.
And our own modules that the first load would import: not for their 50 KiB, but because Python's
table of interned strings doubles as it goes, by 0.5 MiB, with whichever import comes then.
"""

import numpy as np

# y = x for one FP32; written once with onnx.helper, which a worker does not import.
_IDENTITY = (
    b'\x08\x07:7\n\x10\n\x01x\x12\x01y"\x08Identity\x12\x01gZ\x0f\n\x01x\x12\n\n\x08\x08\x01\x12\x04'
    b"\n\x02\x08\x01b\x0f\n\x01y\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01B\x04\n\x00\x10\r"
)


def prime_onnxruntime() -> None:
    """Import it, and run the smallest model there is. Takes what the first load would: 0.2 s."""
    import onnxruntime

    import thirdrail_engines.onnxruntime_engine  # noqa: F401

    session = onnxruntime.InferenceSession(_IDENTITY, providers=["CPUExecutionProvider"])
    session.run(None, {"x": np.ones(1, np.float32)})
    np.random.default_rng(0)
