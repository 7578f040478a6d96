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
    if json:
        shared.print_json(report.as_dict())
    else:
        source = "the bundled sample" if text is None else str(text)
        print_report(report, loaded, opened.shape.name, source)
    return 1 if report.warnings else 0


def print_report(report: "gs.CheckReport", coder: "gs.Coder", model: str, source: str) -> None:
    """The figures, the places by how well the coder fits there, the verdict."""
    m, losses = report.metrics, report.metrics.losses
    target = "" if report.target_l0 is None else f"  (target {report.target_l0:g})"
    outliers = f"{m.all.tokens - m.typical.tokens} outlier tokens"
    cost = f"{losses.clean:.3f} -> {losses.spliced:.3f}; {losses.ablated:.3f} with zeros instead"
    print(f"{coder.info.path or coder.kind} in {model}, on {m.all.tokens:,} tokens of {source}")
    print(f"  L0          {m.l0:8.1f}{target}")
    print(f"  FVU         {m.fvu:8.3f}  ({m.typical.fvu:.3f} without the {outliers})")
    print(f"  delta loss  {m.delta_loss:+8.3f}  nats a token ({cost})")
    print(f"  never fired {m.dead:8,}  of {m.density.size:,} features, on this text")
    print("\nwhere it fits, without outlier tokens:     FVU      L0")
    for a in sorted([report.stated, *report.alternatives], key=lambda a: a.fit.fvu):
        note = "  <- its config" if a is report.stated else ""
        print(f"  {a.name:50s} {a.fit.fvu:9.3f} {a.fit.l0:7.1f}{note}")
    print()
    for warning in report.warnings:
        print(f"warning: {warning}")
    if not report.warnings:
        print("looks right")
