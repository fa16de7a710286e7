"""A model that drafts for itself: the same tokens, one budget for both, and a line where the draft is left out."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from tests.engine.still_machine import PROCESS_BYTES
from tests.engine.tasks.generate.drafted import make_drafted
from tests.engine.tasks.generate.drafting import PROMPT, assert_counted, assert_same, steered

import pipeload

_CASES: Mapping[str, Mapping[str, Any]] = {
    "greedy": {},
    "sampled": {"do_sample": True, "seed": 3, "top_k": 0},
    "top_p": {"do_sample": True, "seed": 4, "top_p": 0.9, "logprobs": True},
    "the end within a draft": {"eos_token_id": 8},
    "a single token": {"max_new_tokens": 1},
}
_BUDGET = PROCESS_BYTES + 68_000_000
"""The runtime takes 18 MB of it. There is room for the draft, and not for all of the model."""
_LARGE = _BUDGET + 8_000_000
"""Room for longer texts."""
_TIGHT, _TIGHTEST = _BUDGET - 6_000_000, _BUDGET - 18_000_000
"""Less for the model; and too little for the draft."""


@pytest.fixture(scope="module")
def drafted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("onnx")
    return make_drafted(tmp_path_factory.mktemp("drafted") / "model")


def load(directory: Path, budget: int = _BUDGET, **options: Any) -> pipeload.Model:
    return pipeload.load(directory, budget, **options)


def alone_of(directory: Path) -> pipeload.Model:
    """The model without its draft, opened last: it counts the memory of the others."""
    return pipeload.load(directory, 10**9, draft=None)


def generate(model: pipeload.Model, prompt: Any = PROMPT, **options: Any) -> Any:
    every = {"max_new_tokens": 16, "logits_processor": [steered()], "eos_token_id": [], **options}
    return model.generate(prompt, **every)


def test_tokens_are_those_of_the_model_alone(drafted: Path) -> None:
    drafted_tokens = 0
    with load(drafted) as model, alone_of(drafted) as alone:
        assert model.draft is not None
        assert model.draft.used, str(model.draft)
        assert alone.draft is None
        for case, options in _CASES.items():
            plain, made = generate(alone, **options), generate(model, **options)
            assert plain.drafted_tokens == 0
            assert_same(made, plain, case)
            assert_counted(made, case)
            drafted_tokens += made.drafted_tokens
    assert drafted_tokens > 10


def test_several_texts_and_lookups_are_made_without_it(drafted: Path) -> None:
    with load(drafted) as model, alone_of(drafted) as alone:
        assert [made.token_ids for made in generate(model, [PROMPT, PROMPT[1:]])] == [
            made.token_ids for made in generate(alone, [PROMPT, PROMPT[1:]])
        ]
        looked = generate(model, prompt_lookup_num_tokens=4)
        assert_same(looked, generate(alone))
        assert model.own_draft is not None
        assert model.own_draft.model is not None
        assert model.own_draft.model.stats.passes == 0


def test_callers_at_once_get_their_own_texts(drafted: Path) -> None:
    with load(drafted) as model, alone_of(drafted) as alone:
        plain = {first: generate(alone, [first, *PROMPT]).token_ids for first in range(3)}
        made: dict[int, Any] = {}
        threads = [
            threading.Thread(target=lambda first=first: made.update({first: generate(model, [first, *PROMPT])}))
            for first in plain
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert {first: one.token_ids for first, one in made.items()} == plain


def test_a_session_goes_on_with_it(drafted: Path) -> None:
    with load(drafted) as model, alone_of(drafted) as alone:
        with model.session() as session, alone.session() as other:
            text = list(PROMPT)
            for _ in range(3):
                options = {"max_new_tokens": 9, "logits_processor": [steered()], "eos_token_id": []}
                made, plain = session.generate(text, **options), other.generate(text, **options)
                assert_same(made, plain)
                text += [*made.token_ids, 5]
            assert made.drafted_tokens > 0


def test_a_long_prompt_is_read_in_pieces(drafted: Path) -> None:
    with load(drafted, _LARGE) as model, alone_of(drafted) as alone:
        assert_same(generate(model, PROMPT * 9, max_new_tokens=5), generate(alone, PROMPT * 9, max_new_tokens=5))
        assert model.own_draft is not None
        assert model.own_draft.model is not None
        assert model.own_draft.model.stats.passes > 2


def test_both_keep_to_one_budget(drafted: Path) -> None:
    """Each plan counts the other model's memory: together they are below the budget."""
    with load(drafted, _LARGE) as model:
        generate(model, PROMPT * 7, max_new_tokens=20)
        own = model.own_draft
        assert own is not None
        assert own.model is not None, str(model.draft)
        plans = [model.plan, own.model.plan]  # type: ignore[attr-defined]
        beside = [plan.peak_bytes - plan.process_bytes for plan in plans]
        assert all(plan.peak_bytes <= plan.budget_bytes for plan in plans)
        assert PROCESS_BYTES + sum(beside) <= _LARGE
        assert plans[0].streamed_bytes > 0
        assert plans[1].streamed_bytes == 0, "the draft stays in memory"


