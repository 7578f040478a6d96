"""The command `gemma-scope`: one plain typed function a subcommand.

Exit codes: 0 done; 1 `check` has warnings; 2 bad input, with one line "error: ..." on stderr; 130
interrupted. Results go to stdout, progress to stderr. Nothing heavy is imported before a command
runs, so that --help and list answer at once.
"""

import contextlib
import json as json_format
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from gemma_scope_jax.errors import InputError

PACKAGED_CODER = "gemma-3-270m-resid-post-12-width-4k-l0-50"
DEFAULT_MODEL = "gemma-3-270m"
Dtype = Literal["auto", "float32", "bfloat16"]
Text = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="TEXT", help_behavior_hint="")]
Name = Annotated[str, tyro.conf.arg(metavar="NAME")]
File = Annotated[Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="")]


def inspect(
    text: Text = "",
    *,
    model: Name = "",
    coder: Name = PACKAGED_CODER,
    file: File = None,
    top_k: int = 5,
    json: bool = False,
    html: File = None,
    dtype: Dtype = "auto",
) -> None:
    """What a model and a coder see in a text: next tokens, features a token, L0, FVU, delta loss.

    Args:
        text: The text; "-" reads standard input.
        model: A name, a Hugging Face folder, a .gguf file or an official checkpoint; default: the
            coder's model.
        coder: An address of the release (see `gemma-scope list`), a folder, or a packaged coder.
        file: Read the text from this file instead.
        top_k: Features listed for each token.
        json: Print JSON.
        html: Also write one self-contained web page here.
        dtype: Of the model; auto is float32 on a CPU and bfloat16 elsewhere.
    """
    text = _text(text, file)
    loaded_model, loaded_coder, tok = _load(model, coder, dtype, one_layer=True)
    from gemma_scope_jax.cards.inspect import inspect_text
    from gemma_scope_jax.cards.inspect_page import inspection_page
    from gemma_scope_jax.cards.inspect_terminal import print_inspection
    from gemma_scope_jax.cards.labels import read_labels

    labels = read_labels(loaded_coder.info.folder, loaded_coder.width)
    with _stage("compiling and running (what was compiled before is taken from the cache)"):
        seen = inspect_text(loaded_model, loaded_coder, tok, text, top_k=top_k, labels=labels)
    if html is not None:
        html.parent.mkdir(parents=True, exist_ok=True)
        html.write_text(inspection_page(seen), encoding="utf-8")
    if json:
        print(json_format.dumps(seen.as_dict(), ensure_ascii=False))
    else:
        print_inspection(seen)
        if html is not None:
            print(f"page: {html}")


def check(
    coder: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CODER")],
    *,
    model: Name = "",
    text: File = None,
    json: bool = False,
    dtype: Dtype = "auto",
) -> int:
    """Does a coder do what it says? Exits with 1 and says why if something looks wrong.

    L0 against its target, FVU, delta loss; and how it fits where its config says, at the
    neighbouring layers and other sites, without the (1 + w) gain, with the skip transposed.

    Args:
        coder: An address of the release, a folder, or a packaged coder.
        model: A name, a folder or a file; default: the coder's model.
        text: A text file (documents separated by a line holding a form feed); default: a bundled
            sample of 2,600 tokens.
        json: Print JSON.
        dtype: Of the model; auto is float32 on a CPU and bfloat16 elsewhere.
    """
    from gemma_scope_jax.data.text import SEPARATOR, read_documents

    if text is None:
        documents = (Path(__file__).parent / "packaged" / "sample.txt").read_text(encoding="utf-8")
        documents, source = documents.split(SEPARATOR), "the bundled sample"
    else:
        documents, source = read_documents([str(text)]), str(text)
    loaded_model, loaded_coder, tok = _load(model, coder, dtype, one_layer=False)
    from gemma_scope_jax.evaluation.check import check, print_report
    from gemma_scope_jax.evaluation.evaluate import text_batches

    batches = text_batches(tok, documents, length=min(256, loaded_model.config.context))
    with _stage("compiling and running"):
        report = check(loaded_model, loaded_coder, batches)
    if json:
        print(json_format.dumps(report.as_dict(), ensure_ascii=False))
    else:
        print_report(report, loaded_coder, loaded_model.config.name, source)
    return 1 if report.warnings else 0


Config = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="CONFIG")]


def train(
    config: Config,
    *,
    out: Annotated[str, tyro.conf.arg(metavar="FOLDER")],
    coordinator: Name = "",
    processes: int | None = None,
    process: int | None = None,
) -> None:
    """Train coders as a configs/*.py file says; the same command continues an interrupted run.

    On several hosts run it on each: TPU pods and SLURM are recognised, elsewhere number them.

    Args:
        config: A Python file that sets `config`.
        out: Folder of the run, local or gs://: checkpoints, log and, at the end, coders/ in the
            published layout.
        coordinator: Address and port of the first of several processes.
        processes: How many there are.
        process: Which this is, from 0.
    """
    _use_compilation_cache()
    from gemma_scope_jax.model.sharding import join_processes

    join_processes(coordinator, processes, process)
    from gemma_scope_jax.training.train import load_config
    from gemma_scope_jax.training.train import train as run_training

    run_training(load_config(config), out)


