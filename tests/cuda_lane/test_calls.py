# SPDX-License-Identifier: Apache-2.0
"""Requests with tensors on a device, between two processes: where they are, and who waits."""

import numpy as np
import pytest

from cuda_lane.conftest import UUID
from support.device_peer import DevicePeer, on_device

X = np.arange(8, dtype=np.float32)


def test_a_device_is_asked_for_once(peer: DevicePeer) -> None:
    assert peer.device.uuid == UUID
    assert peer.device.places == 4
    again = peer.ask_for_device()
    assert "a device already" in again.status.message


@pytest.mark.parametrize("model", ["host_double", "twin_double"])
def test_inputs_and_results_on_the_device(peer: DevicePeer, model: str) -> None:
    chunk = peer.grow_on_device(X.nbytes)
    assert chunk.size == 2 << 20
    source = peer.put(chunk, X, offset=512)
    for call in (1, 2, 3):
        peer.record_in_ready(2)
        response = peer.answer(on_device(call, 2, {"x": source}, model, ["y"]))
        assert not response.HasField("status"), response.status
        (y,) = response.outputs
        assert (y.ref.epoch, y.ref.slot, y.ref.generation) == (peer.device.output_epoch, 2, call)
        assert peer.out_done(2).wait(20)
        assert peer.get(y.ref).tolist() == (2 * X).tolist()
        peer.release(y.ref)
