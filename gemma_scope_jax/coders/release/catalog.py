"""Every coder of the Gemma Scope 2 release, by rule and offline: what exists, where, and its size.

The release is regular enough to be generated: ten repositories, nine kinds of folders, and a few
gaps. The single-layer rules reproduce all 8,784 entries, with their target L0s, of
`pretrained_saes.yaml` in SAELens 6.54.12; the crosscoders and cross-layer transcoders follow the
model cards and the technical paper (Table 1). An address reads

    gemma-scope-2-{270m|1b|4b|12b|27b}-{pt|it}/
        {resid_post|attn_out|mlp_out|transcoder}[_all]/layer_{L}_width_{W}_l0_{small|medium|big}
        crosscoder/layer_{a}_{b}_{c}_{d}_width_{W}_l0_{medium|big}
        clt/width_{W}_l0_{medium|big}

with `_affine` and `_seed_1` at the end where they apply.

This module does not import JAX, so listing the release takes no time.
"""

import dataclasses
import difflib
import functools
import itertools
import re
from collections.abc import Collection, Iterator
from fnmatch import fnmatchcase
from typing import Any

from gemma_scope_jax.errors import InputError, nearest
from gemma_scope_jax.storage.safetensors_layout import file_size

# size -> layers, d_model, heads * head_dim. The same numbers as `model.config.PRESETS`.
SIZES = {
    "270m": (18, 640, 1024),
    "1b": (26, 1152, 1024),
    "4b": (34, 2560, 2048),
    "12b": (48, 3840, 4096),
    "27b": (62, 5376, 4096),
}
VARIANTS = ("pt", "it")
WIDTHS = {"16k": 2**14, "65k": 2**16, "262k": 2**18, "524k": 2**19, "1m": 2**20}
CLT_WIDTHS = {"262k": 262_080, "524k": 524_160}  # multiples of 18 and of 26 layers
LABELS = ("small", "medium", "big")
KINDS = ("sae", "transcoder", "crosscoder", "clt")
SITES = {  # category without `_all` -> the site it reads, the site it writes
    "resid_post": ("resid_post", "resid_post"),
    "attn_out": ("z", "z"),  # the input of o_proj: heads concatenated
    "mlp_out": ("mlp_out", "mlp_out"),
    "transcoder": ("mlp_in", "mlp_out"),
    "crosscoder": ("resid_post", "resid_post"),
    "clt": ("mlp_in", "mlp_out"),
}
CATEGORIES = (*(c + end for c in list(SITES)[:4] for end in ("", "_all")), "crosscoder", "clt")
ADDRESS = "an address is gemma-scope-2-SIZE-pt/CATEGORY/layer_L_width_W_l0_LABEL"


def sweep_layers(size: str) -> tuple[int, ...]:
    """The four layers, at 25, 50, 65 and 85 % of the depth, of the folders without `_all`."""
    return tuple(int(SIZES[size][0] * depth + 0.5) for depth in (0.25, 0.5, 0.65, 0.85))


