"""Text on the command line: the fields of `gs.TextData`, with its files called --text."""

import dataclasses
from typing import Annotated

import tyro

import gemma_scope_jax as gs
from gemma_scope_jax.cli import shared

Files = Annotated[
    tuple[shared.Place, ...], tyro.conf.arg(name="text", metavar="GLOB...", help_behavior_hint="")
]


@dataclasses.dataclass(frozen=True)
class TextOptions(shared.Options, gs.TextData):
    """The text that is read, and which of its tokens are used."""

    files: Files = ()
