# SPDX-License-Identifier: Apache-2.0
"""Device memory that a server and its clients share: what both ends have to agree on, and a
client's end of it. Nothing of CUDA is loaded before a device is asked for."""
