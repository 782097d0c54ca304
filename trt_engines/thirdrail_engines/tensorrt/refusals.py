# SPDX-License-Identifier: Apache-2.0
"""TensorRT's own words for a model that it does not take, and what they mean for its owner.

The words are kept, without places in its source, since they are what others have searched for.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from thirdrail_engines.plans import BuildFault

_TEXT_CHARS_MAX = 800
_LINE_CHARS_MAX = 2000
_PARSER_CHARS_MAX = 1000

_CONTROL = re.compile(r"[\x00-\x1f\x7f]+")
_CODE = re.compile(r"^.*?Error Code \d+: [\w ]+? \((.*)\)\s*$", re.DOTALL)
_ENGINE_PLACE = re.compile(r"\s*In \S+(?: \S+)? at /\S*?:\d+")
_COMPILER_PLACE = re.compile(r"\[\w+\.(?:cpp|cc|h|hpp):\d+: \w+\] ")
_LOGGED_PLACE = re.compile(r"^(?:ERROR: )?[\w.]+\.(?:cpp|hpp|h):\d+(?: In function \w+)?: *")
_PARSER_CONDITION = re.compile(r'^.*&& "(.*?)"$', re.DOTALL)
_PARSER_ASSERTION = re.compile(r"^.*Assertion failed: (?:\w+|[^\"]*?\)(?: == [^:]+)?): ", re.DOTALL)
# cudaError_t: no driver or too old a one, no device. Old versions do not tell the number.
_NO_GPU = re.compile(
    r"cudaError (?:3|34|35|100|101|803|804)\b|graph_jit|Cuda Runtime \(In \S+ at \S+\)$",
    re.MULTILINE,
)


@dataclass(frozen=True, slots=True)
class ParserFault:
    """One error of the ONNX parser. code: such as "UNSUPPORTED_NODE"."""

    code: str
    text: str
    node: str = ""
    operator: str = ""


@dataclass(frozen=True, slots=True)
class Refusal:
    fault: BuildFault
    text: str


@dataclass(frozen=True, slots=True)
class Circumstances:
    """What is known of the model beside the builder's words.

    same_names: input -> its open dimensions that share a name, and that name.
    conditionals: the names of its If nodes.
    """

    same_names: Sequence[tuple[str, Sequence[int], str]] = ()
    conditionals: Sequence[str] = ()


def one_line(text: str) -> str:
    """For texts with names out of a model, which may hold and be anything."""
    return " ".join(_CONTROL.sub(" ", text[:_LINE_CHARS_MAX]).split())


def tidy(message: str) -> str:
    """The part of a text that its reader can use, on one line and bounded in length."""
    text = message
    if match := _CODE.match(text):
        text = match.group(1)
    text = _COMPILER_PLACE.sub("", _ENGINE_PLACE.sub("", text))
    text = _LOGGED_PLACE.sub("", text)
    text = one_line(text).removeprefix("?: ").strip(" .;")
    if text.startswith("(") and text.find(")") == len(text) - 1:
        text = text[1:-1]
    return text if len(text) <= _TEXT_CHARS_MAX else text[: _TEXT_CHARS_MAX - 3] + "..."


def parser_refusal(faults: Sequence[ParserFault], logged: Sequence[str]) -> Refusal:
    """logged: the parser's error messages, which sometimes say more than its errors."""
    causes = [_parser_text(fault) for fault in faults]
    causes += [tidy(text) for text in logged if "Failed to open file" in text]
    return Refusal(BuildFault.REFUSED, _joined(causes) or "the parser does not say why")


def builder_refusal(logged: Sequence[str], known: Circumstances = Circumstances()) -> Refusal:
    """logged: the builder's error messages. One about the driver alone is not the cause where
    there are others: TensorRT for RTX adds it to every error on a machine without a GPU."""
    causes = [text for text in logged if "catchCudaError" not in text] or list(logged)
    text = _joined(tidy(cause) for cause in causes) or "the builder does not say why"
    fault = _fault_of("\n".join(causes))
    advice = _advice(text, fault, known)
    return Refusal(fault, f"{text}. {advice}" if advice else text)


def _parser_text(fault: ParserFault) -> str:
    text = fault.text[:_PARSER_CHARS_MAX]
    if match := _PARSER_CONDITION.match(text):
        text = match.group(1)
    text = tidy(_PARSER_ASSERTION.sub("", text))
    if text in ("", "false"):
        text = fault.code.lower().replace("_", " ")
    if fault.operator:
        return f"{fault.operator} node '{fault.node}': {text}"
    return text


def _joined(texts: Iterable[str]) -> str:
    return "; ".join(dict.fromkeys(text for text in texts if text))[:_TEXT_CHARS_MAX]


def _fault_of(said: str) -> BuildFault:
    if "BuildCanceled" in said:
        return BuildFault.CANCELLED
    if "OutOfMemory" in said or "bad_alloc" in said or "cudaError 2:" in said:
        return BuildFault.OUT_OF_MEMORY
    if _NO_GPU.search(said):
        return BuildFault.MISSING
    return BuildFault.REFUSED


def _advice(text: str, fault: BuildFault, known: Circumstances) -> str:
    if "contradictory IOptimizationProfile" in text and known.same_names:
        return "; ".join(_same_names(*each) for each in known.same_names)
    if "ScopeType" in text and known.conditionals:
        return (
            f"The model has conditional parts ({_some(known.conditionals)}): "
            "an export without If nodes, or with simpler ones, may be taken"
        )
    if "graph_jit" in text:
        return "A refittable plan is compiled by the driver of a GPU: build it where there is one"
    if fault is BuildFault.MISSING:
        return (
            "There is no GPU with a working driver here: name the compute capabilities to build "
            "for, or build where such a GPU is"
        )
    for words, advice in _ADVICE.items():
        if words in text:
            return advice
    return ""


_ADVICE = {
    "for Turing (SM75)": "Convert the model to fp16, or leave sm75 out",
    "within workspace limit": "Raise workspace_mib",
    "libnvinfer_lean": "version_compatible needs TensorRT's lean runtime, which is not in this "
    "package: leave it out",
    "sm_vers_.size() == 1": "A refittable plan is for one compute capability: build one for each",
}


def _same_names(tensor: str, dims: Sequence[int], name: str) -> str:
    places = f"{', '.join(map(str, dims[:-1]))} and {dims[-1]}"
    return (
        f"The model gives dimensions {places} of '{tensor}' the same name '{name}', so they have "
        "to be equal: name them apart, or give profiles in which they are equal"
    )


def _some(names: Sequence[str], most: int = 3) -> str:
    shown = ", ".join(f"If node '{name}'" for name in names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
