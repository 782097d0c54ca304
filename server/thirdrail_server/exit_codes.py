# SPDX-License-Identifier: Apache-2.0
"""What a worker's exit status tells the front, and a supervisor of the whole server its log."""

DEVICE_LOST = 86  # a sticky error: only a new process can use the device

MEANINGS = {DEVICE_LOST: "the device was lost"}
