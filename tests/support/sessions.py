# SPDX-License-Identifier: Apache-2.0
"""What one lane session brings to the worker's own code: its memory, and requests that use it.

Nothing is mapped here: the only mapping of a chunk is the worker's, so that an address found in
`/proc/self/maps` is the one that an engine would see.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from thirdrail import dtypes
from thirdrail.lane.allocator import ALIGNMENT_BYTES
from thirdrail.tensors import Array, array_of_bytes, bytes_of_array, values_of_array
from thirdrail.v1 import inference_pb2 as pb
from thirdrail.v1 import tensor_pb2
from thirdrail_server.worker.input_arena import InputArena
from thirdrail_server.worker.members import Member, Outcome
from thirdrail_server.worker.output_arena import OutputArena
from thirdrail_server.worker.requests import read_request
from thirdrail_server.worker.version_spec import VersionSpec

Form = Literal["ref", "raw", "values"]

INPUT_BYTES_MAX = 32 << 20
OUTPUT_BYTES_MAX = 32 << 20


@dataclass(slots=True)
class Session:
    """A caller with an input chunk, which it writes, and an output arena, which it reads."""

    output: OutputArena = field(default_factory=lambda: OutputArena(OUTPUT_BYTES_MAX))
    inline_bytes_max: int = 1024
    input: InputArena = field(default_factory=lambda: InputArena(INPUT_BYTES_MAX))
    _input_fd: int = -1
    _input_end: int = 0
    _output_fds: dict[int, int] = field(default_factory=dict)

    def close(self) -> None:
        for fd in (*self._output_fds.values(), *([self._input_fd] if self._input_fd >= 0 else [])):
            os.close(fd)
        for chunk in self.output.take_new_chunks():
            chunk.close()
        self.input.close()
        self.output.close()

    # Inputs

    @property
    def input_fd(self) -> int:
        if self._input_fd < 0:
            self._input_fd = self.input.grow(INPUT_BYTES_MAX // 2).fd
        return self._input_fd

    def place(self, array: Array) -> tensor_pb2.ArenaRef:
        """Write an array's wire form behind what is there already."""
        data = bytes(bytes_of_array(array))
        offset = self._input_end
        os.pwrite(self.input_fd, data, offset)
        self._input_end = -(-(offset + len(data)) // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        return tensor_pb2.ArenaRef(epoch=self.input.epoch, offset=offset, size=len(data))

    def message(
        self,
        inputs: Mapping[str, Array],
        *,
        form: Form = "raw",
        outputs: Sequence[pb.RequestedOutput] = (),
        call: int = 1,
    ) -> pb.InferRequest:
        message = pb.InferRequest(call=call, outputs=outputs)
        for name, array in inputs.items():
            dtype = dtypes.dtype_of_array(array)
            tensor = message.inputs.add(name=name, data_type=dtype.value, shape=array.shape)
            if form == "ref":
                tensor.ref.CopyFrom(self.place(array))
            elif form == "raw":
                tensor.raw = bytes(bytes_of_array(array))
            else:
                tensor.values.CopyFrom(values_of_array(array))
        return message

    def member(
        self,
        spec: VersionSpec,
        inputs: Mapping[str, Array],
        *,
        form: Form = "raw",
        outputs: Sequence[pb.RequestedOutput] = (),
    ) -> Member:
        """A checked request of this session."""
        message = self.message(inputs, form=form, outputs=outputs)
        return self.member_of(spec, message)

    def member_of(self, spec: VersionSpec, message: pb.InferRequest) -> Member:
        return Member(
            read_request(message, spec, self.input.view), self.output, self.inline_bytes_max
        )

    def input_address(self, ref: tensor_pb2.ArenaRef) -> int:
        """Where the worker has the memory that an input reference names."""
        return mapped_at(self.input_fd) + ref.offset

    # Outputs

    def arrays(self, outcome: Outcome) -> dict[str, Array]:
        """What the outputs hold, from wherever they lie. Raises the outcome's error."""
        if outcome.error is not None:
            raise outcome.error
        return {tensor.name: self.array(tensor) for tensor in outcome.outputs}

    def array(self, tensor: tensor_pb2.Tensor) -> Array:
        dtype = dtypes.dtype_of_value(tensor.data_type)
        if tensor.HasField("values"):
            field_ = next(value for _, value in tensor.values.ListFields())
            return np.array(field_, dtype.numpy).reshape(tuple(tensor.shape))
        if not tensor.HasField("ref"):
            return array_of_bytes(tensor.name, dtype, tensor.shape, tensor.raw)
        ref = tensor.ref
        data = os.pread(self._output_fd(ref.chunk), ref.size, ref.offset)
        return array_of_bytes(tensor.name, dtype, tensor.shape, data)

    def release(self, outcome: Outcome) -> None:
        """As a client does that has read the outputs."""
        for tensor in outcome.outputs:
            if tensor.HasField("ref"):
                self.output.release(tensor.ref.epoch, tensor.ref.slot, tensor.ref.generation)

    def output_address(self, ref: tensor_pb2.ArenaRef) -> int:
        """Where the worker has the memory of a slot."""
        return mapped_at(self._output_fd(ref.chunk)) + ref.offset

    def _output_fd(self, chunk: int) -> int:
        for new in self.output.take_new_chunks():
            self._output_fds[new.message.chunk] = new.fd
        return self._output_fds[chunk]


def mapped_at(fd: int) -> int:
    """The address of this process's one mapping of a memfd."""
    inode = str(os.fstat(fd).st_ino)  # as a file on a disk may have it, too
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    (only,) = [line for line in lines if line[4] == inode and line[5].startswith("/memfd:")]
    return int(only[0].partition("-")[0], 16)
