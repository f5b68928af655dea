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
    np.array([1, 2**16 - 1], np.uint16),
    np.array([1, 2**32 - 1], np.uint32),
    np.array([2**64 - 1], np.uint64),
    np.array([-1, 2**15 - 1], np.int16),
    np.array([-128, 127], np.int8),
    np.array([0.5, -2.0, 65504.0], np.float16),
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


@pytest.mark.parametrize("values", [[], [3], [3, 5], [3, 5, 7, 9], [3, 5, 7, 9, 11]])
def test_a_field_goes_on_with_its_last_value_and_no_further_than_the_shape(values: list[int]) -> None:
    tensor = TensorProto(dtype=9, int64_val=values)
    for size in (2, 2):
        tensor.tensor_shape.dim.add(size=size)
    wanted = (values + [values[-1] if values else 0] * 4)[:4]
    assert from_tensor(tensor).tolist() == [wanted[:2], wanted[2:]]
    if 0 < len(values) < 5:  # TensorFlow's own reading in Python is stricter than that of its server
        np.testing.assert_array_equal(from_tensor(tensor), tf.make_ndarray(tensor))


def test_one_value_takes_no_more_memory_than_one() -> None:
    tensor = tf.make_tensor_proto(3, tf.int64, (1 << 13, 1 << 13))
    array = from_tensor(tensor)
    assert (array.shape, array.strides) == ((1 << 13, 1 << 13), (0, 0))


def test_what_is_read_is_a_view_of_the_message() -> None:
    content = np.arange(6, dtype=np.int64)
    array = from_tensor(to_tensor(content.reshape(2, 3)))
    assert not array.flags.owndata
    assert not array.flags.writeable


def test_a_tensor_without_elements_may_carry_anything() -> None:
    tensor = TensorProto(dtype=9, tensor_content=b"abc")
    tensor.tensor_shape.dim.add(size=0)
    assert from_tensor(tensor).shape == (0,)


def test_text_becomes_bytes() -> None:
    assert from_tensor(to_tensor(np.array(["é"], object))).tolist() == ["é".encode()]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tensor_content": b"123"}, "3 bytes do not fit"),
        ({"dtype": 15}, "qint16 is not served"),
        ({"dtype": 999}, "unknown dtype enum"),
        ({"dtype": 4, "int_val": [300]}, "do not fit dtype uint8"),
        ({"dtype": 7, "tensor_content": b"12345678"}, "do not fit"),
    ],
)
def test_a_message_that_is_no_tensor_is_refused(change: dict, message: str) -> None:
    tensor = TensorProto(**{"dtype": 9} | change)
    tensor.tensor_shape.dim.add(size=1)
    with pytest.raises(ValueError, match=message):
        from_tensor(tensor)


@pytest.mark.parametrize("sizes", [(-1,), (1 << 40,), (1 << 20, 1 << 20), (1,) * 65])
def test_a_shape_that_is_none_costs_no_memory(sizes: tuple[int, ...]) -> None:
    tensor = TensorProto(dtype=9)
    for size in sizes:
        tensor.tensor_shape.dim.add(size=size)
    with pytest.raises(ValueError, match="is not that of a tensor"):
        from_tensor(tensor)
