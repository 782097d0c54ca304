# SPDX-License-Identifier: Apache-2.0
"""tritonclient's calls about CUDA shared memory: registration, tensors through it, refusals.

Arguments: the url, and a handle's 64 bytes as hexadecimal digits, of memory that begins with 8
FP32. What makes a GPU's memory (tritonclient.utils.cuda_shared_memory) is not used.
"""

import base64
import sys

import tritonclient.grpc as triton

from foreign.programs.tritonclient_tensors import assert_refused

SIZE = 4096


def check(client: triton.InferenceServerClient, handle: bytes) -> None:
    client.unregister_cuda_shared_memory()
    client.register_cuda_shared_memory("device", base64.b64encode(handle), 0, SIZE)
    (shown,) = client.get_cuda_shared_memory_status(as_json=True)["regions"].values()
    assert (shown["name"], shown["byte_size"]) == ("device", str(SIZE))
    given = triton.InferInput("a", [2, 4], "FP32")
    given.set_shared_memory("device", 32)
    wanted = triton.InferRequestedOutput("c")
    wanted.set_shared_memory("device", 512, 2048)
    result = client.infer("add_one", [given], outputs=[wanted], request_id="r")
    output = result.get_output("c")
    assert (output.datatype, list(output.shape)) == ("FP32", [2, 4])
    assert_refused(
        lambda: client.register_cuda_shared_memory("device", base64.b64encode(handle), 0, SIZE),
        "ALREADY_EXISTS",
        "shared memory region 'device' already in manager",
    )
    client.unregister_cuda_shared_memory("device")
    assert client.get_cuda_shared_memory_status(as_json=True) == {}


if __name__ == "__main__":
    with triton.InferenceServerClient(sys.argv[1]) as client:
        check(client, bytes.fromhex(sys.argv[2]))
    print("passed")
