"""`pipeload run`: arrays in, arrays out."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray

import pipeload
from pipeload.cli.options import Budget, Directory, Json, Stats, Trace, chunks, in_folder, open_model, pairs, read_sizes
from pipeload.cli.report import print_json
from pipeload.cli.terminal import say
from pipeload.errors import ConfigError
from pipeload.format.manifest import bind_dims
from pipeload.measuring.example_inputs import example_inputs
from pipeload.planning.needs import planning_dims
from pipeload.tasks.runner import config_of

__all__ = ["run"]

Arrays = dict[str, NDArray[Any]]


def run(
    directory: Directory,
    inputs: Annotated[
        list[str] | None,
        typer.Option("--input", metavar="NAME=FILE", help="A graph input as .npy file; once for each."),
    ] = None,
    random: Annotated[bool, typer.Option("--random", help="Make up the inputs that are not given.")] = False,
    sizes: Annotated[
        list[str] | None,
        typer.Option("--size", metavar="NAME=N", help="Size of a dimension of the random inputs; once for each."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(metavar="FILE", callback=in_folder, help="Save the outputs as .npz.")
    ] = None,
    passes: Annotated[int, typer.Option(metavar="N", min=1, help="Run N times.")] = 1,
    budget: Budget = "auto",
    as_json: Json = False,
    stats: Stats = False,
    trace: Trace = None,
) -> None:
    """Run a model on arrays.

    Prints the seconds of each pass, and the shape and range of each output.

    Examples:
        pipeload run models/exported/minilm --input input_ids=ids.npy --random --output out.npz

        pipeload run models/exported/bert-large --random --size sequence_length=128 --passes 5 --budget 256MB
    """
    given = {name: _read_array(name, file) for name, file in pairs(inputs, "--input").items()}
    dims = read_sizes(sizes)
    with open_model(directory, budget, stats=stats, trace=trace, sizes=dims, draft=None) as model:
        if random:
            shapes = {name: array.shape for name, array in given.items()}
            given = _random_inputs(model, bind_dims(model.inputs, shapes) | dims) | given
        _check_length(model, given)
        seconds = []
        outputs: Arrays = {}
        for _ in chunks(range(passes), 1, "Running"):
            begin = time.perf_counter()
            outputs = model.run(given)
            seconds.append(time.perf_counter() - begin)
        shown = {spec.name: outputs[spec.name] for spec in model.outputs}
    if output:
        with output.open("wb") as target:
            np.savez(target, **outputs)  # type: ignore[arg-type]
    facts = {name: _facts(array) for name, array in shown.items()}
    if as_json:
        print_json({"seconds": seconds, "outputs": facts})
        return
    for number, duration in enumerate(seconds, 1):
        say(f"pass {number}: {duration:.3f} s")
    for name, fact in facts.items():
        spread = f"  {fact['min']:.6g} .. {fact['max']:.6g}, mean {fact['mean']:.6g}" if "min" in fact else ""
        say(f"{name}: {fact['dtype']}{fact['shape']}{spread}")


def _read_array(name: str, file: str) -> NDArray[Any]:
    try:
        array = np.load(file, allow_pickle=False)
    except OSError as error:
        raise typer.BadParameter(f"{file} for {name} cannot be read as .npy: {error.strerror or error}.") from error
    except Exception as error:
        # NumPy's parser raises errors of any type. It takes unknown data for a pickle, and its message explains how to
        # load it all the same.
        why = "" if "pickle" in str(error) else f" ({error})"
        raise typer.BadParameter(
            f"{file} for {name} cannot be read as .npy{why}. Save an array of numbers with numpy.save."
        ) from error
    if not isinstance(array, np.ndarray):
        array.close()
        raise typer.BadParameter(f"{file} for {name} holds several arrays. Save each as its own .npy file.")
    return array


def _check_length(model: pipeload.Model, given: Arrays) -> None:
    """Refuse texts that are longer than the model: onnxruntime's message only names arrays that do not fit together."""
    most, ids = config_of(model).max_positions, given.get("input_ids")
    if most is not None and ids is not None and ids.ndim > 1 and ids.shape[1] > most:
        raise ConfigError(
            f"input_ids has {ids.shape[1]} tokens, and the model has positions for at most {most}. Shorten it, or "
            "lower the --size of its length."
        )


def _random_inputs(model: pipeload.Model, sizes: dict[str, int]) -> Arrays:
    """An array for each graph input that is not a cache."""
    config = config_of(model)
    height, width = config.image_height_width or (224, 224)
    image = {"num_channels": config.num_channels or 3, "height": height, "width": width}
    dims = planning_dims(model.manifest) | image | sizes
    made = example_inputs(model.manifest, dims, config.vocab_size)
    return {spec.name: made[spec.name] for spec in model.inputs}


def _facts(array: NDArray[Any]) -> dict[str, Any]:
    facts: dict[str, Any] = {"dtype": str(array.dtype), "shape": list(array.shape)}
    if array.size:
        facts |= {"min": float(array.min()), "max": float(array.max()), "mean": float(array.mean())}
    return facts
