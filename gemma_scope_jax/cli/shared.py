"""What subcommands share: types of arguments, input, loading, progress on stderr."""

import contextlib
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from gemma_scope_jax.errors import InputError
from gemma_scope_jax.progress import console, shown_streams
from gemma_scope_jax.storage.strict_json import legible

_UNPRINTED = re.compile(r"[^ -~]")
PACKAGED_CODER = "gemma-3-270m-resid-post-12-width-4k-l0-50"
DEFAULT_MODEL = "gemma-3-270m"
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
Files = Annotated[tuple[Place, ...], tyro.conf.arg(metavar="GLOB...", help_behavior_hint="")]
Roles = Annotated[tuple[str, ...], tyro.conf.arg(metavar="ROLE...")]
Folder = Annotated[Place, tyro.conf.arg(metavar="FOLDER")]
BucketFile = Annotated[Place, tyro.conf.arg(metavar="FILE")]  # local or gs://
File = Annotated[LocalPlace | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="")]


def given_text(text: str, file: Path | None) -> str:
    """The text to look at; of standard input and files without the line break at the end."""
    if text and file is not None:
        raise InputError("give a text or --file FILE, not both")
    from gemma_scope_jax.data.document_files import decoded

    if file is not None:
        text = decoded(file.read_bytes(), file).removesuffix("\n")
    elif text == "-":
        text = decoded(sys.stdin.buffer.read(), "standard input").removesuffix("\n")
    if not text.strip():
        raise InputError('the text is empty: give one, "-" for standard input, or --file FILE')
    return text


def print_json(value: Any) -> None:
    """Print JSON whose texts stay legible; control characters in them are JSON's own escapes."""
    text = legible(json.dumps(value, ensure_ascii=False))
    print(_UNPRINTED.sub(lambda c: c[0] if c[0].isprintable() else json.dumps(c[0])[1:-1], text))


def load_all(
    model: str,
    coders: str | Sequence[str],
    dtype: Dtype,
    *,
    one_layer: bool = False,
    mesh: tuple[int, int] | None = None,
    decoders: bool = True,
    with_model: bool = True,
) -> tuple[Any, Any, Any]:
    """Model, coders and tokenizer; the small things first, so that mistakes show at once.

    coders: what `load_coders` takes; a text is a single coder. `one_layer`: those of several layers
    are refused. `mesh`: (data, model) devices that
    the model is spread over. `with_model=False` leaves the model away: None. Without `decoders`
    those of several layers stay on the disk.
    """
    use_compilation_cache()
    named = [coders] if isinstance(coders, str) else coders
    with stage(f"loading coder{'s' * (len(named) > 1)} {' '.join(named)}"):
        import jax

        from gemma_scope_jax.coders.coder import check_fits
        from gemma_scope_jax.coders.load import load_coder, load_coders
        from gemma_scope_jax.model.checkpoints.load import load_model, model_config
        from gemma_scope_jax.model.sharding import make_mesh
        from gemma_scope_jax.model.tokenizer import fit_tokenizer, load_tokenizer

        loaded = load_coders(load_coder(coders) if isinstance(coders, str) else coders)
        for coder in loaded:
            if one_layer and coder.multi_layer:
                raise InputError(
                    f"{coder.info.path} has several layers: this takes coders of one layer"
                )
        made_for = {c.info.model_name.removeprefix("google/") for c in loaded} - {""}
        if not model and len(made_for) > 1:
            raise InputError(f"coders of several models ({', '.join(sorted(made_for))}): --model?")
        model = model or next(iter(made_for), DEFAULT_MODEL)
        for coder in loaded:
            check_fits(model_config(model), coder)
        if decoders:
            loaded = load_coders(loaded, decoder=True)
        tok = fit_tokenizer(load_tokenizer(model), model_config(model))
    if not with_model:
        return None, loaded, tok
    if dtype == "auto":
        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    with bar(f"loading model {model} ({dtype})") as progress:
        spread: dict[str, Any] = {} if mesh is None else {"mesh": make_mesh(*mesh)}
        return load_model(model, dtype=dtype, progress=progress, **spread), loaded, tok


def use_compilation_cache() -> None:
    """Keep compiled programs on disk, so that a second run has nothing to compile."""
    import jax

    from gemma_scope_jax.storage.paths import private_cache

    if jax.config.jax_compilation_cache_dir is None:
        try:
            jax.config.update("jax_compilation_cache_dir", str(private_cache("compiled")))
        except InputError as error:
            print(f"compiled programs are not kept: {error}", file=sys.stderr)
            return
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


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


@contextlib.contextmanager
def bar(message: str) -> Iterator[Callable[[int, int], None] | None]:
    """Show how far something is, on stderr: a bar in a terminal, else a line."""
    if not sys.stderr.isatty():
        print(f"{message} ...", file=sys.stderr, flush=True)
        yield None
        return
    from rich.markup import escape
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    screen = console(stderr=True)
    with Progress(*columns, console=screen, transient=True) as drawn, shown_streams():
        task = drawn.add_task(escape(message), total=None)
        yield lambda done, total: drawn.update(task, completed=done, total=total)
