"""Downloads from the Hugging Face hub: a folder's weights and config.json, or another of its files.

Many folders also hold an examples.safetensors larger than the weights: it is fetched separately.
"""

import contextlib
from pathlib import Path

from gemma_scope_jax.coders.release.catalog import Address, nearest_addresses
from gemma_scope_jax.errors import InputError
from gemma_scope_jax.model.checkpoints.load import hub_error


def fetch_folder(address: Address, revision: str | None = None) -> Path:
    """Download the weights and config.json of an address; returns the folder in the hub's cache.

    Raises `InputError` saying what to do if the network, the folder or the access is missing.
    """
    from huggingface_hub.errors import EntryNotFoundError

    # Some folders have no config.json. If it is the network that fails, so will the weights.
    with contextlib.suppress(EntryNotFoundError):
        _fetch(address, "config.json", revision)
    return [fetch_file(address, name, revision) for name in address.shapes][-1].parent


def fetch_file(address: Address, name: str, revision: str | None = None) -> Path:
    """Download a file of an address's folder. Raises `InputError` as `fetch_folder` does."""
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        return _fetch(address, name, revision)
    except LocalEntryNotFoundError as error:
        raise hub_error(address.repo, error, f"{address}: {name}") from error
    except EntryNotFoundError as error:
        others = [str(a) for a in nearest_addresses(str(address), 4) if a != address][:3]
        raise InputError(
            f"{address} has no {name} on the hub; nearest: {', '.join(others)}"
        ) from error


def _fetch(address: Address, name: str, revision: str | None) -> Path:
    """Download a file. Raises `InputError`, or huggingface_hub's `EntryNotFoundError`."""
    import huggingface_hub

    file = f"{address.folder}/{name}"
    try:
        return Path(huggingface_hub.hf_hub_download(address.repo, file, revision=revision))
    except huggingface_hub.errors.EntryNotFoundError:
        raise
    except Exception as error:  # each version of the library raises other types
        raise hub_error(address.repo, error, f"{address}: {name}") from error
