# SPDX-License-Identifier: Apache-2.0
"""An FP32 graph becomes one that computes in FP16 or BF16, as far as that is sound.

Inputs and outputs keep their types: clients, batching and the reference see the same model, and the
two casts at its ends cost nothing beside its layers.

Which values become 16 bits wide is decided by ONNX Runtime's own converter, which knows the
operators that must not, and by a measurement: nodes that see numbers near the end of FP16's range
stay FP32. The converter knows FP16 only. For BF16, whose range is FP32's, its result is taken with
the other type, and with weights rounded from the FP32 ones.
"""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto, inliner, version_converter
from onnx.shape_inference import InferenceError

from thirdrail_engines.engine import ModelFileError
from thirdrail_engines.plans import BuildError, BuildFault, Precision, Profile, TellProgress
from thirdrail_engines.precision import graphs
from thirdrail_engines.precision.measure import Figures, measure
from thirdrail_engines.precision.ranges import Ranges, find_ranges

# Sixteenth of FP16's largest number: real inputs may be larger than seeded ones.
FP16_MAGNITUDE_MAX = 65504 / 16
# From here on every operator that has FP16 has BF16 too, convolutions among them.
BF16_OPSET = 22
# A protobuf message ends at 2 GiB, and graphs pass from library to library as messages.
WEIGHTS_BYTES_MAX = 1900 << 20
# What TensorRT for RTX 1.7.1 takes in FP32 and refuses in 16 bits, found by trying each operator.
_KEPT_IN_BOTH = ("Celu", "MeanVarianceNormalization")
_KEPT_IN_BF16 = ("ConvTranspose", "GRU", "HardSwish", "LpNormalization", "LpPool", "Mish", "Shrink")
NAMES_MAX = 20  # in the report

_PHASE = "precision"
_STEPS = 4


@dataclass(frozen=True, slots=True)
class Conversion:
    """path: the converted graph. report: plain data for the plan's manifest, figures included."""

    path: Path
    report: Mapping[str, object]


def convert(
    path: Path,
    precision: Precision,
    folder: Path,
    tell: TellProgress,
    profiles: Sequence[Profile] = (),
) -> Conversion:
    """Write the graph at `path` in another precision into `folder`.

    profiles: the shapes to measure with; without, small ones that the graph accepts.
    Raises BuildError when that cannot be done, or gives infinities and NaN where FP32 has numbers.
    """
    assert precision is not Precision.AS_IS
    tell(_PHASE, 0, _STEPS)
    model = _load(path)
    _check_source(path, model, precision)
    if precision is Precision.BF16:
        model = _with_opset(path, model, BF16_OPSET)
    graphs.name_nodes(model.graph)
    graphs.lift_constants(model.graph)
    tell(_PHASE, 1, _STEPS)
    reference = folder / "reference.onnx"
    onnx.save(model, reference)
    try:
        ranges, kept, low = Ranges(), frozenset[str](), TensorProto.BFLOAT16
        if precision is Precision.FP16:
            ranges, low = find_ranges(reference, profiles), TensorProto.FLOAT16
            kept = ranges.nodes_beyond(model.graph, FP16_MAGNITUDE_MAX)
        tell(_PHASE, 2, _STEPS)
        converted = _converted(path, model, precision, kept)
        if precision is Precision.BF16:
            graphs.swap_half_for_bfloat(converted.graph, graphs.float_weights(model.graph))
        converted = graphs.with_types(converted)
        target = folder / f"{path.stem}.{precision}.onnx"
        onnx.save(converted, target)
        tell(_PHASE, 3, _STEPS)
        figures = measure(reference, converted, low, folder, profiles)
    except BuildError:
        raise
    except (ModelFileError, InferenceError) as error:
        text = " ".join(str(error).split())
        raise _refusal(
            path, f"its conversion to {precision} gives no valid graph: {text}"
        ) from None
    reference.unlink()
    _check_figures(path, precision, figures)
    tell(_PHASE, _STEPS, _STEPS)
    return Conversion(target, _report(precision, model, converted, kept, ranges, figures))


def _load(path: Path) -> Any:
    try:
        model = onnx.load(path)
    except FileNotFoundError as error:
        name = Path(str(error.filename or path)).name
        raise BuildError(BuildFault.MISSING, f"{path.name}: no file {name}") from None
    except Exception as error:  # protobuf's and onnx' own share no parent but Exception
        text = " ".join(str(error).split())
        raise _refusal(path, f"not a readable ONNX file: {text}") from None
    if model.functions:
        model = inliner.inline_local_functions(model)
    return model


