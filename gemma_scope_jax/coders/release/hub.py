"""Fetching one folder of the release from the Hugging Face hub: its weights and config.json only.

Many folders also hold an examples.safetensors larger than the weights: it is fetched by itself.
"""

import contextlib
from pathlib import Path

from gemma_scope_jax.coders.release.catalog import Address, nearest_addresses
from gemma_scope_jax.errors import InputError, disk_error, reason


def fetch_folder(address: Address, revision: str | None = None) -> Path:
    """The local folder (in the hub's cache) of an address, its weights and config.json downloaded.

    Raises `InputError` saying what to do when there is no network, no such folder or no access.
    """
    from huggingface_hub.errors import EntryNotFoundError

    # Some folders have no config.json; if it is the network that fails, the weights will say so.
    with contextlib.suppress(EntryNotFoundError):
        _fetch(address, "config.json", revision)
    for name in address.shapes:
        try:
            file = _fetch(address, name, revision)
        except EntryNotFoundError as error:
            raise _not_there(address, name, error) from error
    return Path(file).parent


def fetch_file(address: Address, name: str, revision: str | None = None) -> Path:
    """Another file of an address's folder. Raises `InputError` as `fetch_folder` does."""
    from huggingface_hub.errors import EntryNotFoundError

    try:
        return Path(_fetch(address, name, revision))
    except EntryNotFoundError as error:
        raise _not_there(address, name, error) from error


def _fetch(address: Address, name: str, revision: str | None) -> str:
    """Download a file. Raises `InputError`, or huggingface_hub's `EntryNotFoundError`."""
    import huggingface_hub
    from huggingface_hub import errors

    repo, page = address.repo, f"https://huggingface.co/{address.repo}"
    try:
        return huggingface_hub.hf_hub_download(repo, f"{address.folder}/{name}", revision=revision)
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
            f"there is no {repo}, or it needs a login: see {page}, then `hf auth login`"
        ) from error
    except OSError as error:
        if error.errno is not None and not isinstance(error, ConnectionError):
            raise disk_error(f"{repo}/{address.folder}/{name}", error) from error
        raise _unreachable(address, name, error) from error
    except Exception as error:  # each version of the library brings other kinds
        raise _unreachable(address, name, error) from error


def _not_there(address: Address, name: str, error: Exception) -> InputError:
    from huggingface_hub.errors import LocalEntryNotFoundError

    if isinstance(error, LocalEntryNotFoundError):
        return _unreachable(address, name, error)
    others = [str(a) for a in nearest_addresses(str(address), 4) if a != address]
    return InputError(f"{address} has no {name} on the hub; nearest: {', '.join(others[:3])}")


def _unreachable(address: Address, name: str, error: Exception) -> InputError:
    return InputError(
        f"{address}: {name} is not in the cache and cannot be fetched "
        f"({type(error).__name__}: {reason(error)}); check the network, or download the folder "
        "elsewhere and pass its path"
    )
