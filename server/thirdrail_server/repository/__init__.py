# SPDX-License-Identifier: Apache-2.0
"""The model repository: folders and config.pbtxt files in, checked configurations out."""
