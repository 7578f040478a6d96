"""Making coders: `train`, and `activations` to train from."""

from typing import Annotated, Literal

import tyro

from gemma_scope_jax.cli.shared import Folder, LocalPlace, Name, use_compilation_cache
from gemma_scope_jax.model.processes import join_processes

Config = Annotated[LocalPlace, tyro.conf.Positional, tyro.conf.arg(metavar="CONFIG")]


def train(
    config: Config,
    *,
    out: Folder,
    profile: LocalPlace | None = None,
    coordinator: Name = "",
    processes: int | None = None,
    process: int | None = None,
    wait: float = 60.0,
) -> None:
    """Train coders as a configs/*.py file says; the same command continues an interrupted run.

    A config is a Python program, and is run: train from none that you have not read, or do not
    trust. On several hosts run it on each: TPU pods and SLURM are recognised, elsewhere number
    them.

    Args:
        config: A Python file that sets `config`; it is run.
        out: Folder of the run, local or gs://: checkpoints, log and, at the end, coders/ in the
            published layout.
        profile: An empty folder for a trace of a few passes, to look at in XProf or Perfetto.
        coordinator: Address and port of the first of several processes.
        processes: How many there are.
        process: Which this is, from 0.
        wait: Seconds that processes wait for one another.
    """
    use_compilation_cache()
    join_processes(coordinator, processes, process, wait)
    from gemma_scope_jax.training.train import load_config
    from gemma_scope_jax.training.train import train as run_training

    run_training(load_config(config), out, profile=profile)


def activations(
    config: Config,
    *,
    out: Folder,
    tokens: int | None = None,
    dtype: Literal["bfloat16", "int8"] = "bfloat16",
) -> None:
    """Store the activations that a training config reads, to train from with its `store`.

    Args:
        config: A Python file that sets `config`; it is run, as by `train`.
        out: Folder of the store; the same command continues an interrupted one.
        tokens: How many to store; default: the config's.
        dtype: int8 has a scale for each token and halves the size.
    """
    use_compilation_cache()
    from gemma_scope_jax.training.train import load_config, store_activations

    store_activations(load_config(config), out, tokens, dtype)
