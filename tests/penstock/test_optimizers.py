from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf

from penstock.optimizers import Adam


def _steps(optimizer, dense: bool, ids) -> np.ndarray:
    table = keras.Variable(np.linspace(-1, 1, 12).reshape(4, 3).astype(np.float32))
    target = tf.ones([len(ids), 3])
    for _ in range(3):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum((tf.gather(table.value, ids) - target) ** 2)
        gradient = tape.gradient(loss, table.value)
        optimizer.apply([tf.convert_to_tensor(gradient) if dense else gradient], [table])
    return np.asarray(table)


@pytest.mark.parametrize("ids", [[0, 1], [1, 1, 2], [3, 3, 3]])
def test_equals_the_dense_update_with_repeated_ids(ids):
    dense = _steps(keras.optimizers.Adam(0.1), True, ids)
    np.testing.assert_allclose(_steps(Adam(0.1), False, ids), dense, rtol=1e-6)


def test_keras_alone_gets_repeated_ids_wrong():
    # why ours exists: the day this fails, it can go
    ids = [1, 1, 2]
    assert not np.allclose(
        _steps(keras.optimizers.Adam(0.1), False, ids), _steps(keras.optimizers.Adam(0.1), True, ids)
    )
