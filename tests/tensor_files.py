"""What must hold of tensors that were read from a file."""

import numpy as np


def assert_read_back(tensors, arrays):
    assert {t.name for t in tensors} == set(arrays)
    for t in tensors:
        expected = arrays[t.name]
        assert (t.shape, t.dtype) == (expected.shape, expected.dtype)
        np.testing.assert_array_equal(t.read(), expected)
