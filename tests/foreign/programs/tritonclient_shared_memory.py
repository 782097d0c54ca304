# SPDX-License-Identifier: Apache-2.0
"""tritonclient's shared-memory regions: tensors through them, their status, and refusals."""

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import tritonclient.grpc as triton
import tritonclient.utils.shared_memory as shm
from tritonclient.utils import np_to_triton_dtype, serialize_byte_tensor

from foreign.programs.checks import main
from foreign.programs.tritonclient_tensors import assert_refused

MIB = 1 << 20
ROWS = np.arange(8, dtype=np.float32).reshape(2, 4)


@contextlib.contextmanager
def region(client: triton.InferenceServerClient, name: str, size: int) -> Iterator[Any]:
    """A region that is registered under its own name. Yields tritonclient's handle."""
    handle = shm.create_shared_memory_region(name, f"/tr_{name}", size)
    try:
        client.register_system_shared_memory(name, f"/tr_{name}", size)
        yield handle
    finally:
        client.unregister_system_shared_memory(name)
        shm.destroy_shared_memory_region(handle)


def placed(name: str, array: Any, where: str, size: int, offset: int = 0) -> triton.InferInput:
    made = triton.InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype))
    made.set_shared_memory(where, size, offset)
    return made


def wanted(name: str, where: str, size: int, offset: int = 0) -> triton.InferRequestedOutput:
    made = triton.InferRequestedOutput(name)
    made.set_shared_memory(where, size, offset)
    return made


def check_inputs_and_outputs_through_regions(url: str) -> None:
    with (
        triton.InferenceServerClient(url) as client,
        region(client, "given", 2 * ROWS.nbytes) as given,
        region(client, "found", 1024) as found,
    ):
        shm.set_shared_memory_region(given, [ROWS, ROWS * 10])
        inputs = [
            placed("a", ROWS, "given", ROWS.nbytes),
            placed("b", ROWS, "given", ROWS.nbytes, ROWS.nbytes),
        ]
        outputs = [wanted("c", "found", 512, 256)]
        result = client.infer("add", inputs, outputs=outputs, request_id="r")
        output = result.get_output("c")
        assert (output.datatype, list(output.shape)) == ("FP32", [2, 4])
        assert not output.parameters
        read = shm.get_contents_as_numpy(found, np.float32, list(output.shape), offset=256)
        assert np.array_equal(read, ROWS * 11), read
        assert list(result.get_response().raw_output_contents) == [b""]


def check_some_inputs_in_the_request(url: str) -> None:
    with (
        triton.InferenceServerClient(url) as client,
        region(client, "given", ROWS.nbytes) as given,
    ):
        shm.set_shared_memory_region(given, [ROWS])
        sent = triton.InferInput("b", [2, 4], "FP32")
        sent.set_data_from_numpy(ROWS)
        inputs = [placed("a", ROWS, "given", ROWS.nbytes), sent]
        assert np.array_equal(client.infer("add", inputs).as_numpy("c"), ROWS * 2)


def check_texts_through_regions(url: str) -> None:
    texts = np.array([b"", b"a\0b", "Straße".encode(), b"x" * 70_000], np.object_)
    serialized = serialize_byte_tensor(texts)
    size = len(serialized.item())
    with (
        triton.InferenceServerClient(url) as client,
        region(client, "given", size) as given,
        region(client, "found", size) as found,
    ):
        shm.set_shared_memory_region(given, [serialized])
        inputs, outputs = [placed("x", texts, "given", size)], [wanted("y", "found", size)]
        client.infer("identity_bytes", inputs, outputs=outputs)
        read = shm.get_contents_as_numpy(found, np.object_, [len(texts)])
        assert list(read) == list(texts)


def check_a_large_tensor(url: str) -> None:
    array = np.arange(4 * MIB, dtype=np.float32)
    with (
        triton.InferenceServerClient(url) as client,
        region(client, "given", array.nbytes) as given,
        region(client, "found", array.nbytes) as found,
    ):
        shm.set_shared_memory_region(given, [array])
        inputs = [placed("x", array, "given", array.nbytes)]
        outputs = [wanted("y", "found", array.nbytes)]
        for _ in range(3):
            client.infer("identity_fp32", inputs, outputs=outputs)
        read = shm.get_contents_as_numpy(found, np.float32, list(array.shape))
        assert np.array_equal(read, array)


def check_another_client_sees_and_unregisters_regions(url: str) -> None:
    with (
        triton.InferenceServerClient(url) as client,
        triton.InferenceServerClient(url) as other,
        region(client, "one", 64),
        region(client, "two", 128),
    ):
        shown = other.get_system_shared_memory_status(as_json=True)["regions"]
        assert shown == {
            "one": {"name": "one", "key": "/tr_one", "byte_size": "64"},
            "two": {"name": "two", "key": "/tr_two", "byte_size": "128"},
        }, shown
        other.unregister_system_shared_memory("one")
        assert list(client.get_system_shared_memory_status().regions) == ["two"]
        other.unregister_system_shared_memory()
        assert not client.get_system_shared_memory_status().regions


def check_refusals(url: str) -> None:
    with triton.InferenceServerClient(url) as client, region(client, "small", 64):
        key = "/tr_small"
        register = client.register_system_shared_memory
        assert_refused(
            lambda: register("small", key, 64),
            "ALREADY_EXISTS",
            "shared memory region 'small' already in manager",
        )
        assert_refused(
            lambda: register("large", key, 1 << 40),
            "INVALID_ARGUMENT",
            "failed to register shared memory region 'large': invalid args",
        )
        assert_refused(
            lambda: register("missing", "/tr_missing", 64),
            "INTERNAL",
            "Unable to open shared memory region: '/tr_missing'",
        )
        for output, status, text in (
            (wanted("c", "unknown", 64), "NOT_FOUND", "Unable to find shared memory region"),
            (wanted("c", "small", 64, 64), "INVALID_ARGUMENT", "Invalid offset for shared memory"),
            (wanted("c", "small", 64, 60), "INVALID_ARGUMENT", "Invalid offset + byte size for"),
            (wanted("c", "small", 8), "INTERNAL", "should be at least 16 bytes to hold the"),
        ):
            given = [placed("a", ROWS[:1], "small", 16)]

            def call(given: Any = given, output: Any = output) -> Any:
                return client.infer("plus_one", given, outputs=[output])

            assert_refused(call, status, text)


def check_cuda_is_that_of_a_host_without_a_gpu(url: str) -> None:
    with triton.InferenceServerClient(url) as client:
        client.unregister_cuda_shared_memory()
        assert not client.get_cuda_shared_memory_status().regions


def check_streams(url: str) -> None:
    results: list[Any] = []
    with (
        triton.InferenceServerClient(url) as client,
        region(client, "given", ROWS.nbytes) as given,
        region(client, "found", ROWS.nbytes) as found,
    ):
        shm.set_shared_memory_region(given, [ROWS])
        client.start_stream(lambda result, error: results.append((result, error)))
        client.async_stream_infer(
            "plus_one",
            [placed("a", ROWS, "given", ROWS.nbytes)],
            outputs=[wanted("c", "found", ROWS.nbytes)],
        )
        client.stop_stream()
        [(result, error)] = results
        assert error is None, error
        assert list(result.get_output("c").shape) == [2, 4]
        read = shm.get_contents_as_numpy(found, np.float32, [2, 4])
        assert np.array_equal(read, ROWS + 1)


if __name__ == "__main__":
    main(globals())
