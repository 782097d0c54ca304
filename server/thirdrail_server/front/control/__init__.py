# SPDX-License-Identifier: Apache-2.0
"""The control plane of the front: workers' lives, the catalog, loading, health, figures."""
