# SPDX-License-Identifier: Apache-2.0
"""tritonclient: the statuses and texts of calls that fail, and that the server serves on."""

from collections.abc import Callable
from typing import Any

import numpy as np
import tritonclient.grpc as triton

from foreign.programs.checks import main
from foreign.programs.tritonclient_tensors import assert_refused, inputs, ones, turns

LONG = 100_000  # turns: a second or more
Call = Callable[[triton.InferenceServerClient], Any]


def _refused(url: str, call: Call, status: str, *texts: str) -> None:
    with triton.InferenceServerClient(url) as client:
        assert_refused(lambda: call(client), status, *texts)
        assert client.infer("plus_one", ones()).as_numpy("c") is not None


def _invalid(url: str, model: str, given: list[triton.InferInput], *texts: str) -> None:
    _refused(url, lambda client: client.infer(model, given), "INVALID_ARGUMENT", *texts)


def check_unknown_model(url: str) -> None:
    text = "Request for unknown model: 'unheard_of' is not found"
    _refused(url, lambda client: client.infer("unheard_of", ones()), "NOT_FOUND", text)
    _refused(url, lambda client: client.get_model_metadata("unheard_of"), "NOT_FOUND", text)
    _refused(url, lambda client: client.get_model_config("unheard_of"), "NOT_FOUND", text)


def check_unknown_version(url: str) -> None:
    _refused(
        url,
        lambda client: client.infer("plus_one", ones(), model_version="9"),
        "NOT_FOUND",
        "version 9 is not found",
    )
    _refused(
        url,
        lambda client: client.infer("plus_one", ones(), model_version="one"),
        "INVALID_ARGUMENT",
        "failed to get model version from specified version string 'one'",
        "version should be an integral value > 0",
    )


def check_missing_input(url: str) -> None:
    given = inputs(a=np.ones((1, 4), np.float32))
    _invalid(url, "add", given, "expected 2 inputs but got 1 inputs for model 'add'", "'b'")


def check_unexpected_input(url: str) -> None:
    given = inputs(z=np.ones((1, 4), np.float32))
    _invalid(url, "plus_one", given, "Got input(s) ['z']", "missing required input(s) ['a']")


def check_unexpected_output(url: str) -> None:
    wanted = [triton.InferRequestedOutput("d")]
    _refused(
        url,
        lambda client: client.infer("plus_one", ones(), outputs=wanted),
        "INVALID_ARGUMENT",
        "unexpected inference output 'd' for model 'plus_one'",
    )


def check_wrong_data_type(url: str) -> None:
    text = "inference input 'a' data-type is 'INT32', but model 'plus_one' expects 'FP32'"
    _invalid(url, "plus_one", inputs(a=np.ones((1, 4), np.int32)), text)


def check_wrong_shape(url: str) -> None:
    text = "unexpected shape for input 'a' for model 'plus_one'. Expected [-1,4], got [1,5]"
    _invalid(url, "plus_one", inputs(a=np.ones((1, 5), np.float32)), text)


def check_batch_too_large(url: str) -> None:
    rows = np.ones((9, 4), np.float32)
    text = "inference request batch-size must be <= 8 for 'add'"
    _invalid(url, "add", inputs(a=rows, b=rows), text)


def check_input_without_data(url: str) -> None:
    given = [triton.InferInput("a", [1, 4], "FP32")]
    _invalid(url, "plus_one", given, "unable to find data for input tensor 'a'")


def check_the_request_id_is_in_the_text(url: str) -> None:
    _refused(
        url,
        lambda client: client.infer(
            "plus_one", inputs(a=np.ones((1, 5), np.float32)), request_id="order 8"
        ),
        "INVALID_ARGUMENT",
        "[request id: order 8] unexpected shape",
    )


def check_shared_memory_cannot_be_registered(url: str) -> None:
    _refused(
        url,
        lambda client: client.register_system_shared_memory("region", "/key", 64),
        "UNIMPLEMENTED",
        "shared memory",
    )


def check_the_client_deadline(url: str) -> None:
    _refused(
        url,
        lambda client: client.infer("slow", turns(LONG), client_timeout=0.1),
        "DEADLINE_EXCEEDED",
        "Deadline Exceeded",
    )


def check_control_is_off(url: str) -> None:
    text = "explicit model load / unload is not allowed"
    _refused(url, lambda client: client.load_model("add"), "UNAVAILABLE", text)
    _refused(url, lambda client: client.unload_model("add"), "UNAVAILABLE", text)


def check_statistics_of_an_unknown_model(url: str) -> None:
    _refused(
        url,
        lambda client: client.get_inference_statistics("unheard_of"),
        "INVALID_ARGUMENT",
        "requested model 'unheard_of' is not available",
    )


def check_settings_that_cannot_be_changed(url: str) -> None:
    _refused(
        url,
        lambda client: client.update_log_settings({"log_file": "/tmp/log"}),
        "UNIMPLEMENTED",
    )
    _refused(
        url,
        lambda client: client.update_trace_settings("unheard_of", {"trace_rate": "5"}),
        "INVALID_ARGUMENT",
        "Request for unknown model : unheard_of",
    )


if __name__ == "__main__":
    main(globals())
