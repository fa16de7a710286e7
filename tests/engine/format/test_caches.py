"""What a manifest says about its caches: where they grow, and by which input."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tests.engine.plans import manifest_of

from pipeload.errors import ConfigError
from pipeload.format.caches import can_be_cut, grown_axis, growth, length_input, past_symbols
from pipeload.format.manifest import Cache, Manifest, TensorSpec


def _manifest(before: tuple[int | str, ...], after: tuple[int | str, ...], mask: tuple[int | str, ...]) -> Manifest:
    """A model with one cache and a mask."""
    return replace(
        manifest_of([1]),
        inputs=(
            TensorSpec(name="mask", dtype="int64", shape=mask),
            TensorSpec(name="past", dtype="float32", shape=before),
        ),
        outputs=(TensorSpec(name="present", dtype="float32", shape=after),),
        caches=(Cache(input="past", output="present"),),
    )


GROWING = _manifest(("batch", 4, "past", 8), ("batch", 4, "past + length", 8), ("batch", "length + past"))


def test_a_cache_grows_along_the_only_axis_that_differs_after_a_pass() -> None:
    assert growth(GROWING) == (2, "past + length")
    assert can_be_cut(GROWING)
    assert length_input(GROWING) == ("mask", 1)
    assert past_symbols(GROWING) == {"past"}


def test_an_axis_is_grown_only_where_it_alone_differs_and_depends_on_the_pass() -> None:
    assert grown_axis(("a", 1), ("a + b", 1)) == 0
    assert grown_axis(("a", 1), ("a", 1)) is None
    assert grown_axis(("a", 1), ("a + b", 2)) is None
    assert grown_axis(("a", 1), ("a", 2)) is None
    assert grown_axis(("a",), ("a", 1)) is None


def test_a_model_whose_caches_do_not_grow_cannot_decode() -> None:
    fixed = _manifest(("batch", 4), ("batch", 4), ("batch",))
    assert not can_be_cut(fixed)
    with pytest.raises(ConfigError, match="Cache 'past' does not grow"):
        growth(fixed)


def test_a_model_without_an_input_as_long_as_its_caches_says_so() -> None:
    short = _manifest(("batch", 4, "past", 8), ("batch", 4, "past + length", 8), ("batch", "length"))
    with pytest.raises(ConfigError, match=r"No input of the model is past \+ length long"):
        length_input(short)
