# SPDX-License-Identifier: Apache-2.0
"""What several areas of the tests share: small ONNX models, and real servers to call."""
