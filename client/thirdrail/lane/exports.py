# SPDX-License-Identifier: Apache-2.0
"""Tensors handed from one process to another, as far as no socket is involved: the text of a token,
what can be exported from where it lies, and what an importer holds.
"""

import base64
import binascii
import math
import mmap
from types import TracebackType
from typing import Any, NoReturn, Protocol, Self

import numpy as np

from thirdrail.arrays import UNREADABLE, array_of_array, has_dtype
from thirdrail.dtypes import BYTES, dtype_of_array, dtype_of_value
from thirdrail.errors import FailedPrecondition, Internal, InvalidArgument, ThirdrailError
from thirdrail.lane.memory import map_chunk
from thirdrail.lane.packets import close_all, sole_fd
from thirdrail.lane.places import Place, Role
from thirdrail.lane.session_memory import SessionMemory
from thirdrail.tensors import Array, array_of_bytes
from thirdrail.v1 import lane_pb2

ANSWER_S_MAX = 30.0  # of the worker, for an export or an import
TEXT_PREFIX = "tr1_"  # the first form of the text
TOKEN_BYTES = 16
_LIFETIME_MS_MAX = 2**32 - 1
_UID_MAX = 2**32 - 2


def text_of_token(token: bytes) -> str:
    """Letters, digits, "-" and "_", for a message, a header or a URL."""
    return TEXT_PREFIX + base64.urlsafe_b64encode(token).decode().rstrip("=")


