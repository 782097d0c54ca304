# SPDX-License-Identifier: Apache-2.0
"""Tensors on their way from one session to another: the packets, around the books in `exports`.

An exported tensor lies in memory of its own. A chunk that was asked for alone is that already, and
is sealed so that nobody can map it writable any more; a result is copied out of its slot, once.
"""

import asyncio
import os
import time
from collections.abc import Callable, Sequence

from thirdrail import dtypes, tensors
from thirdrail.dtypes import BYTES
from thirdrail.errors import (
    FailedPrecondition,
    InvalidArgument,
    ResourceExhausted,
    ThirdrailError,
)
from thirdrail.lane.memory import whole_pages
from thirdrail.v1 import inference_pb2, lane_pb2, tensor_pb2
from thirdrail_server.worker.chunks import Bytes
from thirdrail_server.worker.export_charges import Copying
from thirdrail_server.worker.export_desk import ExportDesk
from thirdrail_server.worker.export_life import Export, Party, Tensor, Terms
from thirdrail_server.worker.input_arena import InputArena
from thirdrail_server.worker.output_arena import OutputArena
from thirdrail_server.worker.tensor_memory import TensorMemory, copy_of, forbid_writing

# Making and filling memory takes about 0.8 ms per MiB, a hand-over to another thread 0.1 ms.
COPY_ON_LOOP_BYTES_MAX = 128 << 10

EXPORT_KINDS = frozenset({"export_tensor", "import_tensor", "revoke", "drop"})  # of LaneRequest

Send = Callable[[lane_pb2.LaneResponse, Sequence[int]], None]
"""Takes over the file descriptors."""


