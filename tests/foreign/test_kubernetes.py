# SPDX-License-Identifier: Apache-2.0
"""The manifests of `deploy/kubernetes`: valid for Kubernetes, and right in what the lane relies on.

Nothing is applied to a cluster here: there is none.
"""

import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import pytest

from foreign.conftest import REQUIREMENTS, RunProgram
from support.environments import REPOSITORY_ROOT, python_environment, requirements_in, run

pytestmark = [pytest.mark.needs_packages, pytest.mark.timeout(600)]

MANIFESTS = REPOSITORY_ROOT / "deploy" / "kubernetes"
OLDEST, NEWEST = "1.29.0", "1.37.0"

UID = 10001
NOT_SHARED = ("hostIPC", "hostPID", "hostNetwork", "shareProcessNamespace")


@dataclass(frozen=True, slots=True)
class Container:
    """One container with all that its pod says about it."""

    file: str
    pod: dict[str, Any]
    spec: dict[str, Any]
    is_init: bool

    @property
    def name(self) -> str:
        return f"{self.file}: {self.spec['name']}"

    def security(self, field: str) -> Any:
        """The container's word goes before the pod's."""
        pods = self.pod.get("securityContext", {})
        return self.spec.get("securityContext", {}).get(field, pods.get(field))

    def volume(self, mount: dict[str, Any]) -> dict[str, Any]:
        (found,) = [each for each in self.pod["volumes"] if each["name"] == mount["name"]]
        return dict(found)

    @property
    def sockets(self) -> dict[str, Any]:
        """How the sockets' folder is mounted."""
        (found,) = [each for each in self.spec["volumeMounts"] if each["name"] == "sockets"]
        return dict(found)

    def url(self) -> PurePosixPath:
        """The gRPC socket in the container's view."""
        (found,) = [each["value"] for each in self.spec["env"] if each["name"] == "THIRDRAIL_URL"]
        return PurePosixPath(str(found).removeprefix("unix:"))

    def flags(self) -> dict[str, str]:
        """Of `thirdrail serve`."""
        arguments = [each for each in self.spec["args"] if each.startswith("--")]
        return {name: value for name, _, value in (each.partition("=") for each in arguments)}


@pytest.fixture(scope="module", params=[OLDEST, NEWEST])
def manifests(request: pytest.FixtureRequest, run_program: RunProgram) -> Any:
    """The documents by file, validated for a version of Kubernetes."""
    requirements = requirements_in(REQUIREMENTS / "kubernetes.txt")
    environment = python_environment("kubernetes", requirements)
    files = [str(path) for path in sorted(MANIFESTS.glob("*.yaml"))]
    assert len(files) == 2
    return json.loads(run_program(environment, "kubernetes_manifests", request.param, *files))


@pytest.fixture(scope="module")
def containers(manifests: Any) -> list[Container]:
    return list(_containers(manifests))


def _containers(manifests: Any) -> Iterator[Container]:
    for file, documents in manifests.items():
        for document in documents:
            template = document["spec"]["template"]
            wanted = document["spec"]["selector"]["matchLabels"].items()
            assert wanted <= template["metadata"]["labels"].items()
            pod = template["spec"]
            for kind in ("initContainers", "containers"):
                for spec in pod.get(kind, ()):
                    yield Container(file, pod, spec, kind == "initContainers")


def test_nothing_is_shared_but_the_folder(containers: list[Container]) -> None:
    for each in containers:
        assert not any(each.pod.get(name) for name in NOT_SHARED), each.name
        for mount in each.spec["volumeMounts"]:
            kinds = set(each.volume(mount)) - {"name"}
            assert kinds <= {"emptyDir", "hostPath", "persistentVolumeClaim"}, each.name
            assert ("hostPath" in kinds) <= (mount["name"] == "sockets"), each.name
            assert mount["mountPath"] != "/dev/shm", each.name


def test_both_sides_are_the_same_user_without_privileges(containers: list[Container]) -> None:
    for each in containers:
        assert each.security("allowPrivilegeEscalation") is False, each.name
        assert each.security("readOnlyRootFilesystem") is True, each.name
        assert each.security("seccompProfile") == {"type": "RuntimeDefault"}, each.name
        capabilities = each.security("capabilities")
        assert capabilities["drop"] == ["ALL"], each.name
        if each.is_init:
            assert set(capabilities["add"]) == {"CHOWN", "FOWNER"}
            assert f"chown {UID}:{UID} {each.sockets['mountPath']}" in each.spec["command"][-1]
        else:
            assert "add" not in capabilities, each.name
            assert each.security("runAsNonRoot") is True, each.name
            assert (each.security("runAsUser"), each.security("runAsGroup")) == (UID, UID)


def test_both_sides_mean_the_same_socket(containers: list[Container]) -> None:
    for file in {each.file for each in containers}:
        server, client = (
            next(each for each in containers if each.file == file and each.spec["name"] == name)
            for name in ("server", "client")
        )
        assert PurePosixPath(server.flags()["--socket"]) == server.url()
        inside = server.url().relative_to(server.sockets["mountPath"])
        assert client.url().relative_to(client.sockets["mountPath"]) == inside
        assert client.sockets["readOnly"] is True
        assert not server.sockets.get("readOnly")
        assert server.sockets["mountPath"] != client.sockets["mountPath"]
        assert "subPath" not in client.sockets, "a folder outlives the sockets in it"
        paths = [
            each.volume(each.sockets).get("hostPath", {}).get("path") for each in (server, client)
        ]
        assert paths[0] == paths[1]
        if paths[0] is None:
            assert server.pod is client.pod
            assert server.pod["securityContext"]["fsGroup"] == UID


def test_the_memory_limit_has_room_for_what_is_shared(containers: list[Container]) -> None:
    for each in containers:
        if each.spec["name"] == "server":
            limit = re.fullmatch(r"(\d+)Gi", each.spec["resources"]["limits"]["memory"])
            assert limit is not None
            front_gib = 2
            lane_gib = int(each.flags()["--lane-memory-mib"]) / 1024
            assert int(limit[1]) > front_gib + lane_gib


def test_the_server_knows_the_flags(containers: list[Container]) -> None:
    shown = run([sys.executable, "-m", "thirdrail", "serve", "--help"], {"COLUMNS": "200"}).stdout
    known = set(re.findall(r"--[a-z-]+", shown))
    for each in containers:
        if each.spec["name"] == "server":
            assert set(each.flags()) <= known
            assert each.spec["args"][0] == "serve"


def test_the_image_is_the_one_that_the_dockerfile_is_for(containers: list[Container]) -> None:
    dockerfile = (MANIFESTS / "Dockerfile").read_text()
    assert f"USER {UID}:{UID}\n" in dockerfile
    assert 'ENTRYPOINT ["thirdrail"]' in dockerfile
    for each in containers:
        assert f"-t {each.spec['image']} " in dockerfile
