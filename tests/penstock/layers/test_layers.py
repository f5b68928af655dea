from __future__ import annotations

import numpy as np

from penstock.layers.embedding import MaskedMean


def test_the_mean_leaves_padding_out_and_the_empty_list_is_zero():
    vectors = np.array([[[1.0, 2.0], [3.0, 6.0], [9.0, 9.0]], [[5.0, 5.0]] * 3], np.float32)
    mean = MaskedMean()(vectors, np.array([[4, 7, 0], [0, 0, 0]]))
    np.testing.assert_allclose(np.asarray(mean), [[2.0, 4.0], [0.0, 0.0]])
