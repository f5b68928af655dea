"""TF Serving's messages and stubs without TensorFlow itself, and NumPy arrays in and out of tensor messages.

The stubs import `tensorflow.core`, plain protobuf files, but Python would first run TensorFlow's own `__init__`: 15 s
and 700 MB that a client has no use for. An empty package of the same path stands in for it while they are imported.
"""

from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from types import ModuleType
from typing import Any

import numpy as np


@contextmanager
def _bare_tensorflow() -> Iterator[None]:
    spec = None if "tensorflow" in sys.modules else importlib.util.find_spec("tensorflow")
    if spec is None:
        yield
        return
    bare = ModuleType("tensorflow")
    bare.__path__ = list(spec.submodule_search_locations or ())
    sys.modules["tensorflow"] = bare
    try:
        yield
    finally:  # a later `import tensorflow` must find the real one; its messages are the same classes
        for name in [name for name in sys.modules if name == "tensorflow" or name.startswith("tensorflow.")]:
            del sys.modules[name]


with _bare_tensorflow():
    from tensorflow.core.framework import types_pb2
    from tensorflow.core.framework.tensor_pb2 import TensorProto
    from tensorflow.core.framework.tensor_shape_pb2 import TensorShapeProto
    from tensorflow.core.protobuf.meta_graph_pb2 import SignatureDef, TensorInfo
    from tensorflow.core.protobuf.saved_model_pb2 import SavedModel
    from tensorflow_serving.apis import get_model_metadata_pb2 as metadata_messages
    from tensorflow_serving.apis import get_model_status_pb2 as status_messages
    from tensorflow_serving.apis import model_management_pb2 as management_messages
    from tensorflow_serving.apis import predict_pb2 as predict_messages
    from tensorflow_serving.apis.model_pb2 import ModelSpec
    from tensorflow_serving.apis.model_service_pb2_grpc import ModelServiceStub
    from tensorflow_serving.apis.prediction_log_pb2 import PredictionLog
    from tensorflow_serving.apis.prediction_service_pb2_grpc import PredictionServiceStub
    from tensorflow_serving.config.model_server_config_pb2 import ModelConfig, ModelServerConfig

__all__ = [
    "ModelConfig",
    "ModelServerConfig",
    "ModelServiceStub",
    "ModelSpec",
    "PredictionLog",
    "PredictionServiceStub",
    "SavedModel",
    "SignatureDef",
    "TensorInfo",
    "TensorProto",
    "dtype_name",
    "fill",
    "from_tensor",
    "management_messages",
    "metadata_messages",
    "predict_messages",
    "status_messages",
    "to_tensor",
]

SERVING_DEFAULT = "serving_default"

MAX_MESSAGE = 64 << 20
"""The bytes of a request or an answer; 200 rows of 100 inputs are half a megabyte."""

QUEUE_FULL = "The queue of requests is full"
"""How the embedded server begins its refusal of what it cannot answer soon."""

NUMPY: dict[int, Any] = {
    types_pb2.DT_FLOAT: np.dtype(np.float32),
    types_pb2.DT_DOUBLE: np.dtype(np.float64),
    types_pb2.DT_HALF: np.dtype(np.float16),
    types_pb2.DT_INT8: np.dtype(np.int8),
    types_pb2.DT_INT16: np.dtype(np.int16),
    types_pb2.DT_INT32: np.dtype(np.int32),
    types_pb2.DT_INT64: np.dtype(np.int64),
    types_pb2.DT_UINT8: np.dtype(np.uint8),
    types_pb2.DT_UINT16: np.dtype(np.uint16),
    types_pb2.DT_UINT32: np.dtype(np.uint32),
    types_pb2.DT_UINT64: np.dtype(np.uint64),
    types_pb2.DT_BOOL: np.dtype(np.bool_),
    types_pb2.DT_STRING: np.dtype(object),
}
_FIELDS = {
    types_pb2.DT_FLOAT: "float_val",
    types_pb2.DT_DOUBLE: "double_val",
    types_pb2.DT_HALF: "half_val",
    types_pb2.DT_INT64: "int64_val",
    types_pb2.DT_UINT32: "uint32_val",
    types_pb2.DT_UINT64: "uint64_val",
    types_pb2.DT_BOOL: "bool_val",
    types_pb2.DT_STRING: "string_val",
}
_ENUM = {dtype: number for number, dtype in NUMPY.items()}
MAX_ELEMENTS = 1 << 26
KNOWN = 64
"""Shapes of more bytes than that are read anew each time."""

