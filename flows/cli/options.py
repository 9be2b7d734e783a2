"""Options that commands share."""

from enum import StrEnum
from typing import Annotated

import typer


class DeviceName(StrEnum):
    """Values of --device."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


StoreOption = Annotated[
    str | None, typer.Option(help="Folder or s3://bucket/prefix of the artifacts. [default: $SFTOK_STORE, or ./store]")
]
VerboseOption = Annotated[bool, typer.Option("--verbose", "-v", help="Show log lines, Prefect's too.")]
DeviceOption = Annotated[
    DeviceName | None,
    typer.Option(
        help="Where to compute: cpu, cuda, or auto: cuda where this machine, or the Ray cluster, has a GPU. Results of "
        "the two have digests of their own. [default: auto]"
    ),
]
AnewOption = Annotated[
    bool,
    typer.Option("--anew", help="Give up unfinished shards that another kind of device began, and begin them anew."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]


def device_override(device: DeviceName | None) -> list[str]:
    """Return the option --device as a change of a recipe."""
    return [] if device is None else [f"compute.device={device.value}"]
