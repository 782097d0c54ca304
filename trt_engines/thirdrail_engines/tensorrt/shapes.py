# SPDX-License-Identifier: Apache-2.0
"""Whether profiles fit a network's inputs. TensorRT takes any, and fails later in other words."""

from collections.abc import Sequence
from itertools import pairwise

from thirdrail_engines.builds.result import PlanTensor
from thirdrail_engines.plans import Profile, Shape, ShapeRange


def profile_fault(inputs: Sequence[PlanTensor], profiles: Sequence[Profile]) -> str:
    """What is wrong with the profiles, or nothing."""
    names = {tensor.name for tensor in inputs}
    open_inputs = [tensor for tensor in inputs if -1 in tensor.shape]
    if open_inputs and not profiles:
        return f"no profile is given, and {_what(open_inputs[0])} has open dimensions"
    for index, profile in enumerate(profiles):
        if unknown := sorted(profile.inputs.keys() - names):
            return (
                f"profile {index} names '{unknown[0]}', which is no input; "
                f"the inputs are {', '.join(sorted(names))}"
            )
        for tensor in open_inputs:
            if tensor.name not in profile.inputs:
                return f"profile {index} has no shapes for {_what(tensor)}"
        for tensor in inputs:
            if shapes := profile.inputs.get(tensor.name):
                fault = _range_fault(tensor.shape, shapes)
                if fault:
                    return f"profile {index} does not fit {_what(tensor)}: {fault}"
    return ""


def _what(tensor: PlanTensor) -> str:
    return f"input '{tensor.name}' of shape {list(tensor.shape)}"


def _range_fault(shape: Shape, shapes: ShapeRange) -> str:
    steps = (shapes.smallest, shapes.best, shapes.largest)
    for step in steps:
        if len(step) != len(shape):
            return f"{list(step)} has {len(step)} dimensions"
        if any(dim not in (-1, mine) for dim, mine in zip(shape, step, strict=True)):
            return f"{list(step)} has another size where the model's is fixed"
        if min(step, default=0) < 0:
            return f"{list(step)} has a negative size"
    for low, high in pairwise(steps):
        if any(mine > other for mine, other in zip(low, high, strict=True)):
            return f"{list(low)} is above {list(high)}; expected smallest, best, largest"
    return ""
