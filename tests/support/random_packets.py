# SPDX-License-Identifier: Apache-2.0
"""Packets of any kind, for hypothesis: valid, nearly valid, damaged, random."""

from hypothesis import strategies as st

from support.lane_peer import Request, hello, infer
from thirdrail.v1 import inference_pb2 as pb
from thirdrail.v1 import lane_pb2, tensor_pb2

names = st.sampled_from(["x", "a", "y", "", "ü", "x" * 3000])
int64s = st.one_of(st.integers(-2, 5), st.integers(-(1 << 63), (1 << 63) - 1))
uint32s = st.one_of(st.integers(0, 3), st.integers(0, (1 << 32) - 1))
uint64s = st.one_of(st.integers(0, 3).map(lambda n: n * 64), st.integers(0, (1 << 64) - 1))

refs = st.builds(
    tensor_pb2.ArenaRef,
    epoch=uint32s | st.integers(1, 700),
    chunk=uint32s,
    offset=uint64s,
    size=uint64s,
    slot=uint32s,
    generation=uint32s,
)
values = st.builds(
    tensor_pb2.Tensor().values.__class__,
    bools=st.lists(st.booleans(), max_size=2),
    ints=st.lists(int64s, max_size=2),
    floats=st.lists(st.floats(), max_size=2),
    strings=st.lists(st.text(max_size=3), max_size=2),
    byte_strings=st.lists(st.binary(max_size=3), max_size=2),
)
tensors_ = st.builds(
    lambda fields, data: tensor_pb2.Tensor(**fields, **data),
    st.fixed_dictionaries(
        {
            "name": names,
            "data_type": st.integers(0, 16),
            "shape": st.lists(int64s, max_size=3),
        }
    ),
    st.one_of(
        st.just({}),
        st.fixed_dictionaries({"raw": st.binary(max_size=64)}),
        st.fixed_dictionaries({"ref": refs}),
        st.fixed_dictionaries({"values": values}),
    ),
)
infers = st.builds(
    pb.InferRequest,
    call=st.integers(0, 3),
    model_name=st.sampled_from(["identity_fp32", "add", "identity_bytes", "gather", "none", ""]),
    model_id=uint32s,
    model_version=int64s,
    request_id=st.sampled_from(["", "r", "x" * 2000]),
    inputs=st.lists(tensors_, max_size=3),
    outputs=st.lists(
        st.builds(pb.RequestedOutput, name=names, form=st.integers(0, 3), class_count=uint32s),
        max_size=2,
    ),
    priority=uint32s,
    timeout_us=uint64s,
)
leases = st.builds(lane_pb2.Lease, epoch=uint32s, slot=uint32s, generation=uint32s)
messages = st.one_of(
    st.builds(Request, infer=infers, releases=st.lists(leases, max_size=3), flow=uint64s),
    st.builds(Request, cancel=st.builds(pb.Cancel, call=st.integers(0, 3))),
    st.builds(Request, grow=st.builds(lane_pb2.GrowRequest, size=uint64s, alone=st.booleans())),
    st.builds(Request, drop=st.builds(lane_pb2.DropRequest, epoch=uint32s, chunk=uint32s)),
    st.builds(Request, ping=st.builds(lane_pb2.Ping, request=uint64s, ref=st.none() | refs)),
    st.builds(
        Request,
        export_tensor=st.builds(
            lane_pb2.ExportRequest,
            request=uint64s,
            ref=refs,
            data_type=st.integers(0, 16),
            shape=st.lists(int64s, max_size=3),
            uid=st.none() | uint32s,
            lifetime_ms=uint32s,
        ),
    ),
    st.builds(
        Request,
        import_tensor=st.builds(
            lane_pb2.ImportRequest, request=uint64s, token=st.binary(max_size=20)
        ),
    ),
    st.builds(Request, revoke=st.builds(lane_pb2.RevokeRequest, request=uint64s)),
    st.builds(Request, releases=st.lists(leases, min_size=1, max_size=3)),
    st.just(hello()),
)
VALID = infer(9).SerializeToString()
packets = st.one_of(
    messages.map(lambda message: message.SerializeToString() or b"\x32\x00"),
    st.binary(min_size=1, max_size=64),
    st.builds(
        lambda at, byte: VALID[:at] + bytes([byte]) + VALID[at + 1 :],
        st.integers(0, len(VALID)),
        st.integers(0, 255),
    ),
    st.integers(1, len(VALID) - 1).map(lambda length: VALID[:length]),
)
