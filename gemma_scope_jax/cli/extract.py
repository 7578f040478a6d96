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
    data: TextOptions,
    tokens: int | None = None,
    model: shared.Model = "",
    dtype: shared.Dtype = "auto",
    batch_size: int | None = None,
    context_size: shared.ContextSize = 1024,
    seed: shared.Seed = 0,
    in_order: bool = False,
    values: Literal["float16", "float32"] = "float16",
    slots: int | None = None,
    precision: Literal["highest", "high", "default"] = "highest",
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
        batch_size: The number of sequences in a batch. The default makes batches of 2,048 tokens on
            a CPU, and of 32,768 elsewhere.
        in_order: Read the documents in the order of the files.
        values: How activations are stored.
        slots: How many features a token has room for before it takes a slower path. The default is
            4 times L0.
        precision: The precision of the encoders' products; highest is float32.
        profile: Write a trace of a few batches to this empty folder, to open in XProf or Perfetto.
        mesh: Spread the batch and the features over this many devices. The default is one device.
        plan: Only print what it would take: tokens, bytes, memory, time.
    """
    share = hosts.share()
    gs.text_files(data.files)
    opened = shared.open_coders(coders, model, decoders=False)
    settings: dict[str, Any] = {"tokens": tokens, "batch_size": batch_size, "share": share}
    settings |= {"context_size": context_size, "seed": None if in_order else seed}
    settings |= {"values": values, "slots": slots, "precision": precision}
    gs.check_extraction(opened.shape, opened.coders, out, **settings)
    weights = shared.load_model(opened.model, dtype, mesh)
    given = (weights, opened.coders, opened.tokenizer, data, out)
    if not plan:
        shared.print_store(gs.extract(*given, **settings, profile=profile), json)
        return
    found = gs.plan_extraction(*given, **settings)
    if json:
        shared.print_json(dataclasses.asdict(found))
    else:
        print_plan(found)


def print_plan(found: Any) -> None:
    """What an extraction would take, in a few lines."""
    batch = "{} x {}".format(*found.batch)
    done = f", {found.shards_done} of them there" if found.shards_done else ""
    free = "" if found.bytes_free is None else f" ({shared.size(found.bytes_free)} free)"
    limit = "" if found.memory_limit is None else f" of {shared.size(found.memory_limit)}"
    text = f"{found.tokens:,} tokens in {found.documents:,} documents, {found.shards} shards{done}"
    print(f"text     {text}; batches of {batch}")
    each = f"{found.bytes_per_token:.0f} bytes a token"
    print(f"disk     about {shared.size(found.bytes)}{free}, {each}")
    print(f"memory   {shared.size(found.memory)}{limit} on a device")
    if found.tokens_per_second is None or found.seconds is None:
        print("time     unknown: there is too little memory; use a smaller --batch-size, or a mesh")
        return
    units = ((3600, "hours"), (60, "minutes"), (1, "seconds"))
    each, unit = next((n, unit) for n, unit in units if found.seconds >= 1.5 * n or n == 1)
    speed = f"{found.tokens_per_second:,.0f} tokens/s on one batch"
    print(f"time     about {found.seconds / each:.3g} {unit}, at {speed}")