def _refusal(path: Path, text: str) -> BuildError:
    return BuildError(BuildFault.REFUSED, f"{path.name}: {text}")


def _check_source(path: Path, model: Any, precision: Precision) -> None:
    if any(node.op_type == "QuantizeLinear" for node in graphs.all_nodes(model.graph)):
        raise _refusal(
            path,
            f"the graph is quantised (QuantizeLinear), which sets its precision: leave out the "
            f"option precision, or convert the unquantised model to {precision}",
        )
    halves = {TensorProto.FLOAT16, TensorProto.BFLOAT16}
    if halves & graphs.element_types(model.graph):
        raise _refusal(
            path,
            f"the graph has FP16 or BF16 tensors, so somebody chose its precision already: leave "
            f"out the option precision, or convert the FP32 model to {precision}",
        )
    weights_bytes = graphs.weights_bytes(model.graph)
    if weights_bytes > WEIGHTS_BYTES_MAX:
        raise _refusal(
            path,
            f"the graph has {weights_bytes} bytes of weights, at most {WEIGHTS_BYTES_MAX} are "
            f"converted: convert it to {precision} before it is served, with NVIDIA's ModelOpt",
        )
    if TensorProto.FLOAT not in graphs.element_types(model.graph):
        raise _refusal(path, f"the graph has no FP32 tensors, nothing to convert to {precision}")


def _with_opset(path: Path, model: Any, version: int) -> Any:
    found = max((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), default=1)
    if found >= version:
        return model
    try:
        return version_converter.convert_version(model, version)
    except Exception as error:  # the converter's own share no parent but Exception
        text = " ".join(str(error).split())
        raise _refusal(
            path,
            f"the graph has opset {found}, BF16 needs {version}, and onnx cannot convert it: "
            f"{text}. Export the model with opset {version}, or use fp16",
        ) from None


def _converted(path: Path, model: Any, precision: Precision, kept: Collection[str]) -> Any:
    # Imported late: it imports what the rest of ONNX Runtime does not need.
    from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16

    operators = [*DEFAULT_OP_BLOCK_LIST, *_KEPT_IN_BOTH]
    if precision is Precision.BF16:
        operators += _KEPT_IN_BF16
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    try:
        made = convert_float_to_float16(
            copy, keep_io_types=True, op_block_list=operators, node_block_list=list(kept)
        )
        graphs.drop_repeated_casts(made.graph)
        graphs.join_casts(made.graph)
        graphs.sort_nodes(made.graph)
    except Exception as error:  # it asserts and raises as it happens to
        text = " ".join(str(error).split()) or type(error).__name__
        raise _refusal(path, f"ONNX Runtime's converter cannot convert it: {text}") from None
    return made


def _check_figures(path: Path, precision: Precision, figures: Figures) -> None:
    broken = next((each for each in figures.outputs if each.not_finite), None)
    if broken is not None:
        advice = "use bf16, whose range is FP32's" if precision is Precision.FP16 else "use as_is"
        raise _refusal(
            path,
            f"in {precision}, {broken.not_finite} elements of output '{broken.name}' are infinite "
            f"or NaN where FP32 has numbers: {advice}",
        )


def _report(
    precision: Precision,
    model: Any,
    converted: Any,
    kept: Collection[str],
    ranges: Ranges,
    figures: Figures,
) -> Mapping[str, object]:
    import onnxruntime

    wide = graphs.nodes_in(converted.graph, TensorProto.FLOAT)
    return {
        "precision": str(precision),
        "converter": f"onnxruntime.transformers.float16 {onnxruntime.__version__}",
        "inputs_and_outputs": "unchanged",
        "nodes": len(model.graph.node),
        "nodes_in_fp32": dict(Counter(node.op_type for node in wide)),
        "kept_for_their_range": sorted(kept)[:NAMES_MAX],
        "kept_for_their_range_count": len(kept),
        "ranges_unknown_because": ranges.fault,
        "weights_bytes": graphs.weights_bytes(model.graph),
        "weights_bytes_converted": graphs.weights_bytes(converted.graph),
        "measured_on": "ONNX Runtime CPU, sums in FP32, each result rounded",
        "measured_with": list(figures.runs),
        "not_measured_because": figures.fault,
        "outputs": [asdict(output) for output in figures.outputs],
    }
