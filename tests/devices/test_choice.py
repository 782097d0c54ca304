# SPDX-License-Identifier: Apache-2.0
"""Which devices a server takes, and what each one's worker is told."""

from pathlib import Path

import pytest

from support.models import add, write
from support.twin_host import GPUS
from thirdrail_engines import Inspector
from thirdrail_engines.cuda.discovery import discover
from thirdrail_server.config import ConfigError, MemoryBudget, ServerConfig, WorkerConfig
from thirdrail_server.front.control.load_source import LoadSource, prepare
from thirdrail_server.front.devices import (
    chosen_gpus,
    find_devices,
    memory_budget,
    worker_config,
    worker_environment,
)
from thirdrail_server.inference.grpc_service_pb2 import ModelInstanceGroup
from thirdrail_server.repository.device_choice import CPU, Device
from thirdrail_server.serve_options.models import devices_of
from thirdrail_server.worker.loading import EngineWish, prepare_version

ALL = tuple(Device(each.uuid, each.name) for each in GPUS)
NO_DRIVER = "there is no CUDA device here, as there is no NVIDIA driver (libnothing.so)"


@pytest.mark.parametrize(
    ("wanted", "numbers"),
    [
        (None, [0, 1]),
        ((), []),
        (("1", "0"), [1, 0]),
        ((GPUS[1].uuid,), [1]),
        (("GPU-0", "1000"), [0, 1]),
    ],
)
def test_gpus_are_named_by_number_or_by_the_beginning_of_a_uuid(
    wanted: tuple[str, ...] | None, numbers: list[int]
) -> None:
    assert chosen_gpus(wanted, GPUS, "") == tuple(ALL[number] for number in numbers)


@pytest.mark.parametrize(
    ("wanted", "found", "text"),
    [
        (
            ("2",),
            GPUS,
            "--devices names GPU 2, which this host does not have: "
            f"0 is {GPUS[0].uuid} (twin 0), 1 is {GPUS[1].uuid} (twin 1)",
        ),
        (("GPU-7",), GPUS, "--devices: no CUDA device of the UUID 'GPU-7'. There is: GPU-0"),
        (("GPU-",), GPUS, "--devices: 'GPU-' names no device: expected a UUID"),
        (("0", GPUS[0].uuid), GPUS, f"--devices names {GPUS[0].uuid} twice"),
        (("0",), (), f"--devices names '0', but {NO_DRIVER}"),
    ],
)
def test_a_gpu_that_is_not_here_is_refused(
    wanted: tuple[str, ...], found: tuple[object, ...], text: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        chosen_gpus(wanted, found, NO_DRIVER)  # type: ignore[arg-type]
    assert str(refused.value).startswith(text)


@pytest.mark.parametrize(
    ("texts", "devices"),
    [
        (None, None),
        (["auto"], None),
        (["cpu"], ()),
        (["1,GPU-0a"], ("1", "GPU-0a")),
        (["cpu", "1"], ("1",)),
    ],
)
def test_the_flag(texts: list[str] | None, devices: tuple[str, ...] | None) -> None:
    assert devices_of(texts) == devices


@pytest.mark.parametrize("texts", [["auto,1"], [""], ["1,"]])
def test_a_flag_that_makes_no_sense(texts: list[str]) -> None:
    with pytest.raises(ConfigError, match="--devices"):
        devices_of(texts)


def test_without_a_driver_there_is_the_cpu_and_nobody_is_asked() -> None:
    assert discover("libnothing.so") == ((), NO_DRIVER)
    assert find_devices(ServerConfig(Path("/models"), devices=())) == (CPU,)


def test_each_worker_is_told_its_device_and_sees_no_other() -> None:
    memory = MemoryBudget(bytes_max=5, device_bytes_max=7)
    config = ServerConfig(Path("/models"), memory=memory, worker=WorkerConfig(threads_max=3))
    for device, budget in ((CPU, 5), (ALL[1], 7)):
        told = worker_config(config, device)
        assert (told.name, told.device, told.threads_max) == (device.worker, device.uuid, 3)
        assert told.loads_at_once_max == 1, "so that each can be weighed"
        assert memory_budget(config, device).bytes_max == budget
        assert WorkerConfig.from_json(told.to_json()) == told
        environment = worker_environment(device, {"HOME": "/h", "CUDA_VISIBLE_DEVICES": "all"})
        assert environment == {"HOME": "/h", "CUDA_VISIBLE_DEVICES": device.uuid}
    plain = ServerConfig(Path("/models"))
    assert worker_config(plain, ALL[0]).loads_at_once_max == plain.worker.loads_at_once_max


@pytest.mark.parametrize(("device", "kind"), [("", "KIND_CPU"), (GPUS[0].uuid, "KIND_GPU")])
def test_a_worker_makes_as_many_instances_as_it_is_told(
    tmp_path: Path, device: str, kind: str
) -> None:
    write(tmp_path, "m", add(1), "instance_group { count: 3 } instance_group { gpus: [1] }")
    command = prepare("m", LoadSource(tmp_path)).command
    ((version, path),) = command.versions
    with Inspector() as inspector:
        prepared = prepare_version(
            *("m", version, path, command.config, WorkerConfig(device=device), 2, inspector),
            lambda _phase, _step, _steps: None,
            EngineWish(instances=2),
        )
    prepared.engine.close()
    assert prepared.options.instances == 2
    groups = prepared.config.instance_group
    assert [ModelInstanceGroup.Kind.Name(each.kind) for each in groups] == [kind, kind]
    assert [each.count for each in groups] == [3, 1]