@pytest.mark.parametrize(
    ("budget", "line"),
    [
        (_TIGHTEST, "draft left out: needs 18.1 MB, 6.0 MB are free beside the model"),
        (10**9, "draft left out: the model fits into memory"),
    ],
)
def test_a_line_says_why_it_is_left_out(drafted: Path, budget: int, line: str) -> None:
    with load(drafted, budget) as model:
        assert str(model.draft) == line
        assert generate(model).drafted_tokens == 0


def test_guesses_that_are_seldom_right_do_not_pay(tmp_path: Path) -> None:
    with load(make_drafted(tmp_path / "model", top1=0.0)) as model:
        assert model.draft is not None
        assert str(model.draft).startswith("draft left out: would give ")
        assert model.draft.tokens_per_s <= model.draft.plain_tokens_per_s


def test_guesses_that_turn_out_wrong_end_the_draft(drafted: Path) -> None:
    with load(drafted) as model, alone_of(drafted) as alone:
        for number in range(8):
            prompt = [(7 * number + place * place) % 96 for place in range(5)]
            assert_same(generate(model, prompt), generate(alone, prompt))
        assert model.draft is not None
        assert not model.draft.used
        assert "of its guesses were right; it would give" in str(model.draft)
        assert model.own_draft is not None
        assert model.own_draft.model is None
    with load(drafted, draft=None) as other:
        assert model.plan.process_bytes == other.plan.process_bytes, "the model had the draft's memory"


def test_a_pass_that_needs_its_memory_gets_it(drafted: Path) -> None:
    """A prompt that fits without the draft is no error beside it."""
    with load(drafted, _TIGHT) as model, alone_of(drafted) as alone:
        assert model.draft is not None
        assert model.draft.used
        assert_same(generate(model, PROMPT * 12, max_new_tokens=2), generate(alone, PROMPT * 12, max_new_tokens=2))
        assert not model.draft.used


def test_a_new_budget_holds_for_both(drafted: Path) -> None:
    with load(drafted) as model:
        plain = generate(model)
        for budget, used in ((_BUDGET + 3_000_000, True), (_BUDGET - 3_000_000, True), (_TIGHTEST, False)):
            model.set_budget(budget)
            assert model.draft is not None
            assert model.draft.used is used, str(model.draft)
            assert model.plan.budget_bytes == budget
            assert_same(generate(model), plain)
        with pytest.raises(pipeload.BudgetError):
            model.set_budget(1)


def test_closing_ends_both(drafted: Path) -> None:
    before = threading.active_count()
    model = load(drafted)
    assert model.own_draft is not None
    draft = model.own_draft.model
    assert draft is not None
    generate(model)
    model.close()
    model.close()
    assert threading.active_count() == before
    with pytest.raises(pipeload.ClosedError):
        draft.new_state()
    with pytest.raises(pipeload.ClosedError):
        generate(model)


def test_a_damaged_draft_is_a_line_and_not_an_error(drafted: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(drafted, broken)
    manifest = broken / "draft" / "pipeload.json"
    manifest.write_bytes(manifest.read_bytes().replace(b'"toy"', b'"tow"'))
    with load(broken) as model:
        assert "draft left out: it cannot be opened. 'draft/pipeload.json' is not the file" in str(model.draft)
        plain = generate(model)
    shutil.rmtree(broken / "draft")
    with load(broken) as model:
        assert "'draft/pipeload.json' cannot be read" in str(model.draft)
        assert_same(generate(model), plain)


def test_a_draft_that_fails_midway_is_a_warning(drafted: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(drafted, broken)
    for file in (broken / "draft" / "shards").glob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:-8] + b"\1" * 8)
    with load(broken) as model, alone_of(drafted) as alone:
        with pytest.warns(UserWarning, match="goes on without drafts, since the draft model failed"):
            made = generate(model)
        assert_same(made, generate(alone))


def test_other_values_are_refused(drafted: Path) -> None:
    with pytest.raises(pipeload.ConfigError, match="draft is 'int4'; it must be 'auto' or None"):
        pipeload.load(drafted, draft="int4")  # type: ignore[arg-type]
