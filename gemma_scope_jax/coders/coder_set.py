"""Several coders as one thing: a transcoder per layer, a CLT, whatever a glob matches."""

from collections.abc import ItemsView, Iterable, Iterator, Mapping, Sequence
from typing import Any

from gemma_scope_jax.coders.coder import Coder, ends, named_layers, public_name
from gemma_scope_jax.errors import InputError


class CoderSet(Sequence[Coder]):
    """Coders in order, each under a unique name; see `load_coders` for sets from disk.

    `coders[0]`, `coders["name"]` and `coders[:4]` (a set again); iterating gives the coders.
    """

    def __init__(self, coders: Coder | Mapping[str, Coder] | Iterable[Coder]):
        """Coders without a name get that of their address or folder, numbered where they share it.

        Raises `InputError` if there are none, and for anything that is not a coder.
        """
        if isinstance(coders, CoderSet):
            coders = coders._by_name
        if isinstance(coders, Mapping):
            names, given = list(map(str, coders)), list(coders.values())
        else:
            names, given = None, [coders] if isinstance(coders, Coder) else list(coders)
        for coder in given:
            if not isinstance(coder, Coder):
                raise InputError(f"expected coders (see load_coders), got {type(coder).__name__}")
        if not given:
            raise InputError("no coders: give at least one")
        names = names or list(map(_name, given))
        numbered = [f"{name}-{i}" for i, name in enumerate(names)]
        unique = [n if names.count(n) == 1 else number for n, number in zip(names, numbered)]
        self._by_name = dict(zip(unique if len(set(unique)) == len(unique) else numbered, given))

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._by_name)

    @property
    def layers(self) -> tuple[int, ...]:
        """The model's layers that any of the coders reads, in order."""
        return tuple(sorted({layer for coder in self for layer in coder.layers}))

    def at(self, layer: int) -> Coder:
        """The only coder that reads the model's `layer`, or `InputError`.

        `coder.source(layer)` is the coder's own number of that layer.
        """
        there = [name for name, coder in self.items() if layer in coder.layers]
        if len(there) != 1:
            said = f"{len(there)} coders ({', '.join(there)})" if there else "no coder"
            raise InputError(f"layer {layer}: {said} here, of {named_layers(self.layers)}")
        return self._by_name[there[0]]

    def items(self) -> ItemsView[str, Coder]:
        return self._by_name.items()

    def __getitem__(self, key: int | str | slice) -> Any:
        if isinstance(key, slice):
            return CoderSet({name: self._by_name[name] for name in self.names[key]})
        if not isinstance(key, str):
            return self._by_name[self.names[key]]
        if key not in self._by_name:
            raise InputError(f"no coder {key!r} in this set; it has {', '.join(self.names)}")
        return self._by_name[key]

    def __len__(self) -> int:
        return len(self._by_name)

    def __iter__(self) -> Iterator[Coder]:
        return iter(self._by_name.values())

    def __repr__(self) -> str:
        """One line without arrays."""
        kinds = " and ".join(dict.fromkeys(coder.kind for coder in self))
        sites = " and ".join(dict.fromkeys(map(ends, self)))
        count = f"{len(self)} coder{'s' * (len(self) > 1)}"
        return f"CoderSet({count}: {kinds}, {sites}, {named_layers(self.layers)})"


def _name(coder: Coder) -> str:
    return public_name(coder) if coder.info.path else f"{coder.reads}-{coder.layers[0]}"
