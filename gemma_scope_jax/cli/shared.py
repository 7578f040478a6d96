"""What the commands share: types of options, opening coders and models, output."""

import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from tyro.conf import Positional, arg

import gemma_scope_jax as gs
from gemma_scope_jax.errors import InputError
from gemma_scope_jax.progress import console, stage

_UNPRINTED = re.compile(r"[^ -~]")
PACKAGED_CODER = "gemma-3-270m-resid-post-12-width-4k-l0-50"
PIPE_WIDTH = 300  # in a file or a pipe nothing needs to be cut


def _of_place(kind: type[str] | type[Path]) -> Any:
    """How an option that names a place is read: `~` is the home folder, also in --option=~/file,
    which no shell expands; addresses in buckets and on the hub stay as they are."""
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="PATH",
        instance_from_str=lambda words: kind(os.path.expanduser(words[0])),
        is_instance=lambda value: isinstance(value, kind),
        str_from_instance=lambda value: [os.fspath(value)],
    )


Place = Annotated[str, _of_place(str)]
LocalPlace = Annotated[Path, _of_place(Path)]
Name = Annotated[str, arg(metavar="NAME")]
NameOrPlace = Annotated[Place, arg(metavar="NAME")]  # of a model or a coder
Folder = Annotated[Place, arg(metavar="FOLDER")]
BucketFile = Annotated[Place, arg(metavar="FILE")]  # local or gs://
File = Annotated[LocalPlace | None, arg(metavar="FILE", help_behavior_hint="")]

# Options of several commands, with their help.
_CODER = "The coder: an address of the release, a folder, or a packaged coder."
_CODERS = "The coders: addresses of the release, folders, packaged coders, or globs of them."
_STORE = "The folder of a feature store, as filled by `gemma-scope extract`."
_MODEL = "The model: a name, a folder or a file. The default is the coders' model."
_DTYPE = "The dtype of the model; auto is float32 on a CPU and bfloat16 elsewhere."
Coder = Annotated[Place, Positional, arg(metavar="CODER", help=_CODER)]
Coders = Annotated[
    tuple[Place, ...], Positional, arg(metavar="CODER...", help=_CODERS, help_behavior_hint="")
]
Store = Annotated[Place, Positional, arg(metavar="STORE", help=_STORE)]
Model = Annotated[Place, arg(metavar="NAME", help=_MODEL)]
Dtype = Annotated[Literal["auto", "float32", "bfloat16"], arg(help=_DTYPE)]
ContextSize = Annotated[int, arg(help="The number of tokens in a sequence.")]
Seed = Annotated[int, arg(help="The random seed of the order of the documents.")]
Url = Annotated[str, arg(metavar="URL")]
Json = Annotated[bool, arg(help="Print JSON.")]


KEY_VARIABLE = "OPENAI_API_KEY"


def api_key(variable: str) -> str:
    """The API key in an environment variable; "" without one, if it is the usual variable."""
    key = os.environ.get(variable, "").strip()
    if not key and variable != KEY_VARIABLE:
        raise InputError(f"--key-variable {variable}: there is no such variable, or it is empty")
    return key


def chat_endpoint(
    url: str, model: str, variable: str, wanted: bool, option: str
) -> "gs.Endpoint | None":
    """The endpoint of --endpoint and --judge-model, which `option` needs where it is `wanted`."""
    if not wanted:
        if url or model:
            given = "--endpoint" if url else "--judge-model"
            raise InputError(f"{given} goes with {option}")
        return None
    if not (url and model):
        raise InputError(f"{option} needs --endpoint URL and --judge-model NAME")
    return gs.Endpoint(url, model, api_key(variable))


class Refused(Exception):
    """An `InputError` from the fields of a dataclass. tyro would take it for a mistake of its own:
    it draws a box around every ValueError."""


class Options:
    """A base class put before a dataclass of the library: a wrong value gives one line."""

    def __post_init__(self) -> None:
        try:
            super().__post_init__()  # type: ignore[misc]
        except InputError as error:
            raise Refused(str(error)) from error


def given_text(text: str, file: Path | None) -> str:
    """The text to look at, without the line break at the end of a file or of standard input."""
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
    """Print JSON with legible texts, in which control characters appear as JSON's own escapes;
    numbers that are not finite are null."""
    text = gs.legible(json.dumps(gs.finite(value), ensure_ascii=False))
    print(_UNPRINTED.sub(lambda c: c[0] if c[0].isprintable() else json.dumps(c[0])[1:-1], text))


def print_result(text: Any, facts: Any, as_json: bool) -> None:
    """Print a result as text or, as the option --json says, its facts as JSON."""
    if as_json:
        print_json(facts)
    else:
        print(text)


def open_coders(names: str | Sequence[str], model: str = "", **options: bool) -> "gs.OpenedCoders":
    """`gs.open_coders`, announced on stderr."""
    gs.use_compilation_cache()
    named = [names] if isinstance(names, str) else names
    with stage(f"loading coder{'s' * (len(named) > 1)} {' '.join(named)}"):
        return gs.open_coders(names, model, **options)


def dtype_of(option: str) -> str:
    """The dtype that --dtype means on this machine."""
    import jax

    if option != "auto":
        return option
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def load_model(name: str, dtype: str, mesh: tuple[int, int] | None = None) -> "gs.Model":
    """A model, with its progress shown; `mesh`: the (data, model) devices it is spread over."""
    dtype = dtype_of(dtype)
    progress = gs.Progress(None, "bytes", what=f"loading model {name} ({dtype})")
    spread = {} if mesh is None else {"mesh": gs.make_mesh(*mesh)}
    return gs.load_model(name, dtype=dtype, progress=progress, **spread)


def screen() -> Any:
    """The rich console of stdout, as wide as the terminal; in files and pipes nothing is cut."""
    return console(width=None if sys.stdout.isatty() else PIPE_WIDTH)


def print_whole(part: Any) -> None:
    """Print a table without cutting numbers: in a narrow terminal its lines are too long."""
    from rich.measure import Measurement

    wide = screen()
    least = Measurement.get(wide, wide.options, part).minimum
    wide.print(part, width=max(wide.width, least), no_wrap=False, crop=False)
