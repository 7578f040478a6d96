"""What subcommands share: types of arguments, input, opening coders and models, output."""

import contextlib
import dataclasses
import json
import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

import gemma_scope_jax as gs
from gemma_scope_jax.errors import InputError
from gemma_scope_jax.progress import console, shown_streams

_UNPRINTED = re.compile(r"[^ -~]")
PACKAGED_CODER = "gemma-3-270m-resid-post-12-width-4k-l0-50"
DEFAULT_MODEL = "gemma-3-270m"
PIPE_WIDTH = 300  # in a file or a pipe nothing need be cut
Dtype = Literal["auto", "float32", "bfloat16"]


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


Place = Annotated[str, _of_place(str)]
LocalPlace = Annotated[Path, _of_place(Path)]
Name = Annotated[str, tyro.conf.arg(metavar="NAME")]
NameOrPlace = Annotated[Place, tyro.conf.arg(metavar="NAME")]  # of a model or a coder
Coder = Annotated[Place, tyro.conf.Positional, tyro.conf.arg(metavar="CODER")]
Coders = Annotated[
    tuple[Place, ...],
    tyro.conf.Positional,
    tyro.conf.arg(metavar="CODER...", help_behavior_hint=""),
]
Store = Annotated[Place, tyro.conf.Positional, tyro.conf.arg(metavar="STORE")]
Folder = Annotated[Place, tyro.conf.arg(metavar="FOLDER")]
BucketFile = Annotated[Place, tyro.conf.arg(metavar="FILE")]  # local or gs://
File = Annotated[LocalPlace | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="")]


@dataclasses.dataclass(frozen=True)
class Processes:
    """Several processes or hosts that run one command together."""

    coordinator: Name = ""
    """The address and port of the first of several processes that are one JAX program."""
    processes: int | None = None
    """How many processes there are."""
    process: int | None = None
    """The number of this one, from 0."""
    wait: float = 60.0
    """Seconds that processes with a coordinator wait for one another."""

    def join(self) -> None:
        gs.join_processes(self.coordinator, self.processes, self.process, self.wait)


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


@dataclasses.dataclass(frozen=True)
class Opened:
    """Coders and what is known without a model's weights: its name, architecture and tokenizer."""

    coders: list[Any]
    model: str
    shape: Any
    tok: Any

    def load(self, dtype: str, mesh: tuple[int, int] | None = None) -> Any:
        """The model; `mesh`: (data, model) devices that it is spread over."""
        spread = {} if mesh is None else {"mesh": gs.make_mesh(*mesh)}
        return load_model(self.model, dtype, **spread)


def open_coders(
    model: str, coders: Sequence[str], *, one_layer: bool = False, decoders: bool = True
) -> Opened:
    """Coders and tokenizer, before the model, so that mistakes show at once.

    A glob among `coders` stands for all packaged coders, published addresses and folders that it
    matches. `one_layer`: those of several layers are refused. Without `decoders` those of several
    layers stay on the disk.
    """
    if not coders:
        raise InputError("name at least one CODER (see `gemma-scope list`)")
    gs.use_compilation_cache()
    with stage(f"loading coder{'s' * (len(coders) > 1)} {' '.join(coders)}"):
        names = [name for given in coders for name in gs.matching(given)]
        loaded = [gs.load_coder(name) for name in names]
        for name, coder in zip(names, loaded):
            if one_layer and isinstance(coder, gs.MultiLayerCoder):
                raise InputError(f"{name} has several layers: this takes coders of one layer")
        made_for = {c.info.model_name.removeprefix("google/") for c in loaded} - {""}
        if not model and len(made_for) > 1:
            raise InputError(f"coders of several models ({', '.join(sorted(made_for))}): --model?")
        model = model or next(iter(made_for), DEFAULT_MODEL)
        shape = gs.model_config(model)
        for coder in loaded:
            gs.check_fits(shape, coder)
        if decoders:
            loaded = with_decoders(loaded)
        tok = gs.fit_tokenizer(gs.load_tokenizer(model), shape)
    return Opened(loaded, model, shape, tok)


def with_decoders(coders: Sequence[Any]) -> list[Any]:
    return [gs.load_decoder(c) if isinstance(c, gs.MultiLayerCoder) else c for c in coders]


def load_model(name: str, dtype: str, **options: Any) -> Any:
    """A model, and how far it is; dtype auto is float32 on a CPU and bfloat16 elsewhere."""
    import jax

    if dtype == "auto":
        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    progress = gs.Progress(None, "bytes", what=f"loading model {name} ({dtype})")
    return gs.load_model(name, dtype=dtype, progress=progress, **options)


@contextlib.contextmanager
def stage(message: str) -> Iterator[None]:
    """Show what goes on, on stderr: a spinner in a terminal, else a line."""
    if not sys.stderr.isatty():
        print(f"{message} ...", file=sys.stderr, flush=True)
        yield
        return
    from rich.markup import escape

    # what is printed meanwhile goes through rich, which keeps it clear of the spinner
    with console(stderr=True).status(escape(message)), shown_streams():
        yield


def screen() -> Any:
    """The rich console of stdout, as wide as the terminal; in files and pipes nothing is cut."""
    return console(width=None if sys.stdout.isatty() else PIPE_WIDTH)


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


def size(n: float) -> str:
    """Bytes in decimal units, three digits: 336 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if n < 1000:
            return f"{n:.3g} {unit}"
        n /= 1000
    return f"{n:,.3g} TB"
