# SPDX-License-Identifier: Apache-2.0
"""What every client of a lane says and expects, whatever it waits with."""

VERSION_MIN = 1
VERSION_MAX = 1
DEBUG_FEATURE = "debug"  # the worker fills released output slots with 0xDB
DEVICE_FEATURE = "device"  # we may ask for memory on the worker's device

ATTACH_PACKET_BYTES_MAX = 1 << 16  # until the worker has told its limit
