"""Text that one thread generates and another one reads. Gates say which thread is where; none sleeps."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from tests.engine.harness import Background, Clock, Gate
from tests.engine.tasks.fakes import Array, ToyDecoder, ToyState, write_bert_tokenizer

from pipeload.errors import ConfigError, DeadlineError
from pipeload.pipeline import deadlines
from pipeload.tasks.generate.generate import Generation, generate
from pipeload.tasks.generate.streaming import TextStream

pytest.importorskip("tokenizers")

WORDS = [" dog", " sat", " on", " mat"]
SCRIPT = [7, 8, 9, 10]


class GatedDecoder(ToyDecoder):
    """A decoder that stops at a gate before each step."""

    def __init__(self, directory: Path, gates: list[Gate], **options: Any) -> None:
        write_bert_tokenizer(directory)
        super().__init__(directory, **options)
        self.gates = gates

    def step(self, inputs: Mapping[str, Array], state: ToyState, *, positions: int = 1) -> Any:
        self.gates[len(self.steps)].stop_here()
        return super().step(inputs, state, positions=positions)


def _start(model: ToyDecoder, stream: TextStream, prompt: Any = "the cat") -> Background:
    return Background(lambda: generate(model, prompt, max_new_tokens=4, streamer=stream))


def test_pieces_come_while_the_generation_goes_on(tmp_path: Path) -> None:
    gates = [Gate() for _ in SCRIPT]
    model, stream = GatedDecoder(tmp_path, gates, script=SCRIPT), TextStream()
    writer = _start(model, stream)
    pieces = iter(stream)
    for gate, word in zip(gates, WORDS, strict=True):
        gate.wait_reached()
        gate.open()
        assert next(pieces) == word
    assert list(pieces) == []
    assert writer.end().text == "".join(WORDS)


def test_a_reader_may_come_late(tmp_path: Path) -> None:
    model, stream = GatedDecoder(tmp_path, [Gate(opened=True)] * 4, script=SCRIPT), TextStream()
    result = _start(model, stream).end()
    assert list(stream) == WORDS
    assert result.finish_reason == "length"
    assert list(stream) == []


def test_an_error_is_raised_on_both_sides(tmp_path: Path) -> None:
    # The script has no second token.
    model, stream = GatedDecoder(tmp_path, [Gate(opened=True)] * 4, script=SCRIPT[:1]), TextStream()
    writer = _start(model, stream)
    pieces = iter(stream)
    assert next(pieces) == " dog"
    with pytest.raises(IndexError):
        next(pieces)
    assert isinstance(writer.wait(), IndexError)
    assert model.states[0].closed


def test_an_error_before_the_first_step_is_raised_on_both_sides(tmp_path: Path) -> None:
    stream = TextStream()
    writer = _start(GatedDecoder(tmp_path, []), stream, prompt=["one", "two"])
    with pytest.raises(ConfigError, match="streamer takes a single sequence"):
        list(stream)
    assert isinstance(writer.wait(), ConfigError)


@pytest.mark.parametrize("how", ["break", "close", "with"])
def test_a_reader_that_stops_ends_the_generation(tmp_path: Path, how: str) -> None:
    gates = [Gate() for _ in SCRIPT]
    model, stream = GatedDecoder(tmp_path, gates, script=SCRIPT), TextStream()
    writer = _start(model, stream)
    gates[0].open()
    if how == "break":
        for piece in stream:
            assert piece == " dog"
            break
    elif how == "with":
        with stream:
            assert next(iter(stream)) == " dog"
    else:
        gates[1].wait_reached()
        stream.close()
    # It may be at its second step by now, which it ends; a third one would hang.
    gates[1].open()
    result = writer.end()
    assert result.finish_reason == "abort"
    assert result.token_ids in ((7,), (7, 8))
    assert result.text == "".join(WORDS[: len(result.token_ids)])
    assert model.states[0].closed
    assert list(stream) == []


def test_closing_wakes_a_reader_that_waits(tmp_path: Path) -> None:
    gate = Gate()
    model, stream = GatedDecoder(tmp_path, [gate], script=SCRIPT), TextStream()
    writer, reader = _start(model, stream), Background(lambda: list(stream))
    gate.wait_reached()
    stream.close()
    assert reader.end() == []
    gate.open()
    assert writer.end().token_ids == (7,)


def test_a_stream_that_was_closed_before_makes_no_token(tmp_path: Path) -> None:
    model, stream = GatedDecoder(tmp_path, []), TextStream()
    stream.close()
    assert generate(model, "the cat", streamer=stream, logprobs=True) == Generation(
        text="", token_ids=(), prompt_tokens=4, finish_reason="abort", logprobs=(), sweeps=0
    )
    assert model.steps == []


def test_a_stream_is_for_one_generation(tmp_path: Path) -> None:
    model, stream = GatedDecoder(tmp_path, [Gate(opened=True)] * 8, script=SCRIPT * 2), TextStream()
    generate(model, "the cat", max_new_tokens=4, streamer=stream)
    with pytest.raises(ConfigError, match="given to a generation already"):
        generate(model, "the cat", max_new_tokens=4, streamer=stream)
    assert list(stream) == WORDS


def test_a_task_of_asyncio_reads_pieces_as_they_come(tmp_path: Path) -> None:
    gates = [Gate() for _ in SCRIPT]
    model, stream = GatedDecoder(tmp_path, gates, script=SCRIPT), TextStream()

    async def read() -> list[str]:
        writer = asyncio.create_task(
            asyncio.to_thread(lambda: generate(model, "the cat", max_new_tokens=4, streamer=stream))
        )
        pieces = []
        gates[0].open()
        async for piece in stream:
            pieces.append(piece)
            for gate in gates[len(pieces) : len(pieces) + 1]:
                gate.open()
        assert (await writer).finish_reason == "length"
        return pieces

    assert asyncio.run(read()) == WORDS


@pytest.mark.parametrize("waits", [True, False], ids=["while it waits", "before it begins"])
def test_a_task_that_is_cancelled_ends_the_generation(tmp_path: Path, waits: bool) -> None:
    gates = [Gate() for _ in SCRIPT]
    model, stream = GatedDecoder(tmp_path, gates, script=SCRIPT), TextStream()
    writer = _start(model, stream)

    async def read() -> None:
        with stream:
            async for _ in stream:
                pytest.fail("no piece was made")

    async def main() -> None:
        reader = asyncio.create_task(read())
        if waits:
            await asyncio.sleep(0)
        reader.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reader
        stream.close()

    gates[0].wait_reached()
    asyncio.run(main())
    for gate in gates:
        gate.open()
    # The step that ran has made its token, and no other follows.
    made = writer.end()
    assert (made.text, made.finish_reason) == (WORDS[0], "abort")


def test_the_error_of_a_generation_reaches_a_task(tmp_path: Path) -> None:
    stream = TextStream()
    writer = _start(GatedDecoder(tmp_path, []), stream, prompt=["one", "two"])

    async def read() -> None:
        async for _ in stream:
            pass

    with pytest.raises(ConfigError, match="streamer takes a single sequence"):
        asyncio.run(read())
    assert isinstance(writer.wait(), ConfigError)


def test_a_generation_outlives_the_loop_of_its_reader(tmp_path: Path) -> None:
    gates = [Gate() for _ in SCRIPT]
    stream = TextStream()
    writer = _start(GatedDecoder(tmp_path, gates, script=SCRIPT), stream)

    async def read() -> str:
        gates[0].open()
        async for piece in stream:
            return piece
        return ""

    assert asyncio.run(read()) == WORDS[0]
    for gate in gates:
        gate.open()
    assert writer.end().finish_reason == "abort"


def test_a_deadline_goes_with_the_stream_to_the_thread_that_generates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, left = Clock(), list[float | None]()
    monkeypatch.setattr(deadlines, "time", clock)

    class Timed(GatedDecoder):
        def step(self, inputs: Mapping[str, Array], state: ToyState, *, positions: int = 1) -> Any:
            left.append(deadlines.left_s())
            deadlines.check("before a pass began")
            return super().step(inputs, state, positions=positions)

    gates = [Gate() for _ in SCRIPT]
    model = Timed(tmp_path, gates, script=SCRIPT)
    with deadlines.deadline(60):
        stream = TextStream()
    writer, pieces = _start(model, stream), iter(stream)
    gates[0].wait_reached()
    gates[0].open()
    gates[1].wait_reached()
    clock.now_s += 70
    gates[1].open()
    # Pieces that were given stay given; then both sides have the error.
    assert [next(pieces), next(pieces)] == WORDS[:2]
    with pytest.raises(DeadlineError, match="60 s passed before a pass began"):
        next(pieces)
    assert isinstance(writer.wait(), DeadlineError)
    assert left == [60, 60, 0]
    assert model.states[0].closed


@pytest.mark.parametrize("in_a_task", [False, True])
def test_a_reader_that_is_late_ends_the_generation(tmp_path: Path, in_a_task: bool) -> None:
    gates = [Gate() for _ in SCRIPT]
    model, stream = GatedDecoder(tmp_path, gates, script=SCRIPT), TextStream()
    writer = _start(model, stream)
    gates[0].open()
    gates[1].wait_reached()
    pieces: list[str] = []

    async def read_in_a_task() -> None:
        async for piece in stream:
            pieces.append(piece)

    def read() -> None:
        if in_a_task:
            asyncio.run(read_in_a_task())
        pieces.extend(stream)

    with pytest.raises(DeadlineError, match="while its reader waited for text"), deadlines.deadline(0.01):
        read()
    gates[1].open()
    assert pieces == WORDS[:1]
    assert writer.end().finish_reason == "abort"
