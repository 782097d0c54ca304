# SPDX-License-Identifier: Apache-2.0
"""Thirdrail's client: call models on this host over gRPC."""

from thirdrail._version import __version__

__all__ = ["__version__"]
