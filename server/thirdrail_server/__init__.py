# SPDX-License-Identifier: Apache-2.0
"""The server: a front process that speaks gRPC and a worker process per device that runs models."""
