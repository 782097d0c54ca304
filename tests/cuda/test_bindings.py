# SPDX-License-Identifier: Apache-2.0
"""Our use of the driver's bindings, by their own words."""

import ast
import inspect
import re

import pytest

from thirdrail.device import cuda_runtime, virtual_memory
from thirdrail_engines.cuda import chunks, driver_events, driver_streams
from thirdrail_engines.cuda import driver as our_driver
from thirdrail_engines.cuda.errors import RELAUNCH, STICKY


def calls_of(source: str) -> dict[str, set[int]]:
    """The functions of the driver that a source calls, and with how many arguments."""
    found: dict[str, set[int]] = {}
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        first = node.args[0] if node.args else None
        if isinstance(first, ast.Constant) and re.match("cu[A-Z]", name := str(first.value)):
            found.setdefault(name, set()).add(len(node.args) - 1)
        elif isinstance(node.func, ast.Attribute) and node.func.attr.startswith("cu"):
            found.setdefault(node.func.attr, set()).add(len(node.args))
    return found


@pytest.mark.needs_cuda_bindings
def test_every_function_exists_and_takes_what_we_pass() -> None:
    from cuda.bindings import driver

    ours = (our_driver, driver_streams, chunks, driver_events, virtual_memory, cuda_runtime)
    calls = calls_of("".join(map(inspect.getsource, ours)))
    assert len(calls) > 50
    for name, counts in calls.items():
        parameters = inspect.signature(getattr(driver, name)).parameters
        assert counts == {len(parameters)}, name


@pytest.mark.needs_cuda_bindings
def test_every_constant_exists() -> None:
    from cuda.bindings import driver

    source = inspect.getsource(our_driver) + inspect.getsource(driver_streams)
    members = {
        name: owner
        for owner in ("CUevent_flags", "CUstream_flags", "CUstreamCaptureMode")
        for name in dir(getattr(driver, owner))
    }
    members |= dict.fromkeys(dir(driver.CUmemAllocationHandleType), "CUmemAllocationHandleType")
    members |= dict.fromkeys(dir(driver.CUresult), "CUresult")
    for name in set(re.findall(r"\bCU(?:DA)?_[A-Z_]{4,}\b", source)):
        assert name.startswith("CU_DEVICE_ATTRIBUTE_") or name in members or hasattr(driver, name)
    for name in re.findall(r'(?:has|_attribute)\((?:api, handle, )?"([A-Z_]+)"\)', source):
        assert hasattr(driver.CUdevice_attribute, f"CU_DEVICE_ATTRIBUTE_{name}"), name


@pytest.mark.needs_cuda_bindings
def test_sticky_are_all_codes_after_which_a_process_must_be_relaunched() -> None:
    from cuda.bindings import driver

    documented = {
        code.name
        for code in driver.CUresult
        if "must be terminated and relaunched" in " ".join((code.__doc__ or "").split())
    }
    assert documented == RELAUNCH
    assert {code.name for code in driver.CUresult} >= STICKY
