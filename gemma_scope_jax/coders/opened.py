"""Coders by name, with everything that belongs to them except the model's weights, which load last.

    opened = open_coders(["gemma-3-270m-resid-post-12-width-4k-l0-50"])
    model = load_model(opened.model)

Whatever does not fit is reported before gigabytes are read.
"""

import dataclasses
from collections.abc import Sequence

from gemma_scope_jax.coders.coder import check_fits
from gemma_scope_jax.coders.coder_set import CoderSet
from gemma_scope_jax.coders.load import load_coder, load_coders
from gemma_scope_jax.errors import InputError
from gemma_scope_jax.model.checkpoints.load import model_config
from gemma_scope_jax.model.config import GemmaConfig
from gemma_scope_jax.model.tokenizer import Tokenizer, fit_tokenizer, load_tokenizer

DEFAULT_MODEL = "gemma-3-270m"


@dataclasses.dataclass(frozen=True, eq=False)
class OpenedCoders:
    """Coders, and what is known about their model without its weights."""

    coders: CoderSet
    model: str  # as `load_model` takes it
    shape: GemmaConfig
    tokenizer: Tokenizer


def open_coders(
    names: str | Sequence[str], model: str = "", *, one_layer: bool = False, decoders: bool = True
) -> OpenedCoders:
    """Load coders, and find the architecture and the tokenizer of their model.

    names      what `load_coders` takes; a single string names a single coder
    model      a name, a folder or a file; default: the coders' own model
    one_layer  refuse coders of several layers
    decoders   also load the decoders of coders of several layers, otherwise left on disk
    Raises `InputError` for coders of several models, and those that do not fit the model.
    """
    if not names:
        raise InputError("name at least one coder (see `gemma-scope list`)")
    loaded = load_coders(load_coder(names) if isinstance(names, str) else names)
    for coder in loaded:
        if one_layer and coder.multi_layer:
            raise InputError(f"{coder.info.path} has several layers: a coder of one is needed here")
    made_for = {c.info.model_name.removeprefix("google/") for c in loaded} - {""}
    if not model and len(made_for) > 1:
        models = ", ".join(sorted(made_for))
        raise InputError(f"coders of several models ({models}): give the model to use (--model)")
    model, shape, tokenizer = open_model(model or next(iter(made_for), ""))
    for coder in loaded:
        check_fits(shape, coder)
    if decoders:
        loaded = load_coders(loaded, decoder=True)
    return OpenedCoders(loaded, model, shape, tokenizer)


def open_model(model: str = "") -> tuple[str, GemmaConfig, Tokenizer]:
    """A model's name as `load_model` takes it, its architecture and its tokenizer; by default of
    the packaged one. Raises `InputError`."""
    model = model or DEFAULT_MODEL
    shape = model_config(model)
    return model, shape, fit_tokenizer(load_tokenizer(model), shape)
