"""A cache is copied only where it has no room, and what is behind its tokens is zero."""

from __future__ import annotations

import numpy as np
import pytest

from pipeload.pipeline.cache_room import with_room


@pytest.mark.parametrize("dtype", [np.float32, np.int8])
def test_a_cache_without_room_becomes_a_larger_copy_of_its_tokens_and_zeros(dtype: type) -> None:
    cache = np.arange(1, 25).reshape(1, 2, 3, 4).astype(dtype)
    larger = with_room(cache, 4)
    assert larger.dtype == cache.dtype
    np.testing.assert_array_equal(larger[:, :, :3], cache)
    np.testing.assert_array_equal(larger[:, :, 3:], np.zeros((1, 2, 1, 4)))
    larger[:] = 0
    assert cache.all(), "the caches of before stay as they are for a pass that fails"


@pytest.mark.parametrize("tokens", [0, 2, 3])
def test_a_cache_that_has_the_room_is_used_as_it_is(tokens: int) -> None:
    cache = np.ones((1, 2, 3, 4), np.float32)
    assert with_room(cache, tokens) is cache


def test_a_cache_may_begin_without_tokens_and_without_rows() -> None:
    assert with_room(np.ones((2, 2, 0, 4), np.float32), 5).shape == (2, 2, 5, 4)
    assert with_room(np.ones((0, 2, 1, 4), np.float32), 5).shape == (0, 2, 5, 4)
