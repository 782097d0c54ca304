# SPDX-License-Identifier: Apache-2.0
"""KServe v2 with Triton's extensions: pure translations, and the servicer that calls them."""
