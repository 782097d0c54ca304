# SPDX-License-Identifier: Apache-2.0
"""The front process: gRPC in and out; models are reached over the lane."""