class SessionExports:
    """What one session exports and imports."""

    def __init__(
        self, desk: ExportDesk, input_arena: InputArena, output_arena: OutputArena, send: Send
    ) -> None:
        self._desk = desk
        self._registry = desk.registry
        self._input = input_arena
        self._output = output_arena
        self._send = send
        self._party = Party(0, 0)
        self._is_closed = False

    def attach(self, number: int, uid: int) -> None:
        self._party = Party(number, uid)

    @property
    def export_count(self) -> int:
        return self._registry.export_count(self._party.session)

    @property
    def import_count(self) -> int:
        return self._registry.import_count(self._party.session)

    @property
    def charged_bytes(self) -> int:
        """Of exports and imports that this session is charged for."""
        return self._registry.charged_bytes(self._party.session)

    @property
    def holds_memory(self) -> bool:
        """Its client has memory mapped that is in the books of exports."""
        return bool(self.charged_bytes or self.import_count)

    def take(self, kind: str, message: lane_pb2.LaneRequest) -> None:
        """A message of one of EXPORT_KINDS."""
        if kind == "export_tensor":
            self._export(message.export_tensor)
        elif kind == "import_tensor":
            self._import(message.import_tensor)
        elif kind == "revoke":
            self._revoke(message.revoke)
        else:
            self._drop(message.drop)

    def view(self, name: str, ref: tensor_pb2.ArenaRef) -> Bytes:
        """The bytes of an imported tensor. Raises FailedPrecondition or InvalidArgument."""
        return self._registry.view(self._party.session, name, ref)

    # Exporting

    def _export(self, request: lane_pb2.ExportRequest) -> None:
        """Answer with a token, or with why not; after a large copy later than at once."""
        try:
            tensor, epoch = _tensor_of(request), request.ref.epoch
            if epoch == self._input.epoch:
                export = self._offer_chunk(request, tensor)
            elif epoch == self._output.epoch:
                return self._copy_slot(request, tensor)
            else:
                export = self._offer_import(request, tensor)
        except ThirdrailError as error:
            return self._refuse(request, error)
        self._answer(request, export, copies=0)

    def _offer_chunk(self, request: lane_pb2.ExportRequest, tensor: Tensor) -> Export:
        memory = self._input.alone(request.ref)
        if not forbid_writing(memory):
            raise FailedPrecondition(
                f"chunk {request.ref.chunk} cannot be sealed: its client has forbidden that "
                "(F_SEAL_SEAL)"
            )
        export = self._offer(memory, tensor, request, is_kept=True)
        self._input.on_exported(request.ref.chunk)
        return export

    def _offer_import(self, request: lane_pb2.ExportRequest, tensor: Tensor) -> Export:
        ref = request.ref
        if ref.chunk or ref.offset:
            raise InvalidArgument("an imported tensor is handed on whole, from its first byte")
        return self._registry.offer_again(
            self._party, ref.epoch, tensor, _terms_of(request), time.monotonic_ns()
        )

    def _offer(
        self,
        memory: TensorMemory,
        tensor: Tensor,
        request: lane_pb2.ExportRequest,
        *,
        is_kept: bool = False,
    ) -> Export:
        now_ns, terms = time.monotonic_ns(), _terms_of(request)
        return self._registry.offer(self._party, memory, tensor, terms, now_ns, is_kept=is_kept)

    def _copy_slot(self, request: lane_pb2.ExportRequest, tensor: Tensor) -> None:
        source = self._output.view("to be exported", request.ref)
        copying = self._registry.begin_copy(self._party.session, whole_pages(tensor.size))
        loop = asyncio.get_running_loop()
        if tensor.size > COPY_ON_LOOP_BYTES_MAX:
            made = loop.run_in_executor(None, copy_of, source)
        else:
            made = loop.create_future()
            try:
                made.set_result(copy_of(source))
            except OSError as error:
                made.set_exception(error)
        made.add_done_callback(lambda done: self._on_copied(done, copying, request, tensor))

    def _on_copied(
        self,
        made: "asyncio.Future[TensorMemory]",
        copying: Copying,
        request: lane_pb2.ExportRequest,
        tensor: Tensor,
    ) -> None:
        self._registry.end_copy(copying)
        try:
            memory = made.result()
        except OSError as error:
            text = f"no memory for a tensor of {tensor.size} bytes: {error}"
            return self._refuse(request, ResourceExhausted(text))
        if self._is_closed:
            return self._desk.dispose(memory)
        try:
            export = self._offer(memory, tensor, request)
        except ThirdrailError as error:
            self._desk.dispose(memory)
            return self._refuse(request, error)
        self._answer(request, export, copies=1)

    def _answer(self, request: lane_pb2.ExportRequest, export: Export, *, copies: int) -> None:
        self._desk.watch_offers()
        exported = lane_pb2.Exported(
            request=request.request, token=export.token, export_id=export.number, copies=copies
        )
        self._send(lane_pb2.LaneResponse(exported=exported), ())

    def _refuse(self, request: lane_pb2.ExportRequest, error: ThirdrailError) -> None:
        exported = lane_pb2.Exported(request=request.request, status=_status_of(error))
        self._send(lane_pb2.LaneResponse(exported=exported), ())

    def _revoke(self, request: lane_pb2.RevokeRequest) -> None:
        """Take an export back, and say so when it is done."""
        self._desk.revoke(self._party.session, request.export_id)
        revoked = lane_pb2.Revoked(request=request.request)
        self._send(lane_pb2.LaneResponse(revoked=revoked), ())

    # Importing

    def _import(self, request: lane_pb2.ImportRequest) -> None:
        """Answer with the memory that a token is good for, or with why not."""
        imported = lane_pb2.Imported(request=request.request)
        try:
            export = self._registry.take(self._party, request.token, time.monotonic_ns())
            fd = self._descriptor_of(export)
        except ThirdrailError as error:
            imported.status.CopyFrom(_status_of(error))
            return self._send(lane_pb2.LaneResponse(imported=imported), ())
        imported.epoch = export.epoch
        imported.size, imported.chunk_size = export.tensor.size, len(export.memory)
        imported.data_type = tensor_pb2.DataType.ValueType(export.tensor.data_type)
        imported.shape.extend(export.tensor.shape)
        self._send(lane_pb2.LaneResponse(imported=imported), [fd])

    def _descriptor_of(self, export: Export) -> int:
        try:
            return os.dup(export.memory.fd)
        except OSError as error:
            self._registry.release(self._party.session, export.epoch)
            raise ResourceExhausted(f"no file descriptor for the tensor: {error}") from None

    def _drop(self, request: lane_pb2.DropRequest) -> None:
        """The client gives an imported tensor back, or a chunk that it had asked for alone."""
        if request.epoch != self._input.epoch:
            return self._registry.release(self._party.session, request.epoch)
        memory = self._input.drop(request.chunk)
        if memory is not None and not self._registry.drop_kept(memory):
            self._desk.dispose(memory)

    # Ending

    def close(self) -> None:
        """The session takes nothing new."""
        self._is_closed = True
        self._registry.end_offers(self._party.session)

    def free(self) -> None:
        """Its client has let go of its memory."""
        if self._party.session:
            self._registry.end(self._party.session)


def _tensor_of(request: lane_pb2.ExportRequest) -> Tensor:
    """Raises InvalidArgument where type, shape and size do not fit each other."""
    dtype = dtypes.dtype_of_value(request.data_type)
    if dtype is BYTES:
        raise InvalidArgument("a tensor of BYTES cannot be exported: its elements vary in size")
    shape = tuple(request.shape)
    needed = tensors.element_count("to be exported", shape) * dtype.itemsize
    if request.ref.size != needed:
        raise InvalidArgument(
            f"a tensor of type {dtype.name} and shape {list(shape)} has {needed} bytes, the "
            f"reference names {request.ref.size}"
        )
    return Tensor(needed, request.data_type, shape)


def _terms_of(request: lane_pb2.ExportRequest) -> Terms:
    return Terms(request.uid if request.HasField("uid") else None, request.lifetime_ms)


def _status_of(error: ThirdrailError) -> inference_pb2.Status:
    return inference_pb2.Status(reason=error.reason, message=error.message)
