# SPDX-License-Identifier: Apache-2.0
"""CUDA devices, and engines that run on them. docs/cuda.md says what has been run where.

Two implementations of a device: `driver`, on the CUDA driver API, and `twin`, host memory and
threads in its place, which obeys the same rules and runs where there is no GPU. Nothing here
imports the driver's bindings before it is asked for a device.
"""
