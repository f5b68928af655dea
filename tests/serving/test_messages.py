from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from serving.messages import TensorProto, from_tensor, to_tensor

ARRAYS = [
    np.array(7, np.int32),
    np.arange(6, dtype=np.int64).reshape(2, 3),
    np.array([[0.5], [np.nan]], np.float32),
    np.array([1.5, -2.0]),
    np.array([True, False]),
    np.zeros((0, 4), np.float32),
    np.array([1, 2], np.uint8),
    np.array([[b"a", b""]], object),
]


@pytest.mark.parametrize("array", ARRAYS, ids=lambda array: f"{array.dtype}{list(array.shape)}")
def test_arrays_survive_both_ways_and_mean_the_same_to_tensorflow(array: np.ndarray) -> None:
    ours = to_tensor(array)
    for tensor in (ours, tf.make_tensor_proto(array), tf.make_tensor_proto(array.tolist(), array.dtype, array.shape)):
        back = from_tensor(TensorProto.FromString(tensor.SerializeToString()))
        assert back.dtype == array.dtype
        np.testing.assert_array_equal(back, array)
    np.testing.assert_array_equal(tf.make_ndarray(ours), array)


def test_a_field_that_is_too_short_goes_on_with_its_last_value() -> None:
    tensor = tf.make_tensor_proto(3, tf.int64, (4,))
    assert len(tensor.int64_val) == 1
    assert from_tensor(tensor).tolist() == [3, 3, 3, 3] == tf.make_ndarray(tensor).tolist()


def test_text_becomes_bytes() -> None:
    assert from_tensor(to_tensor(np.array(["é"], object))).tolist() == ["é".encode()]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tensor_content": b"123"}, "3 bytes do not fit"),
        ({"int64_val": [1, 2, 3]}, "3 values do not fit"),
        ({"dtype": 15}, "not served"),
        ({"dtype": 4, "int_val": [300]}, "do not fit dtype uint8"),
        ({"dtype": 7, "tensor_content": b"12345678"}, "do not fit"),
    ],
)
def test_a_message_that_is_no_tensor_is_refused(change: dict, message: str) -> None:
    tensor = TensorProto(**{"dtype": 9} | change)
    tensor.tensor_shape.dim.add(size=1)
    with pytest.raises(ValueError, match=message):
        from_tensor(tensor)


@pytest.mark.parametrize("sizes", [(-1,), (1 << 40,), (1 << 20, 1 << 20)])
def test_a_shape_that_is_none_costs_no_memory(sizes: tuple[int, ...]) -> None:
    tensor = TensorProto(dtype=9)
    for size in sizes:
        tensor.tensor_shape.dim.add(size=size)
    with pytest.raises(ValueError, match="is not that of a tensor"):
        from_tensor(tensor)
