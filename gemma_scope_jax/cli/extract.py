"""`gemma-scope extract`."""

import dataclasses
from typing import Annotated, Any, Literal

import tyro

import gemma_scope_jax as gs
from gemma_scope_jax.cli import shared
from gemma_scope_jax.cli.text import TextOptions


def command(
    coders: shared.Coders,
    *,
    out: shared.Folder,
    data: TextOptions = TextOptions(),
    tokens: int | None = None,
    model: shared.Model = "",
    dtype: shared.Dtype = "auto",
    batch_size: int | None = None,
    context_size: int = 1024,
    seed: int = 0,
    in_order: bool = False,
    values: Literal["float16", "float32"] = "float16",
    slots: int | None = None,
    precision: Literal["highest", "high", "default"] = "highest",
    profile: shared.LocalPlace | None = None,
    mesh: Annotated[tuple[int, int] | None, tyro.conf.arg(metavar="DATA MODEL")] = None,
    hosts: gs.Processes = gs.Processes(),
    plan: bool = False,
    json: shared.Json = False,
) -> None:
    """Store the features that fire on a text: every coder, every token, in one model pass.

    The same command goes on after an interruption. Several processes or hosts run it side by side
    into one folder: TPU pods and SLURM are recognised, elsewhere give each `--processes N
    --process I`, and a `--coordinator` if one mesh is to span them.

    Args:
        out: The folder of the store, local or gs://.
        data: The text.
        tokens: Read about so many tokens, <bos> included, in whole documents. The default is all.
        batch_size: Sequences of a batch. The default is 2,048 tokens on a CPU, 32,768 elsewhere.
        context_size: The tokens of a sequence.
        seed: The random seed of the documents' order.
        in_order: Read the documents in the order of the files.
        values: How activations are stored.
        slots: The features that a token has room for before it takes a slower path. The default is
            4 times L0.
        precision: The precision of the encoders' products; highest is float32.
        profile: An empty folder for a trace of a few batches, to open in XProf or Perfetto.
        mesh: Spread the rows and the features over this many devices. The default is one device.
        hosts: Several processes or hosts.
        plan: Only say what it would take: tokens, bytes, memory, time.
    """
    share = hosts.share()
    gs.text_files(data.files)
    opened = shared.open_coders(coders, model, decoders=False)
    settings: dict[str, Any] = dict(
        tokens=tokens,
        batch_size=batch_size,
        context_size=context_size,
        seed=None if in_order else seed,
        values=values,
        slots=slots,
        precision=precision,
        share=share,
    )
    gs.check_extraction(opened.shape, opened.coders, out, **settings)
    given = (
        shared.load_model(opened.model, dtype, mesh),
        opened.coders,
        opened.tokenizer,
        data,
        out,
    )
    if not plan:
        shared.print_store(gs.extract(*given, **settings, profile=profile or None), json)
        return
    found = gs.plan_extraction(*given, **settings)
    if json:
        shared.print_json(dataclasses.asdict(found))
    else:
        print_plan(found)


def print_plan(found: Any) -> None:
    """What an extraction would take, in a few lines."""
    batch_size, context_size = found.batch
    done = f", {found.shards_done} of them there" if found.shards_done else ""
    free = "" if found.bytes_free is None else f" ({shared.size(found.bytes_free)} free)"
    limit = "" if found.memory_limit is None else f" of {shared.size(found.memory_limit)}"
    print(
        f"text     {found.tokens:,} tokens in {found.documents:,} documents, {found.shards} "
        f"shards{done}; batches of {batch_size} x {context_size}"
    )
    each = f"{found.bytes_per_token:.0f} bytes a token"
    print(f"disk     about {shared.size(found.bytes)}{free}, {each}")
    print(f"memory   {shared.size(found.memory)}{limit} on a device")
    if found.tokens_per_second is None or found.seconds is None:
        print(
            "time     unknown: the memory does not suffice; take a smaller --batch-size, or a mesh"
        )
        return
    units = ((3600, "hours"), (60, "minutes"), (1, "seconds"))
    each, unit = next((n, unit) for n, unit in units if found.seconds >= 1.5 * n or n == 1)
    left = f"{found.seconds / each:.3g} {unit}"
    print(f"time     about {left}, at {found.tokens_per_second:,.0f} tokens/s on one batch")
