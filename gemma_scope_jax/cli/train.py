"""`gemma-scope train`."""

from typing import Annotated

import tyro

import gemma_scope_jax as gs
from gemma_scope_jax.cli import shared
from gemma_scope_jax.errors import InputError

Config = Annotated[
    shared.Place, tyro.conf.Positional, tyro.conf.arg(metavar="CONFIG", help_behavior_hint="")
]


def command(
    config: Config = "",
    *,
    out: shared.Folder = "",
    profile: shared.LocalPlace | None = None,
    plan: bool = False,
    fields: bool = False,
    hosts: gs.Processes,
    overrides: tyro.conf.Suppress[tuple[str, ...]] = (),
) -> None:
    """Train the coders of a configs/*.py file; the same command continues an interrupted run.

    Any field of the config can be set here: --tokens 100000 --coders.0.width 8192; --coders.*.width
    sets it for all coders, and --fields lists the fields. A config is a Python program, and is run:
    use only configs that you trust. On several hosts, run the command on each: TPU pods and SLURM
    are recognised; elsewhere, number the hosts.

    Args:
        config: A Python file that sets `config`. It is run.
        out: The folder of the run, local or gs://: checkpoints, log and, at the end, coders/ in the
            published layout.
        profile: Write a trace of a few passes to this empty folder, to open in XProf or Perfetto.
        plan: Only print what the run would take: tokens, updates, memory, disk.
        fields: Only list the fields of a config, with type, default and meaning.
    """
    if fields:
        from rich.table import Column, Table
        from rich.text import Text

        headings = (Column("field", no_wrap=True), "type", "default", "meaning")
        table = Table(*headings, box=None, padding=(0, 2, 0, 0))
        for row in gs.field_table():
            table.add_row(*map(Text, row))
        shared.screen().print(table)
        return
    if not config or not (out or plan):
        raise InputError("give a CONFIG, such as configs/sae_270m.py, and --out FOLDER")
    wanted = gs.override(gs.load_config(config), overrides)
    if out:
        gs.check_writable(out)
    gs.use_compilation_cache()
    if plan:
        with shared.stage("compiling"):
            print(gs.plan_training(wanted, out or "."))
        return
    hosts.join()
    made = gs.train(wanted, out, profile=profile)
    if gs.is_first_process():
        for name in made:
            print(gs.folder_path(out) / "coders" / name)
