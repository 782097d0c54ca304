# SPDX-License-Identifier: Apache-2.0
"""tritonclient over mutual TLS: with a client certificate it may also load and unload.

Expects the certificates' folder in the environment variable CERTIFICATES.
"""

import os
from pathlib import Path
from typing import Any

import tritonclient.grpc as triton

from foreign.programs.checks import main
from foreign.programs.tritonclient_tensors import assert_refused, ones


def _client(url: str, *, shows_certificate: bool = True) -> triton.InferenceServerClient:
    folder = Path(os.environ["CERTIFICATES"])
    options: dict[str, Any] = {"root_certificates": str(folder / "ca.pem")}
    if shows_certificate:
        options["private_key"] = str(folder / "client.key")
        options["certificate_chain"] = str(folder / "client.pem")
    return triton.InferenceServerClient(url, ssl=True, **options)


def check_infer(url: str) -> None:
    with _client(url) as client:
        assert client.is_server_ready()
        assert client.infer("plus_one", ones()).as_numpy("c").tolist() == [[2, 2, 2, 2]]


def check_control_with_a_certificate(url: str) -> None:
    with _client(url) as client:
        client.load_model("identity_fp32")
        assert client.is_model_ready("identity_fp32")
        client.unload_model("identity_fp32")


def check_no_call_without_a_certificate(url: str) -> None:
    with _client(url, shows_certificate=False) as client:
        assert_refused(lambda: client.infer("plus_one", ones()), "UNAVAILABLE")


def check_no_call_in_plain_text(url: str) -> None:
    with triton.InferenceServerClient(url) as client:
        assert_refused(lambda: client.infer("plus_one", ones()), "UNAVAILABLE")


if __name__ == "__main__":
    main(globals())
