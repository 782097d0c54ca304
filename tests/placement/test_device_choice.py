# SPDX-License-Identifier: Apache-2.0
"""Which devices an `instance_group` means on a host with and without GPUs."""

import pytest
from google.protobuf import text_format

from thirdrail_server.inference.grpc_service_pb2 import ModelConfig
from thirdrail_server.repository.device_choice import CPU, Device, devices_of
from thirdrail_server.repository.errors import RepositoryError

A = Device("GPU-0a6a6e2f-0c4f-4f56-93f4-5bd2f4d0c001", "NVIDIA H100 80GB HBM3")
B = Device("GPU-7d1c9f3e-52a2-4c0e-9f0b-1f6f5f3b2c02")


def config(groups: str) -> ModelConfig:
    return text_format.Parse(groups, ModelConfig())


@pytest.mark.parametrize(
    ("groups", "without", "with_two"),
    [
        ("", {CPU: 1}, {A: 1, B: 1}),
        ("instance_group { count: 3 }", {CPU: 3}, {A: 3, B: 3}),
        ("instance_group { kind: KIND_CPU count: 2 }", {CPU: 2}, {CPU: 2}),
        ("instance_group { kind: KIND_MODEL }", {CPU: 1}, {A: 1, B: 1}),
        ("instance_group { kind: KIND_GPU }", None, {A: 1, B: 1}),
        ("instance_group { kind: KIND_GPU gpus: [1] count: 2 }", None, {B: 2}),
        ("instance_group { gpus: [1, 0] }", None, {B: 1, A: 1}),
        (
            "instance_group { gpus: [0] count: 2 } instance_group { gpus: [0, 1] } "
            "instance_group { kind: KIND_CPU }",
            None,
            {A: 3, B: 1, CPU: 1},
        ),
    ],
)
def test_groups_mean_devices(
    groups: str, without: dict[Device, int] | None, with_two: dict[Device, int]
) -> None:
    assert devices_of(config(groups), (A, B)) == with_two
    assert list(devices_of(config(groups), (A, B))) == list(with_two)
    if without is not None:
        assert devices_of(config(groups), ()) == without


def test_a_model_without_a_configuration_runs_where_there_is_a_device() -> None:
    assert devices_of(None, ()) == {CPU: 1}
    assert devices_of(None, (B,)) == {B: 1}


@pytest.mark.parametrize(
    ("groups", "gpus", "text"),
    [
        (
            "instance_group { kind: KIND_GPU }",
            (),
            "instance_group[0] is KIND_GPU, but this host has no GPU; use KIND_CPU",
        ),
        (
            "instance_group { } instance_group { gpus: [0] }",
            (),
            "instance_group[1] lists gpus [0], but this host has no GPU; use KIND_CPU",
        ),
        (
            "instance_group { gpus: [2] }",
            (A, B),
            "instance_group[0] lists GPU 2, which this host does not have: 0 is NVIDIA H100 80GB "
            f"HBM3 {A.uuid}, 1 is {B.uuid}",
        ),
        (
            "instance_group { gpus: [-1] }",
            (B,),
            f"instance_group[0] lists GPU -1, which this host does not have: 0 is {B.uuid}",
        ),
        (
            "instance_group { } instance_group { count: -3 kind: KIND_CPU }",
            (),
            "instance_group[1] has count -3, expected 1 or more",
        ),
        (
            "instance_group { gpus: [1, 0, 1] }",
            (A, B),
            "instance_group[0] lists GPU 1 twice; `count` makes more instances",
        ),
        (
            "instance_group { kind: KIND_CPU gpus: [0] }",
            (A,),
            "instance_group[0] is KIND_CPU and lists gpus [0]: choose one",
        ),
    ],
)
def test_what_a_host_cannot_have_is_refused(
    groups: str, gpus: tuple[Device, ...], text: str
) -> None:
    with pytest.raises(RepositoryError) as refused:
        devices_of(config(groups), gpus)
    assert str(refused.value) == text


def test_a_worker_is_named_by_who_its_device_is() -> None:
    assert CPU.worker == "cpu"
    assert B.worker == f"cuda:{B.uuid}"
    assert Device(B.uuid, "a driver's new name for it") == B