@dataclasses.dataclass(frozen=True)
class Address:
    """A coder of the release. `str()` gives the published address, without `google/`."""

    size: str  # 270m, 1b, ...
    variant: str  # pt or it
    category: str  # the folder: resid_post, resid_post_all, ..., crosscoder, clt
    layers: tuple[int, ...]  # one; a crosscoder's four; all of a CLT's
    width: str  # label: 16k, 65k, 262k, 524k, 1m. For crosscoders and CLTs the total
    label: str  # of the target L0: small, medium, big
    affine: bool = False
    seed: int | None = None

    @property
    def repo(self) -> str:
        """Hub id of the repository."""
        return f"google/gemma-scope-2-{self.size}-{self.variant}"

    @property
    def folder(self) -> str:
        """The folder inside the repository."""
        numbers = "_".join(map(str, self.layers))
        layers = "" if self.category == "clt" else f"layer_{numbers}_"
        affine = "_affine" if self.affine else ""
        seed = "" if self.seed is None else f"_seed_{self.seed}"
        return f"{self.category}/{layers}width_{self.width}_l0_{self.label}{affine}{seed}"

    def __str__(self) -> str:
        return f"{self.repo.removeprefix('google/')}/{self.folder}"

    @property
    def site(self) -> str:
        """The category without `_all`."""
        return self.category.removesuffix("_all")

    @property
    def kind(self) -> str:
        """sae, transcoder, crosscoder or clt: the `type` of the published config."""
        return self.site if self.site in KINDS else "sae"

    @property
    def layer(self) -> int:
        """The layer of a single-layer coder, the first layer of the others."""
        return self.layers[0]

    @property
    def reads(self) -> str:
        """The site the coder reads."""
        return SITES[self.site][0]

    @property
    def writes(self) -> str:
        """The site the coder reconstructs."""
        return SITES[self.site][1]

    @property
    def base_model(self) -> str:
        """Hub id of the model the coder was trained on; the 270m has no `-pt` there."""
        name = f"google/gemma-3-{self.size}-{self.variant}"
        return name.removesuffix("-pt") if self.size == "270m" else name

    @property
    def d_in(self) -> int:
        """Width of the input: d_model, or heads * head_dim for `attn_out`."""
        return SIZES[self.size][2 if self.site == "attn_out" else 1]

    @property
    def width_exact(self) -> int:
        """Number of features, summed over the layers of a crosscoder or CLT."""
        return (CLT_WIDTHS if self.kind == "clt" else WIDTHS)[self.width]

    @property
    def l0(self) -> int | None:
        """The target L0 (mean active features per token) in the published config.

        It ramps up over the first third of the depth; for multi-layer `medium` it is undocumented.
        """
        if len(self.layers) > 1:
            return 150 if self.label == "big" else None
        big = 120 if self.category.endswith("_all") else 150
        low, high = {"small": (10, 20), "medium": (30, 60), "big": (60, big)}[self.label]
        return int(low + (high - low) * min(1, 3 * self.layer / SIZES[self.size][0]))

    @property
    def shapes(self) -> dict[str, dict[str, tuple[int, ...]]]:
        """File name -> tensor name -> shape of the folder's float32 weights."""
        X, D = len(self.layers), self.d_in
        F = self.width_exact // X
        file = {"b_dec": (D,), "b_enc": (F,), "threshold": (F,), "w_enc": (D, F)}
        file["w_dec"] = (F, D) if X == 1 else (F, X, D)
        if self.affine:
            file["affine_skip_connection"] = (D, D)
        if X == 1:
            return {"params.safetensors": file}
        return {f"params_layer_{i}.safetensors": file for i in range(X)}

    @property
    def bytes(self) -> int:
        """Size of the folder's weight files with their headers, without `examples.safetensors`."""
        files = self.shapes.values()
        return sum(file_size({n: ("float32", shape) for n, shape in f.items()}) for f in files)


def _grid(size: str, category: str) -> Iterator[tuple[tuple[int, ...], str, str, bool, int | None]]:
    """(layers, width, label, affine, seed) of everything planned for a category."""
    base, every = category.removesuffix("_all"), category.endswith("_all")
    everywhere, sweep = tuple(range(SIZES[size][0])), sweep_layers(size)
    labels, affines = ("medium", "big"), (False,)
    if base == "crosscoder":
        widths, layer_sets = ("65k", "262k", "524k", "1m"), [sweep]
    elif base == "clt":
        widths, layer_sets = tuple(CLT_WIDTHS) if size in ("270m", "1b") else (), [everywhere]
        affines = (False, True)
    else:
        widths = ("16k", "262k") if every else ("16k", "65k", "262k")
        if not every and (base == "resid_post" or (base == "mlp_out" and size == "1b")):
            widths = (*widths, "1m")
        labels = ("small", "big") if every else LABELS
        affines = (False, True) if base == "transcoder" else (False,)
        layer_sets = [(layer,) for layer in (everywhere if every else sweep)]
    for layers in layer_sets:
        for width, label, affine in itertools.product(widths, labels, affines):
            yield layers, width, label, affine, None
        if category == "resid_post":
            yield layers, "262k", "medium", False, 1


def _missing(a: Address) -> bool:
    """Whether a planned address is in no published list."""
    if a.size == "27b" and a.category == "transcoder_all" and a.width == "16k" and not a.affine:
        return a.layer in ((4, 5, 43) if a.label == "small" else (4, 43))
    if (a.size, a.variant) == ("27b", "pt"):
        return a.site in ("attn_out", "mlp_out") or a.category == "transcoder"
    if (a.size, a.variant, a.category) == ("270m", "pt", "transcoder"):
        kept = {(15, "262k", "big"), (9, "16k", "small")}
        return not a.affine or (a.layer, a.width, a.label) not in kept
    return False


@functools.cache
def _planned() -> dict[Address, bool]:
    """Every address of the full grid, in reading order -> whether it is listed."""
    every = (
        Address(size, variant, category, *rest)
        for size, variant, category in itertools.product(SIZES, VARIANTS, CATEGORIES)
        for rest in _grid(size, category)
    )
    return {address: not _missing(address) for address in every}


def _choice(what: str, value: str | None, allowed: Collection[str]) -> None:
    if value is not None and value not in allowed:
        slip = _SLIPS.get(str(value).lower())
        hint = f"; did you mean {slip}?" if slip in allowed else nearest(str(value), allowed)
        raise InputError(f"{what} {value!r} is not one of {', '.join(allowed)}{hint}")


