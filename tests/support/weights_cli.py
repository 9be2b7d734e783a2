"""The commands about weights on a small command line of their own, and toy models for them."""

from pathlib import Path

import torch
import typer

from flows.cli import weights
from infra.artifacts.manifest import ArtifactPlan, ArtifactRef, folder_of, publish, ref_of
from infra.store.store import Store
from sftok.config import TeacherConfig, TransformerConfig
from sftok.model.teacher import Teacher
from sftok.model.tokenizer import SFTok
from sftok.weights.artifacts import save_teacher, save_tokenizer
from sftok.weights.convert import save_tensors, to_published
from tests.support import tiny_tokenizer

SIZE = tiny_tokenizer.SIZE
# What shapes do not show is as published: heads of 64 channels, and as many groups of a norm as fit.
TEACHER = tiny_tokenizer.TEACHER.model_copy(update={"norm_groups": 8})
_ONE_HEAD = TransformerConfig(width=64, layers=1, heads=1, init_std=0.1)
TOKENIZER = tiny_tokenizer.TOKENIZER.model_copy(update={"encoder": _ONE_HEAD, "decoder": _ONE_HEAD})


def command_line() -> typer.Typer:
    app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    weights.register(app)
    return app


def run(*arguments: object) -> int:
    """The exit code; an error is one line on stderr, as in `flows.cli.main.main`."""
    try:
        code = command_line()(args=[str(a) for a in arguments], prog_name="sftok", standalone_mode=False)
    except typer.TyperException as error:
        typer.echo(f"sftok: {' '.join(error.format_message().split())}", err=True)
        return error.exit_code
    return code if isinstance(code, int) else 0


def a_teacher(config: TeacherConfig = TEACHER) -> Teacher:
    torch.manual_seed(1)
    return Teacher(config).requires_grad_(False).eval()


def a_tokenizer(*, pixels: bool = True, legacy: bool = False) -> SFTok:
    torch.manual_seed(0)
    config = TOKENIZER.model_copy(update={"legacy_layout": legacy})
    model = SFTok(config, TEACHER, SIZE, pixels=pixels)
    model.initialise()
    if pixels:
        model.take_pixel_decoder(a_teacher())
    return model.requires_grad_(False).eval()


def published(store: Store, model: SFTok | Teacher, **inputs: ArtifactRef) -> ArtifactRef:
    """The model as an artifact."""
    kind = "teacher" if isinstance(model, Teacher) else "tokenizer"
    plan = ArtifactPlan(kind=kind, version=1, config={"toy": True}, inputs=inputs)
    folder = folder_of(store, plan.kind, plan.digest)
    files = save_teacher(model, folder) if isinstance(model, Teacher) else save_tokenizer(model, folder)
    return ref_of(store, publish(store, plan, files=files, counts={"parameters": 1}, metrics={}, seconds=0.0))


def written(folder: Path, model: SFTok | Teacher, name: str = "weights.bin") -> Path:
    """The model as a published file."""
    save_tensors(to_published(model), folder / name, "bin" if name.endswith(".bin") else "safetensors")
    return folder / name
