from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeload.serve.stops import StopCutter

_TEXT = st.text("abc", max_size=12)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(pieces=st.lists(_TEXT, max_size=6), stops=st.lists(st.text("abc", min_size=1, max_size=4), max_size=3))
def test_the_text_ends_before_the_first_stop_string_however_it_is_cut(pieces: list[str], stops: list[str]) -> None:
    whole, cutter = "".join(pieces), StopCutter(stops)
    shown = ""
    for piece in pieces:
        shown += cutter.push(piece)
        assert not any(stop in shown for stop in stops)
    shown += cutter.flush()
    ends = [place for stop in stops if (place := whole.find(stop)) >= 0]
    if not ends:
        assert shown == whole
    else:
        assert whole.startswith(shown)
        assert not any(stop in shown for stop in stops)
        assert len(shown) <= max(ends)


@pytest.mark.parametrize(("pieces", "shown"), [(["a", "b", "c"], ["a", "", ""]), (["ab", "x"], ["a", "bx"])])
def test_the_beginning_of_a_stop_string_is_held_back(pieces: list[str], shown: list[str]) -> None:
    cutter = StopCutter(["bc"])
    assert [cutter.push(piece) for piece in pieces] == shown