MAX_RANK = 64  # NumPy's; TensorFlow's own is 254


def dtype_name(number: int) -> str:
    """The name of a TensorFlow dtype, as its own messages write it: float, int64, …"""
    try:
        return str(types_pb2.DataType.Name(number)).removeprefix("DT_").lower()
    except ValueError:
        return f"unknown dtype enum ({number})"


@lru_cache(1024)
def _head(dtype: np.dtype, shape: tuple[int, ...]) -> Any:
    """A TensorProto without its values, which is copied; made anew for each input it would be half of the time."""
    tensor = TensorProto(dtype=_ENUM[dtype])
    for size in shape:
        tensor.tensor_shape.dim.add(size=size)
    return tensor


def fill(tensor: Any, array: np.ndarray) -> None:
    """Makes a TensorProto `array`: its bytes in tensor_content, strings in string_val."""
    if array.dtype.kind in "OSU":
        tensor.CopyFrom(_head(NUMPY[types_pb2.DT_STRING], array.shape))
        tensor.string_val.extend(
            item.encode() if isinstance(item, str) else bytes(item) for item in array.ravel().tolist()
        )
    else:
        tensor.CopyFrom(_head(array.dtype, array.shape))
        tensor.tensor_content = array.tobytes()


def to_tensor(array: np.ndarray) -> Any:
    """`array` as a TensorProto."""
    tensor = TensorProto()
    fill(tensor, array)
    return tensor


@lru_cache(1024)
def _shape(described: bytes) -> tuple[tuple[int, ...], int]:
    """The shape that a serialized TensorShapeProto says, and its elements; most requests say the same few.

    Raises:
        ValueError: it is not that of a tensor.
    """
    proto = TensorShapeProto.FromString(described)
    shape = tuple(dim.size for dim in proto.dim)
    size = math.prod(shape)
    if proto.unknown_rank or min(shape, default=0) < 0 or len(shape) > MAX_RANK or size > MAX_ELEMENTS:
        raise ValueError(f"shape {list(shape[:MAX_RANK])} is not that of a tensor")
    return shape, size


def from_tensor(tensor: Any) -> np.ndarray:
    """A TensorProto as a (read-only) array: a view of tensor_content, or what the field of its dtype says.

    As in TensorFlow (`Tensor::FromProto`), a field with fewer values than the shape has is continued with its last one
    or zeros, further values are ignored, and so is everything where the shape has no elements.

    Raises:
        ValueError: dtype not served, unknown shape, or values that do not fit it.
    """
    dtype = NUMPY.get(tensor.dtype)
    if dtype is None:
        raise ValueError(f"dtype {dtype_name(tensor.dtype)} is not served")
    described = tensor.tensor_shape.SerializeToString()
    shape, size = _shape(described) if len(described) <= KNOWN else _shape.__wrapped__(described)
    content = tensor.tensor_content
    if content and size:
        if dtype.kind == "O" or len(content) != size * dtype.itemsize:
            raise ValueError(f"{len(content)} bytes do not fit shape {list(shape)} of {dtype_name(tensor.dtype)}")
        array = np.frombuffer(content, dtype)
        return array if len(shape) == 1 else array.reshape(shape)
    values = getattr(tensor, _FIELDS.get(tensor.dtype, "int_val"))[:size]
    try:
        # of a half its bits
        known = np.array(values, np.uint16).view(dtype) if dtype == np.float16 else np.array(values, dtype)
    except OverflowError:
        raise ValueError(f"values do not fit dtype {dtype_name(tensor.dtype)}") from None
    if len(known) == size:
        return known.reshape(shape)
    if len(known) < 2:  # one value everywhere needs no memory, whatever the shape claims
        return np.broadcast_to(known[0] if len(known) else np.array(b"" if dtype.kind == "O" else 0, dtype), shape)
    return np.concatenate([known, np.full(size - len(known), known[-1], dtype)]).reshape(shape)
