"""What subcommands share: types of arguments, input, opening coders and models, output."""

import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

import gemma_scope_jax as gs
from gemma_scope_jax.errors import InputError
from gemma_scope_jax.progress import console, stage

_UNPRINTED = re.compile(r"[^ -~]")
PACKAGED_CODER = "gemma-3-270m-resid-post-12-width-4k-l0-50"
PIPE_WIDTH = 300  # in a file or a pipe nothing need be cut


def _of_place(kind: type) -> Any:
    """How an option that names a place is read: `~` is the home folder, also in --option=~/file,
    which no shell expands. Addresses in buckets and on the hub have none."""
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="PATH",
        instance_from_str=lambda words: kind(os.path.expanduser(words[0])),
        is_instance=lambda value: isinstance(value, kind),
        str_from_instance=lambda value: [os.fspath(value)],
    )


def _arg(metavar: str | None = None, help: str | None = None, **more: Any) -> Any:
    return tyro.conf.arg(metavar=metavar, help=help, **more)


Place = Annotated[str, _of_place(str)]
LocalPlace = Annotated[Path, _of_place(Path)]
Name = Annotated[str, _arg("NAME")]
NameOrPlace = Annotated[Place, _arg("NAME")]  # of a model or a coder
Folder = Annotated[Place, _arg("FOLDER")]
BucketFile = Annotated[Place, _arg("FILE")]  # local or gs://
File = Annotated[LocalPlace | None, _arg("FILE", help_behavior_hint="")]
# options of several commands, with their help
Coder = Annotated[
    Place,
    tyro.conf.Positional,
    _arg("CODER", "The coder: an address of the release, a folder, or a packaged coder."),
]
Coders = Annotated[
    tuple[Place, ...],
    tyro.conf.Positional,
    _arg(
        "CODER...",
        "The coders: addresses of the release, folders, packaged coders, or globs of them.",
        help_behavior_hint="",
    ),
]
Store = Annotated[
    Place, tyro.conf.Positional, _arg("STORE", "The folder that `gemma-scope extract` filled.")
]
Model = Annotated[
    Place, _arg("NAME", "The model: a name, a folder or a file. The default is the coders' model.")
]
Dtype = Annotated[
    Literal["auto", "float32", "bfloat16"],
    _arg(help="The dtype of the model; auto is float32 on a CPU and bfloat16 elsewhere."),
]
Json = Annotated[bool, _arg(help="Print JSON.")]


class Refused(Exception):
    """An `InputError` from the fields of a dataclass, which tyro would take for a mistake of its
    own: it draws a box around every ValueError."""


class Options:
    """Before a dataclass of the library among a class's bases: what is wrong is one line."""

    def __post_init__(self) -> None:
        try:
            super().__post_init__()  # type: ignore[misc]
        except InputError as error:
            raise Refused(str(error)) from error


def given_text(text: str, file: Path | None) -> str:
    """The text to look at; of standard input and files without the line break at the end."""
    if text and file is not None:
        raise InputError("give a text or --file FILE, not both")
    if file is not None:
        text = gs.read_text(file)
    elif text == "-":
        text = gs.decoded(sys.stdin.buffer.read(), "standard input").removesuffix("\n")
    if not text.strip():
        raise InputError('the text is empty: give one, "-" for standard input, or --file FILE')
    return text


def print_json(value: Any) -> None:
    """Print JSON whose texts stay legible; control characters in them are JSON's own escapes."""
    text = gs.legible(json.dumps(value, ensure_ascii=False))
    print(_UNPRINTED.sub(lambda c: c[0] if c[0].isprintable() else json.dumps(c[0])[1:-1], text))


def open_coders(names: str | Sequence[str], model: str = "", **options: Any) -> Any:
    """`gs.open_coders`, said on stderr."""
    gs.use_compilation_cache()
    named = [names] if isinstance(names, str) else names
    with stage(f"loading coder{'s' * (len(named) > 1)} {' '.join(named)}"):
        return gs.open_coders(names, model, **options)


def load_model(name: str, dtype: str, mesh: tuple[int, int] | None = None) -> Any:
    """A model, and how far it is; `mesh`: (data, model) devices that it is spread over."""
    import jax

    if dtype == "auto":
        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    progress = gs.Progress(None, "bytes", what=f"loading model {name} ({dtype})")
    spread = {} if mesh is None else {"mesh": gs.make_mesh(*mesh)}
    return gs.load_model(name, dtype=dtype, progress=progress, **spread)


def screen() -> Any:
    """The rich console of stdout, as wide as the terminal; in files and pipes nothing is cut."""
    return console(width=None if sys.stdout.isatty() else PIPE_WIDTH)


def print_whole(part: Any) -> None:
    """Print a table with no number cut: in a narrow terminal its lines are too long instead."""
    from rich.measure import Measurement

    wide = screen()
    least = Measurement.get(wide, wide.options, part).minimum
    wide.print(part, width=max(wide.width, least), no_wrap=False, crop=False)


def print_store(store: Any, json: bool = False) -> None:
    """What a feature store holds, and where it is."""
    entries = [sum(of) for of in zip(*(shard["entries"] for shard in store.shards))]
    lists = [(c["name"], layer) for c in store.manifest["coders"] for layer in c["layers"]]
    l0 = [n / max(store.counted_by(name), 1) for (name, _), n in zip(lists, entries)]
    if json:
        sparsity = [{"coder": n, "layer": i, "l0": v} for (n, i), v in zip(lists, l0)]
        facts = {"complete": store.complete, "tokens": len(store), "counted": store.counted}
        print_json({"folder": str(store.folder), **facts, "bytes": store.bytes, "l0": sparsity})
        return
    for (name, layer), value in zip(lists, l0):
        print(f"{name}  layer {layer}  L0 {value:.1f}")
    each = store.bytes / max(len(store), 1)
    print(
        f"{store.counted:,} tokens with features, {len(store):,} in all, {size(store.bytes)}, "
        f"{each:.0f} bytes a token"
    )
    rest = "" if store.complete else "  (not complete: others are at work, or run it again)"
    print(f"store: {store.folder}{rest}")


def size(n: float, form: str = ".3g") -> str:
    """Bytes in decimal units, as disks and the hub count: 336 MB."""
    units = ("B", "kB", "MB", "GB", "TB")
    power = next(p for p in range(5) if n < 1000 ** (p + 1) or p == 4)
    return f"{n / 1000**power:{form}} {units[power]}"
