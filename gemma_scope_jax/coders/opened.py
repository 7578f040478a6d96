"""Coders by name with all that goes with them but the model's weights, which load last.

    opened = open_coders(["gemma-3-270m-resid-post-12-width-4k-l0-50"])
    opened.tok.encode("a text"); opened.shape.layers
    model = load_model(opened.model)

Whatever does not fit is known before gigabytes are read.
"""

import dataclasses
from collections.abc import Sequence

from gemma_scope_jax.coders.coder import Coder, check_fits
from gemma_scope_jax.coders.multi_layer_coder import MultiLayerCoder
from gemma_scope_jax.coders.release.files import load_coder, load_decoder, matching
from gemma_scope_jax.errors import InputError
from gemma_scope_jax.model.checkpoints.load import model_config
from gemma_scope_jax.model.config import GemmaConfig
from gemma_scope_jax.model.tokenizer import Tokenizer, fit_tokenizer, load_tokenizer

DEFAULT_MODEL = "gemma-3-270m"


@dataclasses.dataclass(frozen=True, eq=False)
class OpenedCoders:
    """Coders, and what is known of the model that they are for without its weights."""

    coders: list[Coder]
    model: str  # as `load_model` takes it
    shape: GemmaConfig
    tok: Tokenizer


def open_coders(
    names: Sequence[str], model: str = "", *, one_layer: bool = False, decoders: bool = True
) -> OpenedCoders:
    """Load coders, and find the architecture and the tokenizer of their model.

    names      as `load_coder` takes them; a glob stands for all packaged coders, published
               addresses and folders that it matches
    model      a name, a folder or a file; default: the coders' own model
    one_layer  refuse coders of several layers
    decoders   load those of coders of several layers, too, which else stay on the disk
    Raises `InputError` for coders of several models, and those that do not fit the model.
    """
    if not names:
        raise InputError("name at least one CODER (see `gemma-scope list`)")
    names = [name for given in names for name in matching(given)]
    loaded: list[Coder] = [load_coder(name) for name in names]
    for name, coder in zip(names, loaded):
        if one_layer and isinstance(coder, MultiLayerCoder):
            raise InputError(f"{name} has several layers: this takes coders of one layer")
    made_for = {c.info.model_name.removeprefix("google/") for c in loaded} - {""}
    if not model and len(made_for) > 1:
        raise InputError(f"coders of several models ({', '.join(sorted(made_for))}): --model?")
    model = model or next(iter(made_for), DEFAULT_MODEL)
    shape = model_config(model)
    for coder in loaded:
        check_fits(shape, coder)
    if decoders:
        loaded = with_decoders(loaded)
    return OpenedCoders(loaded, model, shape, fit_tokenizer(load_tokenizer(model), shape))


def with_decoders(coders: Sequence[Coder]) -> list[Coder]:
    """The coders, with the decoders of those of several layers in memory."""
    return [load_decoder(c) if isinstance(c, MultiLayerCoder) else c for c in coders]
