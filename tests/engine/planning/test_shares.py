"""The shares of a budget: one model holds the rest, and the sum never exceeds what there is."""

from __future__ import annotations

import pytest

from pipeload.planning.shares import Share, Shares


def _of(shares: Shares, fixed_bytes: int | None = None, brought_bytes: int = 0) -> Share:
    return shares.add(fixed_bytes, brought_bytes)


def test_the_first_model_holds_the_rest_and_later_ones_have_nothing_until_memory_is_moved() -> None:
    shares = Shares()
    draft = _of(shares, fixed_bytes=7)
    assert (shares.holder, draft.fixed, draft.usable_bytes, draft.counted_bytes) == (None, True, 7, 7)
    first, second = _of(shares), _of(shares)
    assert shares.holder is first
    assert (first.fixed, first.usable_bytes, first.counted_bytes) == (False, None, 0)
    assert (second.usable_bytes, second.counted_bytes) == (0, 0)
    assert shares.opened == (draft, first, second)
    assert [one.last_pass for one in shares.opened] == [1, 2, 3]
    assert [one.occupied() for one in shares.opened] == [0, 0, 0]


def test_a_model_is_alone_until_another_one_has_the_budget_too() -> None:
    shares = Shares()
    first = _of(shares)
    assert first.alone
    second = _of(shares)
    assert not first.alone
    second.leave()
    assert first.alone


def test_memory_beside_a_model_is_what_the_others_count_and_have_brought_or_all_but_its_own() -> None:
    shares = Shares()
    holder, other = _of(shares, brought_bytes=1), _of(shares, fixed_bytes=40, brought_bytes=2)
    assert holder.standing == (None, 40)
    assert other.standing == (40, 0)
    assert holder.beside_bytes(100) == 42
    assert other.beside_bytes(100) == 60
    assert other.beside_bytes(30) == 0
    other.occupied = lambda: 10
    assert holder.idle_bytes(42) == 30
    assert holder.idle_bytes(5) == 0


def test_a_smaller_share_counts_for_the_others_once_its_memory_is_given_back() -> None:
    shares = Shares()
    _of(shares)
    other = _of(shares, fixed_bytes=40)
    with other.becoming(15):
        assert (other.usable_bytes, other.counted_bytes) == (15, 40)
    assert (other.usable_bytes, other.counted_bytes) == (15, 15)
    with other.becoming(30):
        assert other.usable_bytes == 15, "a share never becomes larger so"


def test_a_share_whose_memory_cannot_be_given_back_is_what_it_was() -> None:
    shares = Shares()
    holder, other = _of(shares), _of(shares, fixed_bytes=40)
    for share, before in ((holder, None), (other, 40)):
        with pytest.raises(MemoryError), share.becoming(15):
            raise MemoryError
        assert share.usable_bytes == before
    assert shares.holder is holder


def test_the_heir_holds_the_rest_once_the_holder_has_given_its_memory_back() -> None:
    shares = Shares()
    holder, heir = _of(shares), _of(shares)
    with holder.becoming(25, heir):
        assert shares.holder is holder
    assert shares.holder is heir
    assert (holder.usable_bytes, holder.counted_bytes) == (25, 25)
    assert (heir.usable_bytes, heir.counted_bytes) == (None, 0)


def test_where_the_heir_is_closed_meanwhile_the_holder_stays() -> None:
    shares = Shares()
    holder, heir = _of(shares), _of(shares)
    with holder.becoming(25, heir):
        heir.leave()
    assert shares.holder is holder
    assert (holder.usable_bytes, holder.counted_bytes) == (None, 0)


def test_when_the_holder_leaves_the_model_that_was_called_last_holds_the_rest_and_no_draft_does() -> None:
    shares = Shares()
    holder, early, late, draft = _of(shares), _of(shares, 10), _of(shares), _of(shares, fixed_bytes=5)
    early.fixed = False
    for one in (late, early, draft):
        one.pass_begins()
        one.asked_pass = one.last_pass
    holder.occupied = lambda: 99
    holder.leave()
    assert shares.holder is early
    assert (early.usable_bytes, early.counted_bytes) == (None, 0)
    assert holder.occupied() == 0
    assert [one.asked_pass for one in shares.opened] == [0, 0, 0]
    early.leave()
    late.leave()
    assert shares.holder is None
    late.leave()
    assert shares.opened == (draft,)
