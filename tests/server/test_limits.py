# SPDX-License-Identifier: Apache-2.0
"""What a server's settings bound or switch: message sizes, connections, calls, compression, TLS,
reflection, channelz."""

import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import psutil
import pytest
from grpc_channelz.v1 import channelz_pb2, channelz_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from conftest import StartServer
from support.models import identity, write
from support.server import UNLIMITED, RunningServer, running_server
from thirdrail import Client
from thirdrail.channels import TlsOptions
from thirdrail.errors import InvalidArgument, PermissionDenied, ResourceExhausted, Unavailable
from thirdrail.tensors import array_of_tensor, tensor_of_array
from thirdrail.v1 import inference_pb2 as pb
from thirdrail.v1 import inference_pb2_grpc, models_pb2, models_pb2_grpc

MIB = 1 << 20
X = np.arange(4, dtype=np.float32)
Status = grpc.StatusCode
SERVICES = {
    "thirdrail.v1.Inference",
    "thirdrail.v1.Models",
    "thirdrail.v1.Metrics",
    "thirdrail.v1.Sessions",
    "inference.GRPCInferenceService",
    "grpc.health.v1.Health",
    "grpc.reflection.v1alpha.ServerReflection",
}


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("repository")
    write(folder, "identity", identity())
    return folder


