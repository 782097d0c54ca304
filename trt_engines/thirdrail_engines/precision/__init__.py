# SPDX-License-Identifier: Apache-2.0
"""The precision that a graph computes in is part of the graph: here it is changed, and measured.

Builders for strongly typed networks take types as they find them, so nothing else would do.
"""

from thirdrail_engines.precision.conversion import Conversion, convert

__all__ = ["Conversion", "convert"]
