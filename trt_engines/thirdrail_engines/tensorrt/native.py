# SPDX-License-Identifier: Apache-2.0
"""TensorRT's classes as types. To mypy each is Any, since both packages are optional.

Whatever comes out of TensorRT is annotated with one of these. tests/tensorrt/test_names.py reads
the annotations, and so knows which attribute of which class is used, and checks that it exists in
every version that we promise. It fails on a value that is not annotated.
"""

from typing import Any, TypeAlias

Module: TypeAlias = Any  # `tensorrt` or `tensorrt_rtx` itself

Builder: TypeAlias = Any
ComputeCapability: TypeAlias = Any
DataType: TypeAlias = Any
ErrorCode: TypeAlias = Any
IBuilderConfig: TypeAlias = Any
ICudaEngine: TypeAlias = Any
IExecutionContext: TypeAlias = Any
IHostMemory: TypeAlias = Any
ILayer: TypeAlias = Any
ILogger: TypeAlias = Any
INetworkDefinition: TypeAlias = Any
IOptimizationProfile: TypeAlias = Any
IOutputAllocator: TypeAlias = Any
IPluginRegistry: TypeAlias = Any
IProgressMonitor: TypeAlias = Any
IRuntimeCache: TypeAlias = Any
IRuntimeConfig: TypeAlias = Any
ITensor: TypeAlias = Any
ITimingCache: TypeAlias = Any
NetworkDefinitionCreationFlag: TypeAlias = Any
OnnxParser: TypeAlias = Any
ParserError: TypeAlias = Any
Runtime: TypeAlias = Any
Severity: TypeAlias = Any
TensorFormat: TypeAlias = Any
TensorIOMode: TypeAlias = Any
TensorLocation: TypeAlias = Any
