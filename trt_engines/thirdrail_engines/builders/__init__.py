# SPDX-License-Identifier: Apache-2.0
"""Builders: they run in the process of a build alone."""