def activations(
    config: Config,
    *,
    out: Annotated[str, tyro.conf.arg(metavar="FOLDER")],
    tokens: int | None = None,
    dtype: Literal["bfloat16", "int8"] = "bfloat16",
) -> None:
    """Store the activations that a training config reads, to train from with its `store`.

    Args:
        config: A Python file that sets `config`.
        out: Folder of the store; the same command continues an interrupted one.
        tokens: How many to store; default: the config's.
        dtype: int8 has a scale for each token and halves the size.
    """
    _use_compilation_cache()
    from gemma_scope_jax.training.train import load_config, store_activations

    store_activations(load_config(config), out, tokens, dtype)


def list_(
    pattern: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PATTERN")] = "*",
    *,
    model: Name = "",
    kind: Name = "",
    layer: int | None = None,
    width: Name = "",
    l0: Name = "",
    affine: bool | None = None,
    json: bool = False,
    limit: int | None = None,
) -> None:
    """List the published coders, offline.

    Args:
        pattern: Part of an address, or a glob: "*-1b-it/transcoder_all/*_16k_*".
        model: 270m, 1b-it, google/gemma-3-1b-pt, ...
        kind: sae, transcoder, crosscoder or clt.
        layer: Among the layers it reads.
        width: 16k, 65k, 262k, 524k or 1m.
        l0: The label of its target L0: small, medium or big.
        affine: With a skip connection, or without.
        json: Print JSON.
        limit: At most so many.
    """
    from gemma_scope_jax.coders.listing import list_coders

    names = {"model": model, "kind": kind, "width": width, "l0": l0}
    given: dict[str, Any] = {key: value or None for key, value in names.items()}
    list_coders(pattern, **given, layer=layer, affine=affine, json=json, limit=limit)


COMMANDS = {
    "inspect": inspect, "list": list_, "check": check, "train": train, "activations": activations,
}  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Run the command line `argv` (default: the process's); returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in ("--version", "-V"):
        print(f"gemma-scope-jax {_version()}")
        return 0
    try:
        code = tyro.extras.subcommand_cli_from_dict(
            COMMANDS,
            prog="gemma-scope",
            config=(tyro.conf.FlagCreatePairsOff,),
            description="Gemma 3 and its sparse coders (Gemma Scope 2), looked into.",
            args=argv,
        )
        sys.stdout.flush()
        return code or 0
    except InputError as error:
        return _fail(str(error))
    except BrokenPipeError:
        # The reader has gone; keep the interpreter from complaining when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return _fail(f"{where}{error.strerror or error}")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _fail(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("gemma-scope-jax")
    except PackageNotFoundError:
        return "(not installed)"


# -------------------------------------------------------------------------------------------------
# Input, loading, progress


def _text(text: str, file: Path | None) -> str:
    """The text to look at; of standard input and files without the line break at the end."""
    if text and file is not None:
        raise InputError("give a text or --file FILE, not both")
    try:
        if file is not None:
            text = file.read_text(encoding="utf-8").removesuffix("\n")
        elif text == "-":
            text = sys.stdin.buffer.read().decode().removesuffix("\n")
    except UnicodeDecodeError as error:
        where = file or "standard input"
        raise InputError(f"{where}: not UTF-8 text (byte {error.start})") from error
    if not text.strip():
        raise InputError('the text is empty: give one, "-" for standard input, or --file FILE')
    return text


def _load(model: str, coder: str, dtype: Dtype, *, one_layer: bool) -> tuple[Any, Any, Any]:
    """Model, coder and tokenizer; the small things first, so that mistakes show at once."""
    _use_compilation_cache()
    with _stage(f"loading coder {coder}"):
        import jax

        from gemma_scope_jax.coders.gemma_scope_files import load_coder, load_decoder
        from gemma_scope_jax.coders.multi_layer_coder import MultiLayerCoder
        from gemma_scope_jax.evaluation.evaluate import check_fits
        from gemma_scope_jax.model.checkpoints.load import load_model, model_config
        from gemma_scope_jax.model.tokenizer import load_tokenizer

        loaded = load_coder(coder)
        several = isinstance(loaded, MultiLayerCoder)
        if several and one_layer:
            raise InputError(f"{coder} has several layers: inspect takes coders of one layer")
        name = model or loaded.info.model_name.removeprefix("google/") or DEFAULT_MODEL
        check_fits(model_config(name), loaded)
        if several:
            loaded = load_decoder(loaded)
        tok = load_tokenizer(name)
    if dtype == "auto":
        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    with _bar(f"loading model {name} ({dtype})") as progress:
        return load_model(name, dtype=dtype, progress=progress), loaded, tok


def _use_compilation_cache() -> None:
    """Keep compiled programs on disk, so that a second run has nothing to compile."""
    import jax

    from gemma_scope_jax.buckets import cache_folder

    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


@contextlib.contextmanager
def _stage(message: str) -> Iterator[None]:
    """Show what goes on, on stderr: a spinner in a terminal, else a line."""
    if not sys.stderr.isatty():
        print(f"{message} ...", file=sys.stderr, flush=True)
        yield
        return
    from rich.console import Console
    from rich.markup import escape

    with Console(stderr=True).status(escape(message)):
        yield


@contextlib.contextmanager
def _bar(message: str) -> Iterator[Callable[[int, int], None] | None]:
    """Show how far something is, on stderr: a bar in a terminal, else a line."""
    if not sys.stderr.isatty():
        print(f"{message} ...", file=sys.stderr, flush=True)
        yield None
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as shown:
        task = shown.add_task(escape(message), total=None)
        yield lambda done, total: shown.update(task, completed=done, total=total)
