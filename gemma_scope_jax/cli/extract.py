"""`gemma-scope extract`."""

import dataclasses
from typing import Annotated

import tyro

import gemma_scope_jax as gs
from gemma_scope_jax.cli import shared
from gemma_scope_jax.cli.text import TextOptions


@dataclasses.dataclass(frozen=True)
class ExtractionOptions(gs.ExtractionSettings):
    """How features are extracted and stored."""

    share: tyro.conf.Suppress[tuple[int, int]] = (0, 1)


def command(
    coders: shared.Coders,
    *,
    out: shared.Folder,
    data: TextOptions,
    tokens: int | None = None,
    model: shared.Model = "",
    dtype: shared.Dtype = "auto",
    settings: ExtractionOptions,
    profile: shared.LocalPlace | None = None,
    mesh: Annotated[tuple[int, int] | None, tyro.conf.arg(metavar="DATA MODEL")] = None,
    hosts: gs.Processes,
    plan: bool = False,
    json: shared.Json = False,
) -> None:
    """Store the features that fire on a text: every coder, every token, in one model pass.

    The same command continues an interrupted one. Several processes or hosts run it side by side
    into one folder: TPU pods and SLURM are recognised, elsewhere give each `--processes N
    --process I`, and a `--coordinator` if one mesh is to span them.

    Args:
        out: The folder of the store, local or gs://.
        tokens: Read about this many tokens, <bos> included, in whole documents. The default is all.
        profile: Write a trace of a few batches to this empty folder, to open in XProf or Perfetto.
        mesh: Spread the batch and the features over this many devices. The default is one device.
        plan: Only print what it would take: tokens, bytes, memory, time.
    """
    how = dataclasses.asdict(settings) | {"tokens": tokens, "share": hosts.share()}
    gs.text_files(data.files)
    opened = shared.open_coders(coders, model, decoders=False)
    gs.check_extraction(opened.shape, opened.coders, out, opened.tokenizer, data, **how)
    weights = shared.load_model(opened.model, dtype, mesh)
    given = (weights, opened.coders, opened.tokenizer, data, out)
    if plan:
        found = gs.plan_extraction(*given, **how)
        shared.print_result(found, dataclasses.asdict(found), json)
    else:
        store = gs.extract(*given, **how, profile=profile)
        shared.print_result(store.summary(), store.describe(), json)