def _model(text: str) -> tuple[str, str | None]:
    """`270m`, `1b-it`, `google/gemma-3-1b-pt`, `gemma-scope-2-1b-pt` -> size, variant or None."""
    match = re.fullmatch(r"(?:google/)?(?:gemma-(?:scope-2|3|v3)-)?(\w+?)(?:-(\w+))?", text)
    size, variant = match.groups() if match else (text, None)
    _choice("model", size, SIZES)
    _choice("model variant", variant, VARIANTS)
    return size, variant


def addresses(
    model: str | None = None,
    kind: str | None = None,
    category: str | None = None,
    layer: int | None = None,
    width: str | None = None,
    l0: str | None = None,
    affine: bool | None = None,
    pattern: str | None = None,
) -> Iterator[Address]:
    """The listed coders that match all arguments, in reading order.

    model: `270m`, `1b-it`, `google/gemma-3-1b-pt`, ...; without pt or it, both.
    kind: sae, transcoder, crosscoder or clt; category: a folder such as `resid_post_all`.
    layer: one of the layers it reads. width: 16k, 65k, 262k, 524k or 1m.
    l0: small, medium or big, the label of the target L0.
    pattern: a glob over the whole address; without `*`, `?` or `[`, a part of it.
    Raises `InputError` for a value that no coder of the release has.
    """
    size, variant = _model(model) if model is not None else (None, None)
    _choice("kind", kind, KINDS)
    _choice("category", category, CATEGORIES)
    _choice("width", width, WIDTHS)
    _choice("l0", l0, LABELS)
    if layer is not None:
        depth = SIZES[size or "27b"][0]
        if not 0 <= layer < depth:
            raise InputError(f"layer {layer}: {size or 'the largest model'} has 0 to {depth - 1}")
    if pattern is not None:
        pattern = pattern.removeprefix("google/")
        pattern = pattern if set(pattern) & set("*?[") else f"*{pattern}*"
    names = ("size", "variant", "kind", "category", "width", "label", "affine")
    values = (size, variant, kind, category, width, l0, affine)
    wanted = [(name, value) for name, value in zip(names, values) if value is not None]
    return (
        a
        for a, listed in _planned().items()
        if listed
        and all(getattr(a, name) == value for name, value in wanted)
        and (layer is None or layer in a.layers)
        and (pattern is None or fnmatchcase(str(a), pattern))
    )


FOLDER = (
    r"(?:layer_(?P<layers>[0-9]{1,4}(?:_[0-9]{1,4})*)_)?width_(?P<width>[0-9]+[km])"
    r"_l0_(?P<label>[a-z]+)(?P<affine>_affine)?(?:_seed_(?P<seed>[0-9]{1,9}))?"
)
_GRAMMAR = re.compile(
    r"(?:google/)?gemma-scope-2-(?P<size>\w+)-(?P<variant>pt|it)/(?P<category>[a-z_]+)/" + FOLDER
)


def parse_address(text: str) -> Address:
    """The `Address` of a published address, with or without `google/`.

    Gaps in the published lists and other seeds are accepted, too, since the hub may have them.
    Otherwise raises `InputError` with what is wrong and the nearest coders.
    """
    match = _GRAMMAR.fullmatch(text.strip().strip("/"))
    if match and match["size"] in SIZES:
        given: dict[str, Any] = match.groupdict()
        layers = match["layers"].split("_") if match["layers"] else range(SIZES[match["size"]][0])
        given["layers"] = tuple(map(int, layers))
        given["affine"] = match["affine"] is not None
        given["seed"] = int(match["seed"]) if match["seed"] else None
        address = Address(**given)
        written = f"{address.repo}/{address.folder}".endswith(match[0])
        if written and dataclasses.replace(address, seed=None) in _planned():
            return address
    close = ", ".join(map(str, nearest_addresses(text)))
    hint = _reason(text) + (close and f"; nearest: {close}")
    raise InputError(f"no coder {text.strip()!r} in Gemma Scope 2: {hint}")


_SLIPS = {
    "large": "big", "high": "big", "low": "small", "mid": "medium", "canonical": "medium",
    "64k": "65k", "256k": "262k", "512k": "524k", "1024k": "1m", "1mb": "1m", "16384": "16k",
    "65536": "65k", "262144": "262k", "262080": "262k", "524288": "524k", "1048576": "1m",
    "res": "resid_post", "resid": "resid_post", "residual": "resid_post",
    "att": "attn_out", "attn": "attn_out", "attention": "attn_out", "z": "attn_out",
    "mlp": "mlp_out", "transcoders": "transcoder", "tc": "transcoder", "plt": "transcoder",
    "crosscoders": "crosscoder", "clts": "clt", "chat": "it", "instruct": "it", "base": "pt",
}  # fmt: skip