def token_of_text(text: str) -> bytes:
    """Raises InvalidArgument for anything but the text of a token; it does not repeat the text,
    which lets whoever reads it take the tensor.
    """
    encoded = text.removeprefix(TEXT_PREFIX) if isinstance(text, str) else ""
    try:
        token = base64.b64decode(encoded + "==", altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        token = b""
    if encoded == text or len(token) != TOKEN_BYTES:
        length = f"{len(text)} characters" if isinstance(text, str) else type(text).__name__
        raise InvalidArgument(
            f"not the token of an export: expected '{TEXT_PREFIX}' and 22 characters, as in "
            f"`Export.token`, got {length}"
        )
    return token


def array_to_export(value: Any) -> Array:
    """The array that `value` is. Raises InvalidArgument for what cannot be shared."""
    if not has_dtype(value):
        raise InvalidArgument(f"only arrays can be exported, got {type(value).__name__}")
    try:
        array = value if isinstance(value, np.ndarray) else array_of_array(value)
    except UNREADABLE as error:
        raise InvalidArgument(f"cannot export {type(value).__name__}: {error}") from error
    if dtype_of_array(array) is BYTES:
        raise InvalidArgument("strings cannot be exported: their elements vary in size")
    return array


def place_to_export(memory: SessionMemory, array: Array) -> tuple[Place, int] | None:
    """Where the worker can export the array from, and its offset there; None: copy it first.

    Guard it by the lane's lock.
    """
    if not (array.flags.c_contiguous and array.dtype.isnative):
        return None
    found = memory.find(array)
    if found is None:
        return None
    place, offset = found
    if place.role is Role.OUTPUT:  # the worker copies it out of its slot, so that a part will do
        return found
    if place.role is Role.INPUT or offset:  # others lie in its chunk; it is not the whole
        return None
    return found if array.nbytes == place.size else None


def copy_into(place: Place, array: Array) -> None:
    """To the start of the place, without holding up other threads."""
    native = array.dtype.newbyteorder("=")
    np.copyto(place.memory[: array.nbytes].view(native).reshape(array.shape), array)


def export_request(
    place: Place, offset: int, array: Array, uid: int | None, lifetime: float
) -> lane_pb2.LaneRequest:
    """lifetime: seconds. Raises InvalidArgument for one that is not above 0, and for no uid."""
    if not (lifetime > 0 and math.isfinite(lifetime)):
        raise InvalidArgument(f"lifetime must be a number of seconds above 0, got {lifetime}")
    if uid is not None and not 0 <= uid <= _UID_MAX:
        raise InvalidArgument(f"uid must be a user id from 0 to {_UID_MAX}, got {uid}")
    request = lane_pb2.ExportRequest(
        ref=place.ref(offset, array.nbytes),
        data_type=dtype_of_array(array).value,
        shape=array.shape,
        uid=uid,
        lifetime_ms=min(max(1, round(lifetime * 1000)), _LIFETIME_MS_MAX),
    )
    return lane_pb2.LaneRequest(export_tensor=request)


def forbid_writing(value: Any, place: Place) -> None:
    """The exporter's own array is read-only from now on, where it is one that we can tell so."""
    if place.role is Role.ALONE and isinstance(value, np.ndarray):
        value.flags.writeable = False


def session_has_ended(reason: str) -> str:
    """Why something cannot be revoked any more."""
    return (
        "the session that exported this tensor has ended, and with it the offer; who had received "
        f"the tensor keeps it: {reason}"
    )


class Session(Protocol):
    """What an importer's tensor needs of the session that it came by."""

    def is_revoked(self, epoch: int) -> bool: ...

    def give_back(self, place: Place) -> None: ...


class SharedTensor:
    """A tensor of another process, in memory that both have mapped; read-only.

    It is an input of `infer` as it is, without a copy, and so are its `array` and views of that.
    Its memory is given back by `release`, at the end of a `with` block, or with its last view.
    After a revoke every use fails with FailedPrecondition; views that were taken before stay
    readable, but the server reads them where they lie no more: they are inputs only if copied.
    """

    def __init__(self, place: Place, array: Array, session: Session) -> None:
        self._epoch = place.epoch
        self._held: tuple[Place, Array] | None = (place, array)  # None: released
        self._session = session
        self.shape: tuple[int, ...] = array.shape
        self.dtype: np.dtype[Any] = array.dtype
        self.nbytes = array.nbytes

    @property
    def array(self) -> Array:
        """A read-only view, without a copy. Raises FailedPrecondition after a revoke, or after
        `release`."""
        if self._held is None:
            raise FailedPrecondition("this shared tensor was released")
        if self.is_revoked:
            raise FailedPrecondition("this shared tensor was revoked by the one who exported it")
        return self._held[1]

    @property
    def is_revoked(self) -> bool:
        return self._session.is_revoked(self._epoch)

    def release(self) -> None:
        """Give the memory back; views that somebody has stay readable. May be called twice."""
        if self._held is not None:
            (place, _), self._held = self._held, None
            self._session.give_back(place)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        array = self.array
        if dtype is not None and np.dtype(dtype) != array.dtype:
            if copy is False:
                raise ValueError(f"a shared tensor of {array.dtype} is no {dtype} without a copy")
            return array.astype(dtype)
        return array.copy() if copy else array

    def __dlpack__(self, **options: Any) -> Any:
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.array.__dlpack_device__()

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "a shared tensor cannot be pickled: send the token of `client.export(tensor)`, or "
            "pickle its `array`, which copies it"
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()

    def __repr__(self) -> str:
        state = "released" if self._held is None else "revoked" if self.is_revoked else "held"
        return f"<SharedTensor {self.dtype} {list(self.shape)} {state}>"


def show_imported(
    memory: SessionMemory, imported: lane_pb2.Imported, fds: list[int], session: Session
) -> SharedTensor:
    """Map what came, and show it as a tensor. Guard it by the lane's lock. Takes over `fds`.

    Raises Internal where it makes no sense, and InvalidArgument for BF16 without ml_dtypes, after
    noting that it goes back.
    """
    try:
        mapping = _mapped(fds, imported)
        place = Place(
            Role.IMPORTED,
            np.frombuffer(mapping, np.uint8)[: imported.size],
            imported.epoch,
            chunk=0,
            offset=0,
            size=imported.size,
        )
        dtype = dtype_of_value(imported.data_type)
        array_of_bytes("imported", dtype, imported.shape, place.memory.data)  # does it fit?
    except ThirdrailError:
        memory.drops.append((imported.epoch, 0))
        raise
    assert dtype.numpy is not None
    shown = memory.shown.show(place, writable=False)
    array: Array = shown.view(dtype.numpy).reshape(tuple(imported.shape))
    return SharedTensor(place, array, session)


def _mapped(fds: list[int], imported: lane_pb2.Imported) -> mmap.mmap:
    if imported.size > imported.chunk_size:
        close_all(fds)
        raise Internal("the worker sent no memory that the tensor fits")
    try:
        return map_chunk(sole_fd(fds), imported.chunk_size, writable=False)
    except (ValueError, OSError) as error:
        raise Internal(f"the worker sent memory that cannot be used: {error}") from None
