# SPDX-License-Identifier: Apache-2.0
"""Measurements: one file per question. `python -m bench --list` says which; README.md has results.

A measurement shows figures and asserts nothing: machines differ, and times are not tests.
"""