def _loose(text: str) -> dict:
    """The fields that can be recognised in a text that may not be an address, as raw strings."""
    text = re.sub(r"gemma-(scope-2|3|v3)-?|google/", " ", text.lower())
    words = [w for w in re.split(r"[^0-9a-z]+", text) if w]
    found: dict = {"affine": "affine" in words, "every": "all" in words, "layers": ()}
    for before, word, after in zip(["", *words], words, [*words[1:], ""]):
        if re.fullmatch(r"layer[0-9]*", word):
            digits = re.search(r"layer_?((?:[0-9]{1,3}_)*[0-9]{1,3})(?![0-9a-z])", text)
            found["layers"] = tuple(map(int, digits[1].split("_"))) if digits else ()
        elif word in ("width", "l0", "seed"):
            found[word] = after
        elif word in VARIANTS or _SLIPS.get(word) in VARIANTS:
            found.setdefault("variant", _SLIPS.get(word, word))
        elif re.fullmatch(r"[0-9]+[mb]", word) and before != "width":
            found.setdefault("size", word)
        elif re.fullmatch(r"[0-9]+k", word):
            found.setdefault("width", word)
        elif word in LABELS:
            found.setdefault("l0", word)
        elif word.isalpha() and "category" not in found:
            names = {name.split("_")[0]: name for name in SITES} | _SLIPS
            close = difflib.get_close_matches(word, names, n=1, cutoff=0.75)
            if close and names[close[0]] in SITES:
                found["category"] = names[close[0]]
    return found


def _reason(text: str) -> str:
    """What is wrong with an address, in a clause."""
    found = _loose(text)
    size, base = found.get("size"), found.get("category")
    if size is None or base is None:
        return ADDRESS
    if size not in SIZES:
        return f"the models are {', '.join(SIZES)}"
    if "variant" not in found:
        return f"the repository's name ends in -pt or -it (gemma-scope-2-{size}-pt)"
    category = base + ("_all" if found["every"] else "")
    if category not in CATEGORIES or f"/{category}/" not in text:
        return f"the folders are {', '.join(CATEGORIES)}"
    planned = list(_grid(size, category))
    if not planned:
        return f"{size} has no {category}; 270m and 1b have"
    for what, column in (("width", 1), ("l0", 2)):
        value, allowed = found.get(what), dict.fromkeys(str(row[column]) for row in planned)
        if value is not None and value not in allowed:
            slip = _SLIPS.get(value)
            hint = f"{slip}, not {value}" if slip in allowed else f"not {value}"
            return f"{category} of {size} has {what} {', '.join(allowed)} ({hint})"
    layers = sorted({row[0] for row in planned})
    if base != "clt" and found["layers"] not in layers:
        few = ", ".join("_".join(map(str, row)) for row in layers)
        few = f"0 to {len(layers) - 1}" if found["every"] else few
        more = "" if found["every"] or base == "crosscoder" else f" (every layer: {base}_all)"
        return f"{category} of {size} has layers {few}{more}"
    if found["affine"] and not any(row[3] for row in planned):
        return f"{category} has no affine coders"
    return ADDRESS


def _distance(found: dict, a: Address) -> float:
    """How far an address is from what `_loose` recognised."""
    far = 8.0 * (found.get("size", a.size) != a.size)
    far += 3 * (found.get("variant", a.variant) != a.variant)
    if found.get("category", a.site) != a.site:
        far += 3 if SITES[found["category"]] == (a.reads, a.writes) else 5
    far += 1.05 * (found["every"] != a.category.endswith("_all"))
    if found["layers"] and a.kind != "clt" and found["layers"] != a.layers:
        far += 1 + min(1, abs(found["layers"][0] - a.layer) / SIZES[a.size][0])
    width = found.get("width", a.width)
    far += 1.5 * (_SLIPS.get(width, width) != a.width)
    label = found.get("l0", a.label)
    far += 0.9 * (_SLIPS.get(label, label) != a.label)
    far += 0.5 * (found["affine"] != a.affine)
    return far + 0.4 * (found.get("seed", "") != ("" if a.seed is None else str(a.seed)))


def nearest_addresses(text: str, n: int = 3) -> list[Address]:
    """The `n` listed coders nearest to `text`; none if nothing in it is recognised."""
    found = _loose(text)
    if not {"size", "category", "width", "l0"} & set(found) and not found["layers"]:
        return []
    return sorted(addresses(), key=lambda a: _distance(found, a))[:n]
