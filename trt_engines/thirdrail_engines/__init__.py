# SPDX-License-Identifier: Apache-2.0
"""Engines: a model file becomes something that runs."""
