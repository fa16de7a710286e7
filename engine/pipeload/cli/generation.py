"""The options of the commands that generate text. None takes the model's own setting."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import typer

__all__ = [
    "Draft",
    "Lookup",
    "MinNewTokens",
    "MinP",
    "NoRepeatNgramSize",
    "OwnDraft",
    "RepetitionPenalty",
    "Sample",
    "Seed",
    "Stop",
    "Temperature",
    "TopK",
    "TopP",
    "implied_sampling",
]


def implied_sampling(do_sample: bool | None, **options: Any) -> bool | None:
    """`--sample` where an option is given that only sampling uses; None leaves it to the model.

    Raises:
        typer.BadParameter: `--greedy` is given with such an option.
    """
    given = [name for name, value in options.items() if value is not None]
    if not given or options.get("temperature") == 0:
        return do_sample
    if do_sample is False:
        raise typer.BadParameter(
            f"--{given[0].replace('_', '-')} samples, and --greedy does not. Leave one of them out."
        )
    return True


MinNewTokens = Annotated[int | None, typer.Option(metavar="N", min=0, help="No end of the text before N tokens.")]
Sample = Annotated[
    bool | None, typer.Option("--sample/--greedy", help="Draw each token by its probability, or take the likeliest.")
]
Temperature = Annotated[
    float | None,
    typer.Option(metavar="T", help="Sample; below 1 likely tokens become likelier, above 1 less so, 0 is --greedy."),
]
TopK = Annotated[int | None, typer.Option(min=0, help="Sample from the N likeliest tokens; 0 from all.", metavar="N")]
TopP = Annotated[
    float | None,
    typer.Option(metavar="P", min=0, max=1, help="Sample from the likeliest tokens that add up to this probability."),
]
MinP = Annotated[
    float | None,
    typer.Option(metavar="P", min=0, max=1, help="Sample from tokens this many times as likely as the likeliest."),
]
RepetitionPenalty = Annotated[
    float | None, typer.Option(metavar="X", help="Above 1 tokens that were there already become less likely.")
]
NoRepeatNgramSize = Annotated[
    int | None, typer.Option(metavar="N", min=0, help="No N tokens in a row come twice; 0 allows it.")
]
Stop = Annotated[
    list[str] | None, typer.Option(metavar="TEXT", help="End after this text; may be given several times.")
]
Seed = Annotated[int | None, typer.Option(metavar="N", min=0, help="With --sample: the same texts each time.")]
Lookup = Annotated[
    int | None,
    typer.Option(
        "--lookup",
        metavar="N",
        min=1,
        help="Guess up to N tokens from what followed the same ones before, and check them in one pass.",
    ),
]
Draft = Annotated[
    str,
    typer.Option(
        "--draft",
        metavar="auto|none|DIR",
        help="Let the model's own draft guess tokens where it has one and that pays; none does not; or let a smaller "
        "model with the same tokenizer guess. The budget holds for both together.",
    ),
]
OwnDraft = Annotated[
    Literal["auto", "none"],
    typer.Option(
        "--draft", help="Let the model's own draft guess tokens where it has one and that pays; none does not."
    ),
]
