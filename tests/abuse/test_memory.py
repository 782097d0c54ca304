# SPDX-License-Identifier: Apache-2.0
"""Results that a client tries to write, and memory that it tries to resize: all is refused."""

import ctypes
import fcntl
import mmap
import os
from collections.abc import Callable

import numpy as np
import pytest

from support.anchored import Anchored
from support.lane_peer import Request, by_ref, infer
from support.raw_memory import MIB, checked, input_memory, libc, punch_hole, receive_memory, whole
from thirdrail.v1 import lane_pb2

LARGE = np.arange(1 << 18, dtype=np.float32)  # 1 MiB
MADV_REMOVE = 9  # linux/mman.h


def map_writable(fd: int) -> None:
    mmap.mmap(fd, MIB)


def make_writable(fd: int) -> None:
    with mmap.mmap(fd, MIB, prot=mmap.PROT_READ) as mapping:
        address = np.frombuffer(mapping, np.uint8).ctypes.data
        checked(libc.mprotect(ctypes.c_void_p(address), MIB, mmap.PROT_READ | mmap.PROT_WRITE))


def reopen_and_map(fd: int) -> None:
    again = os.open(f"/proc/self/fd/{fd}", os.O_RDWR)
    try:
        mmap.mmap(again, MIB)
    finally:
        os.close(again)


def remove_pages(fd: int) -> None:
    with mmap.mmap(fd, MIB, prot=mmap.PROT_READ) as mapping:
        address = np.frombuffer(mapping, np.uint8).ctypes.data
        checked(libc.madvise(ctypes.c_void_p(address), MIB, MADV_REMOVE))


def write_through_file(fd: int) -> None:
    with open(f"/proc/self/fd/{fd}", "r+b", buffering=0) as file:
        file.write(b"spoiled")


def splice_into(fd: int) -> None:
    read, write = os.pipe()
    try:
        os.write(write, b"spoiled")
        if os.splice(read, fd, 7, offset_dst=0) == 7:
            return
    finally:
        os.close(read)
        os.close(write)


WRITES: dict[str, Callable[[int], None]] = {
    "map it writable": map_writable,
    "mprotect": make_writable,
    "reopen and map": reopen_and_map,
    "pwrite": lambda fd: checked(os.pwrite(fd, b"spoiled", 0)),
    "write through /proc": write_through_file,
    "splice": splice_into,
    "sendfile": lambda fd: checked(os.copy_file_range(fd, fd, 4096, 8192, 0)),
    "punch a hole": lambda fd: punch_hole(fd, 0, MIB),
    "fallocate": lambda fd: os.posix_fallocate(fd, 0, 2 * MIB),
    "remove pages": remove_pages,
    "truncate": lambda fd: os.ftruncate(fd, 0),
    "truncate by path": lambda fd: os.truncate(f"/proc/self/fd/{fd}", 0),
    "extend": lambda fd: os.ftruncate(fd, 2 * MIB),
    "seal": lambda fd: checked(fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)),
}


@pytest.mark.parametrize("how", WRITES)
def test_results_cannot_be_written(anchored: Anchored, how: str) -> None:
    peer = anchored.attach()
    chunk, fd = input_memory(peer)
    os.pwrite(fd, LARGE.tobytes(), 0)
    os.close(fd)
    peer.send(by_ref(1, whole(chunk), "identity"))
    output, fd = receive_memory(peer)
    assert output.role == lane_pb2.ARENA_ROLE_OUTPUT
    result = peer.receive().infer.outputs[0].ref
    with pytest.raises(OSError, match=r"Operation not permitted|Permission denied|not supported"):
        WRITES[how](fd)
    assert os.fstat(fd).st_size == output.size
    assert os.pread(fd, result.size, result.offset) == LARGE.tobytes()
    os.close(fd)
    assert not peer.answer(infer(2)).status.reason


@pytest.mark.parametrize("alone", [False, True], ids=["shared", "alone"])
@pytest.mark.parametrize("how", ["truncate", "truncate by path", "extend", "fallocate", "seal"])
def test_inputs_cannot_be_resized(anchored: Anchored, how: str, alone: bool) -> None:
    peer = anchored.attach()
    peer.send(Request(grow=lane_pb2.GrowRequest(size=MIB, alone=alone)))
    chunk, fd = receive_memory(peer)
    with pytest.raises(OSError, match=r"Operation not permitted|Device or resource busy"):
        WRITES[how](fd)
    assert os.fstat(fd).st_size == chunk.size
    os.close(fd)
    assert not peer.answer(by_ref(1, whole(chunk), "identity")).status.reason
