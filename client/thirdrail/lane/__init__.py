# SPDX-License-Identifier: Apache-2.0
"""The lane: calls and tensors between co-located processes, past gRPC.

`allocator` decides where in an arena a tensor goes, `memory` makes and maps the memory, `packets`
moves messages and file descriptors over the socket, `aio` is the client's end on asyncio.
"""
