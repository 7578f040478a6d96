"""`gemma-scope check`."""

import gemma_scope_jax as gs
from gemma_scope_jax.cli import shared


def command(
    coder: shared.Coder,
    *,
    model: shared.Model = "",
    text: shared.File = None,
    json: shared.Json = False,
    dtype: shared.Dtype = "auto",
) -> int:
    """Check that a coder does what it claims; exit with 1 and say why if something looks wrong.

    Shows L0 and its target, FVU and delta loss, and the fit at the coder's place beside the fit at
    neighbouring layers and other sites, without the (1 + w) gain, and with the skip transposed.

    Args:
        text: Measure on this text file, whose documents are separated by a line holding a form
            feed. The default is a bundled sample of 2,600 tokens.
    """
    documents = gs.sample_documents() if text is None else gs.read_documents([str(text)])
    opened = shared.open_coders(coder, model)
    (loaded,) = opened.coders
    weights = shared.load_model(opened.model, dtype)
    context = min(256, opened.shape.context)
    batches = gs.text_batches(opened.tokenizer, documents, context_size=context)
    with shared.stage("compiling and running"):
        report = gs.check_coder(weights, loaded, batches)
    name = f"{loaded.info.path or loaded.kind} in {opened.shape.name}"
    source = f"{report.metrics.all.tokens:,} tokens of {text or 'the bundled sample'}"
    shared.print_result(f"{name}, on {source}\n{report}", report.as_dict(), json)
    return 1 if report.warnings else 0
