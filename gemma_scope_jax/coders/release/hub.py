"""Downloads from the Hugging Face hub: a folder's weights and config.json, or another of its files.

Many folders also hold an examples.safetensors larger than the weights: it is fetched separately.
"""

import contextlib
from pathlib import Path

from gemma_scope_jax.coders.release.catalog import Address, nearest_addresses
from gemma_scope_jax.errors import InputError, disk_error, reason


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
        raise _unreachable(address, name, error) from error
    except EntryNotFoundError as error:
        others = [str(a) for a in nearest_addresses(str(address), 4) if a != address][:3]
        raise InputError(
            f"{address} has no {name} on the hub; nearest: {', '.join(others)}"
        ) from error


def _fetch(address: Address, name: str, revision: str | None) -> Path:
    """Download a file. Raises `InputError`, or huggingface_hub's `EntryNotFoundError`."""
    import huggingface_hub
    from huggingface_hub import errors

    repo, page = address.repo, f"https://huggingface.co/{address.repo}"
    file = f"{address.folder}/{name}"
    try:
        return Path(huggingface_hub.hf_hub_download(repo, file, revision=revision))
    except errors.EntryNotFoundError:
        raise
    except errors.GatedRepoError as error:
        raise InputError(
            f"{repo} is gated: accept its terms at {page}, then log in with `hf auth login`"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise InputError(f"{repo} has no revision {revision!r}; see {page}/commits") from error
    except errors.RepositoryNotFoundError as error:
        raise InputError(
            f"{repo} does not exist or needs a login: see {page}, then `hf auth login`"
        ) from error
    except Exception as error:  # each version of the library raises other types
        if isinstance(error, OSError) and not isinstance(error, ConnectionError) and error.errno:
            raise disk_error(f"{repo}/{file}", error) from error
        raise _unreachable(address, name, error) from error


def _unreachable(address: Address, name: str, error: Exception) -> InputError:
    return InputError(
        f"{address}: {name} is not in the cache and cannot be downloaded "
        f"({type(error).__name__}: {reason(error)}); check the network, or download the folder "
        "elsewhere and pass its path"
    )
