"""Large-scale sparse features: `extract`, `verify`, `export`."""

from typing import Annotated, Any, Literal

import tyro

from gemma_scope_jax.cli.shared import (
    Coders,
    Dtype,
    Files,
    Folder,
    LocalPlace,
    Name,
    NameOrPlace,
    Place,
    Roles,
    load_all,
)
from gemma_scope_jax.errors import InputError
from gemma_scope_jax.model.processes import check_share, join_processes


def extract(
    coders: Coders,
    *,
    out: Folder,
    text: Files = (),
    tfds: Name = "",
    messages: Name = "",
    roles: Roles = ("model",),
    field: Name = "text",
    skip_bad: bool = False,
    tokens: int | None = None,
    model: NameOrPlace = "",
    dtype: Dtype = "auto",
    rows: int | None = None,
    length: int = 1024,
    seed: int = 0,
    in_order: bool = False,
    values: Literal["float16", "float32"] = "float16",
    slots: int | None = None,
    precision: Literal["highest", "high", "default"] = "highest",
    profile: LocalPlace | None = None,
    mesh: Annotated[tuple[int, int] | None, tyro.conf.arg(metavar="DATA MODEL")] = None,
    coordinator: Name = "",
    processes: int | None = None,
    process: int | None = None,
    wait: float = 60.0,
    plan: bool = False,
    json: bool = False,
) -> None:
    """Store the features that fire on a text: every coder, every token, in one model pass.

    The same command goes on after an interruption. Several processes or hosts run it side by side
    into one folder: TPU pods and SLURM are recognised, elsewhere give each `--processes N
    --process I`, and a `--coordinator` if one mesh is to span them.

    Args:
        coders: Addresses of the release, folders, packaged coders, or globs of them.
        out: Folder of the store, local or gs://.
        text: Text files: .txt, .jsonl, .jsonl.gz, .jsonl.zst, .array_record.
        tfds: Instead: a TensorFlow Datasets name.
        messages: The key under which JSON records hold a chat.
        roles: Whose tokens count in chats.
        field: The key that holds the text in JSON records.
        skip_bad: Leave out records that cannot be used.
        tokens: Read about so many, <bos> included, in whole documents; default: all.
        model: A name, a folder or a file; default: the coders' model.
        dtype: Of the model; auto is float32 on a CPU and bfloat16 elsewhere.
        rows: Rows of a batch; default: 2,048 tokens on a CPU, 32,768 elsewhere.
        length: Tokens of a row.
        seed: Of the documents' order.
        in_order: Take the documents as they lie.
        values: How activations are kept.
        slots: Features a token has room for before it takes a slower path; default: 4 times L0.
        precision: Of the encoders' products; highest is float32.
        profile: An empty folder for a trace of a few batches, to look at in XProf or Perfetto.
        mesh: Devices to spread the rows and the features over; default: one device.
        coordinator: Address and port of the first of several processes that are one program.
        processes: How many processes share the work.
        process: Which this is, from 0.
        wait: Seconds that processes with a coordinator wait for one another.
        plan: Only say what it would take: tokens, bytes, memory, time.
        json: Print JSON.
    """
    from gemma_scope_jax.data.documents import TextData

    if not coders:
        raise InputError("name at least one coder")
    data = TextData(
        files=text, tfds=tfds, messages=messages, roles=roles, field=field, skip_bad=skip_bad
    )
    check_share(processes, process)
    share = (0, 1)
    if coordinator or processes is None:
        join_processes(coordinator, processes, process, wait)
    elif processes > 1:
        if process is None:
            raise InputError(f"of {processes} processes, which is this? give --process, from 0")
        share = (process, processes)
    loaded_model, loaded, tok = load_all(model, coders, dtype, mesh=mesh, decoders=False)
    from gemma_scope_jax.extraction.estimate import plan_extraction, print_plan, print_store
    from gemma_scope_jax.extraction.extract import extract as run_extraction

    settings: dict[str, Any] = dict(
        tokens=tokens,
        rows=rows,
        length=length,
        seed=None if in_order else seed,
        values=values,
        slots=slots,
        precision=precision,
        share=share,
    )
    if plan:
        print_plan(plan_extraction(loaded_model, loaded, tok, data, out, **settings), json=json)
    else:
        settings["profile"] = profile
        print_store(run_extraction(loaded_model, loaded, tok, data, out, **settings), json=json)


Store = Annotated[Place, tyro.conf.Positional, tyro.conf.arg(metavar="STORE")]


def verify(store: Store) -> None:
    """Read every byte of a feature store and say which file is damaged, if any is.

    Args:
        store: The folder that `extract` filled.
    """
    from gemma_scope_jax.extraction.estimate import print_store
    from gemma_scope_jax.extraction.store.store import FeatureStore

    found = FeatureStore(store)
    found.verify()
    print_store(found)


def export(
    store: Store,
    *,
    out: Annotated[LocalPlace, tyro.conf.arg(metavar="FOLDER")],
    format: Literal["parquet", "delphi"] = "parquet",
    splits: int | None = None,
    json: bool = False,
) -> None:
    """Write a feature store as Parquet tables or as delphi's cache of latents.

    Args:
        store: The folder that `extract` filled.
        out: A new folder.
        format: parquet needs extra `parquet`; delphi reads safetensors.
        splits: Files that delphi's features are split into.
        json: Print JSON.
    """
    from gemma_scope_jax.extraction.export import export_store, print_export
    from gemma_scope_jax.extraction.store.store import FeatureStore

    found = FeatureStore(store)
    print_export(found, export_store(found, out, format, splits=splits), json_output=json)
