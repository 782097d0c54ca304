# SPDX-License-Identifier: Apache-2.0
"""The options of `thirdrail serve`, one module for each panel of its help."""
