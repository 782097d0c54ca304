# SPDX-License-Identifier: Apache-2.0
"""The worker process: lanes in, models run, answers out."""