@pytest.fixture(scope="module")
def server(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """With small bounds."""
    bounds = ["--max-message-mib=1", "--max-calls=6", "--max-connections=4", "--channelz"]
    with running_server(repository, tmp_path_factory.mktemp("server"), bounds) as running:
        yield running


def infer(channel: grpc.Channel, size_bytes: int = 16, **options: object) -> int:
    """Returns the size of the result. Raises grpc.RpcError."""
    x = np.zeros(size_bytes // 4, np.float32)
    request = pb.InferRequest(model_name="identity", inputs=[tensor_of_array("x", x)])
    stub = inference_pb2_grpc.InferenceStub(channel)
    response = stub.Infer(request, timeout=20, **options)  # type: ignore[arg-type]
    return array_of_tensor(response.outputs[0]).nbytes


def failure(call: Callable[[], object]) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return caught.value.code(), caught.value.details() or ""


# Messages


@pytest.mark.parametrize("tcp", [False, True])
def test_a_message_above_the_bound_is_refused_and_the_connection_lives(
    server: RunningServer, tcp: bool
) -> None:
    with server.channel(tcp=tcp) as channel:
        assert infer(channel, MIB - 1024) == MIB - 1024
        code, text = failure(lambda: infer(channel, MIB))
        assert code is Status.RESOURCE_EXHAUSTED
        assert f"vs. {MIB}" in text
        assert infer(channel) == 16


def test_the_bound_holds_for_what_compressed_messages_become(server: RunningServer) -> None:
    with server.channel() as channel:
        code, _ = failure(lambda: infer(channel, 16 * MIB, compression=grpc.Compression.Gzip))
        assert code is Status.RESOURCE_EXHAUSTED
        assert infer(channel) == 16


@pytest.mark.parametrize("algorithm", [grpc.Compression.Gzip, grpc.Compression.Deflate])
def test_compressed_requests_are_understood(
    server: RunningServer, algorithm: grpc.Compression
) -> None:
    with server.channel() as channel:
        assert infer(channel, MIB // 2, compression=algorithm) == MIB // 2


def test_the_client_may_compress(server: RunningServer) -> None:
    with Client(server.url, compression="gzip", transport="grpc") as client:
        np.testing.assert_array_equal(client.infer("identity", {"x": X})["y"], X)
        with pytest.raises(ResourceExhausted):
            client.infer("identity", {"x": np.zeros(MIB, np.float32)})


@pytest.mark.parametrize(
    ("method", "unit"),
    [
        ("/thirdrail.v1.Inference/Infer", b"\x32\x00"),
        ("/inference.GRPCInferenceService/ModelInfer", b"\x2a\x00"),
        ("/inference.GRPCInferenceService/ModelInfer", b"\x3a\x00"),
    ],
)
def test_a_swarm_of_fields_is_refused_before_it_costs_anything(
    server: RunningServer, method: str, unit: bytes
) -> None:
    """Half a million empty inputs in 1 MiB would become a hundred times as much."""
    with server.channel() as channel:
        infer(channel)
        before = psutil.Process(server.pid).memory_info().rss
        raw: Any = channel.unary_unary(method)
        code, text = failure(lambda: raw(unit * (MIB // 2 - 100), timeout=20))
        assert code is Status.INVALID_ARGUMENT
        assert "may have at most 4096 fields" in text
        assert psutil.Process(server.pid).memory_info().rss - before < 16 * MIB
        assert infer(channel) == 16


# Connections and calls


def test_connections_above_the_bound_are_turned_away(server: RunningServer) -> None:
    """The bound is each listener's: who floods TCP does not shut out the Unix socket."""
    options = [*UNLIMITED, ("grpc.use_local_subchannel_pool", 1)]
    with ExitStack() as stack:
        channels = [
            stack.enter_context(grpc.insecure_channel(server.address, options)) for _ in range(7)
        ]
        outcomes: list[object] = []
        for channel in channels:
            try:
                outcomes.append(infer(channel))
            except grpc.RpcError as error:
                outcomes.append(error.code())
        assert outcomes == [16] * 4 + [Status.UNAVAILABLE] * 3
        with server.channel() as other:
            assert infer(other) == 16
    _until(lambda: _is_served(server), "room again when the others have gone")


def _is_served(server: RunningServer) -> bool:
    with grpc.insecure_channel(server.address) as channel:
        try:
            return infer(channel) == 16
        except grpc.RpcError:
            return False


def _until(is_so: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 20
    while not is_so():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def test_calls_above_the_bound_are_refused_at_once(server: RunningServer) -> None:
    """Also those on one connection, where HTTP/2 could make them wait without a word."""
    with server.channel() as channel, server.channel(tcp=True) as other:
        watch = models_pb2_grpc.ModelsStub(channel).Watch
        watches = [watch(models_pb2.WatchRequest()) for _ in range(6)]
        for each in watches:
            next(each)
        for one in (channel, other):
            code, text = failure(lambda one=one: infer(one))  # type: ignore[misc]
            assert (code, text) == (Status.RESOURCE_EXHAUSTED, "Concurrent RPC limit exceeded!")
        for each in watches:
            each.cancel()
        _until(lambda: _is_served(server), "room again when the others have gone")


@pytest.mark.slow
def test_calls_that_come_all_at_once_are_all_answered(
    repository: Path, start_server: StartServer
) -> None:
    """More than gRPC keeps by itself of calls that the front has not looked at yet."""
    server = start_server(repository)
    options = [("grpc.use_local_subchannel_pool", 1)]  # a connection each
    with ExitStack() as stack:
        channels = [
            stack.enter_context(grpc.insecure_channel(f"unix:{server.socket}", options))
            for _ in range(4)
        ]
        for channel in channels:
            infer(channel)
        request = pb.InferRequest(model_name="identity", inputs=[tensor_of_array("x", X)])
        server.process.send_signal(signal.SIGSTOP)
        stubs = [inference_pb2_grpc.InferenceStub(channel) for channel in channels]
        calls = [stub.Infer.future(request, timeout=60) for stub in stubs for _ in range(1000)]
        server.process.send_signal(signal.SIGCONT)
        codes = Counter(call.code() for call in calls)
    assert set(codes) <= {Status.OK, Status.RESOURCE_EXHAUSTED}, codes
    assert codes[Status.OK] > 0


# TLS


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ca.pem; server and client: .pem and .key, signed by it; other-ca.pem, of nobody."""
    if shutil.which("openssl") is None:
        pytest.skip("the openssl command is not installed: no certificates to test TLS with")
    folder = tmp_path_factory.mktemp("certificates")

    def openssl(*arguments: str) -> None:
        subprocess.run(("openssl", *arguments), cwd=folder, check=True, capture_output=True)

    key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    for ca in ("ca", "other-ca"):
        openssl("req", "-x509", *key, "-keyout", f"{ca}.key", "-out", f"{ca}.pem", "-subj", "/CN=c")
    (folder / "names").write_text("subjectAltName=DNS:localhost,IP:127.0.0.1")
    for name in ("server", "client"):
        request = ("-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", f"/CN={name}")
        openssl("req", *key, *request)
        signed = ("-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-extfile", "names")
        openssl("x509", "-req", "-in", f"{name}.csr", "-out", f"{name}.pem", *signed)
    return folder


def tls_client(server: RunningServer, options: TlsOptions | None) -> Client:
    return Client(f"localhost:{server.address.rpartition(':')[2]}", tls=options)


def test_tls(repository: Path, certificates: Path, start_server: StartServer) -> None:
    files = [f"--tls-cert={certificates}/server.pem", f"--tls-key={certificates}/server.key"]
    server = start_server(repository, "--model-control=explicit", "--load-model=*", *files)
    with tls_client(server, TlsOptions(ca=certificates / "ca.pem")) as client:
        np.testing.assert_array_equal(client.infer("identity", {"x": X})["y"], X)
        with pytest.raises(PermissionDenied, match="client certificate"):
            client.load("identity")
    for options in (None, TlsOptions(ca=certificates / "other-ca.pem")):
        with tls_client(server, options) as client, pytest.raises(Unavailable):
            client.infer("identity", {"x": X}, timeout=60)
    with Client(server.url) as client:
        np.testing.assert_array_equal(client.infer("identity", {"x": X})["y"], X)


@pytest.mark.slow
def test_mutual_tls(repository: Path, certificates: Path, start_server: StartServer) -> None:
    files = [f"--tls-cert={certificates}/server.pem", f"--tls-key={certificates}/server.key"]
    files.append(f"--tls-client-ca={certificates}/ca.pem")
    server = start_server(repository, "--model-control=explicit", "--load-model=*", *files)
    ca = certificates / "ca.pem"
    known = TlsOptions(ca=ca, cert=certificates / "client.pem", key=certificates / "client.key")
    with tls_client(server, known) as client:
        np.testing.assert_array_equal(client.infer("identity", {"x": X})["y"], X)
        assert client.load("identity") == [1]
        client.unload("identity")
    with tls_client(server, TlsOptions(ca=ca)) as client, pytest.raises(Unavailable):
        client.infer("identity", {"x": X}, timeout=60)


def test_unreadable_tls_files_are_a_clear_error(
    repository: Path, start_server: StartServer
) -> None:
    files = ["--tls-cert=none.pem", "--tls-key=none.key"]
    server = start_server(repository, *files, wait=False)
    assert server.process.wait(30) != 0
    assert "the TLS key 'none.key' cannot be read" in " ".join(server.log_text().split())
    assert "Traceback" not in server.log_text()


# Looking inside


def reflected(channel: grpc.Channel) -> set[str]:
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    stub = reflection_pb2_grpc.ServerReflectionStub(channel)
    (answer,) = stub.ServerReflectionInfo(iter([request]), timeout=20)
    return {service.name for service in answer.list_services_response.service}


def test_reflection_lists_every_service_with_its_messages(server: RunningServer) -> None:
    with server.channel() as channel:
        assert reflected(channel) == SERVICES
        requests = [
            reflection_pb2.ServerReflectionRequest(file_containing_symbol=name)
            for name in sorted(SERVICES)
        ]
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        for answer in stub.ServerReflectionInfo(iter(requests), timeout=20):
            assert answer.file_descriptor_response.file_descriptor_proto


@pytest.mark.slow
def test_channelz_is_there_when_asked_for(
    server: RunningServer, repository: Path, start_server: StartServer
) -> None:
    request = channelz_pb2.GetServersRequest()
    with server.channel() as channel:
        answer = channelz_pb2_grpc.ChannelzStub(channel).GetServers(request, timeout=20)
        assert len(answer.server) == 1
    with start_server(repository).channel() as channel:
        stub = channelz_pb2_grpc.ChannelzStub(channel)
        assert failure(lambda: stub.GetServers(request, timeout=20))[0] is Status.UNIMPLEMENTED


def test_a_bad_request_leaves_the_connection(server: RunningServer) -> None:
    with Client(server.url) as client:
        for _ in range(3):
            with pytest.raises(InvalidArgument):
                client.infer("identity", {"z": X})
        np.testing.assert_array_equal(client.infer("identity", {"x": X})["y"], X)
