# SPDX-License-Identifier: Apache-2.0
"""A kernel that writes to address 8, compiled by the driver from PTX. Not yet run on a GPU."""

from typing import Any

PTX = b"""
.version 7.0
.target sm_50
.address_size 64
.visible .entry wild() {
    .reg .b64 %a;
    .reg .b32 %v;
    mov.u64 %a, 8;
    mov.u32 %v, 1;
    st.global.u32 [%a], %v;
    ret;
}
\0"""


def launch(device: Any, stream: Any) -> None:
    """device, stream: of cuda/driver.py."""
    module = device.call("cuModuleLoadData", PTX)
    kernel = device.call("cuModuleGetFunction", module, b"wild")
    device.call("cuLaunchKernel", kernel, 1, 1, 1, 1, 1, 1, 0, stream.native, 0, 0)
