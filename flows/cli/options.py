"""Options that commands share."""

from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from flows.option_texts import ANEW, DEVICE, GPUS_PER_WORKER, RANKS, SEED, STORE, WORKERS, sentence

if TYPE_CHECKING:
    from infra.compute.rank_count import RankCount

RefArgument = Annotated[str, typer.Argument(help="kind/digest, the beginning of a digest, or a full URI.")]
StoreOption = Annotated[str | None, typer.Option(help=sentence(STORE))]
DataOption = Annotated[
    str | None, typer.Option(help="Images, as `sftok run --data` takes them; not given: the recipe's own.")
]
SeedOption = Annotated[int | None, typer.Option(min=0, help=sentence(SEED))]
WorkersOption = Annotated[int | None, typer.Option(min=0, help=sentence(WORKERS))]
GpusPerWorkerOption = Annotated[float | None, typer.Option(min=0, help=sentence(GPUS_PER_WORKER))]


def _rank_count(text: str) -> "RankCount":
    from infra.compute.rank_count import RankCount

    try:
        return RankCount.parse(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


RanksOption = Annotated[Any, typer.Option(parser=_rank_count, metavar="N|LEAST:MOST", help=sentence(RANKS))]
DeviceOption = Annotated[
    Literal["auto", "cpu", "cuda"] | None, typer.Option(help=sentence(f"{DEVICE}; not given: auto, or the recipe's"))
]
AnewOption = Annotated[bool, typer.Option("--anew", help=sentence(ANEW))]
VerboseOption = Annotated[bool, typer.Option("--verbose", "-v", help="Show log lines, Prefect's too.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]


def device_override(device: str | None) -> list[str]:
    """Return the option --device as a change of a recipe."""
    return [] if device is None else [f"compute.device={device}"]
