"""Who may import whom: arrows go down only, and heavy packages wait until they are needed."""

import ast
import collections
import importlib.util
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import gemma_scope_jax as gs

ROOT = Path(gs.__file__).parent
# Who may import whom, also what stands below the rooms named; a room imports itself as it likes.
ROOMS = {
    "errors": (),
    "progress": ("errors",),
    "storage": ("progress",),
    "kernels": ("storage",),
    "web": ("storage",),
    "model": ("storage",),
    "coders": ("model", "kernels"),
    "data": ("model",),
    "training": ("coders", "data"),
    "extraction": ("coders", "data"),
    "evaluation": ("coders", "data"),
    "circuits": ("coders", "data", "web"),
    "probing": ("evaluation",),
    "autointerp": ("extraction",),
    "cards": ("extraction", "autointerp", "web"),
    "inspection": ("evaluation", "cards"),
    "behaviour": ("circuits", "probing", "cards"),
    "explorer": ("training", "inspection", "behaviour"),
    "cli": ("explorer",),
    "__main__": ("cli",),
}
HEAVY = ("tensorflow_datasets", "tensorflow", "gemma", "orbax", "matplotlib", "huggingface_hub",
         "transformers", "tyro", "rich", "torch", "wandb", "tensorboardX", "pyarrow",
         "gguf", "array_record")  # fmt: skip
FILES = sorted(ROOT.rglob("*.py"))


def imported(tree, name):
    """Absolute names of the modules that a file (dotted name `name`) imports, anywhere in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            base = importlib.util.resolve_name(base, name.rpartition(".")[0])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def at_module_level(tree):
    """The statements that run on import: all that is not inside a function."""
    kept = ast.Module(body=[], type_ignores=[])
    queue = list(tree.body)
    while queue:
        node = queue.pop()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            kept.body.append(node)
        queue.extend(ast.iter_child_nodes(node))
    return kept


def module_name(path):
    return ".".join(path.relative_to(ROOT.parent).with_suffix("").parts)


def room(name):
    """`gemma_scope_jax.model.gemma` -> `model`; None for other packages and the package itself."""
    parts = name.split(".")
    return parts[1] if parts[0] == ROOT.name and len(parts) > 1 else None


def below(name):
    """All rooms that the room `name` may import."""
    return {name}.union(*map(below, ROOMS[name]))


def forbidden(source, name):
    """The rooms that `source` imports and the module `name` may not."""
    rooms = {r for m in imported(ast.parse(source), name) if (r := room(m)) is not None}
    return sorted(rooms - below(room(name)))


@pytest.mark.parametrize("path", [f for f in FILES if f != ROOT / "__init__.py"], ids=module_name)
def test_arrows_go_down_only(path):
    assert forbidden(path.read_text(), module_name(path)) == []


def test_modules_do_not_import_each_other_in_a_circle():
    """In a circle it depends on what a program asks for first whether an import works."""
    names = {module_name(f).removesuffix(".__init__"): f for f in FILES}
    needs = {}
    for name, path in names.items():
        found = imported(at_module_level(ast.parse(path.read_text())), module_name(path))
        parts = {n if n in names else n.rpartition(".")[0] for n in found}
        needs[name] = (parts & set(names)) - {name, ROOT.name}
    while done := [name for name, some in needs.items() if not some & set(needs)]:
        for name in done:
            del needs[name]
    assert needs == {}


def loaded_by(statement):
    """The top-level packages in `sys.modules` of a fresh interpreter after `statement`."""
    script = f"{statement}; import sys; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return {name.split(".")[0] for name in run.stdout.split()}


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_heavy_packages_are_imported_where_they_are_needed(path):
    if path.parent.name == "cli":
        return
    names = imported(at_module_level(ast.parse(path.read_text())), module_name(path))
    assert [n for n in names if n.split(".")[0] in HEAVY] == []


@pytest.mark.parametrize(
    ("source", "name", "found"),
    [
        ("from gemma_scope_jax.coders import splice", "gemma_scope_jax.model.gemma", ["coders"]),
        ("def f():\n    import gemma_scope_jax.cli", "gemma_scope_jax.data.text", ["cli"]),
        ("from ..training.train import train", "gemma_scope_jax.model.gemma", ["training"]),
        ("from gemma_scope_jax import explorer", "gemma_scope_jax.circuits.graph", ["explorer"]),
        (
            "from gemma_scope_jax.extraction import x",
            "gemma_scope_jax.training.step",
            ["extraction"],
        ),
        ("from gemma_scope_jax.errors import InputError", "gemma_scope_jax.model.gemma", []),
        ("import gemma_scope_jax.cards", "gemma_scope_jax.cli", []),
    ],
)
def test_a_forbidden_import_is_found(source, name, found):
    assert forbidden(source, name) == found


def test_a_class_name_is_unique_in_the_package():
    """One word, one thing: what is imported by name is known wherever it is met."""
    places = collections.defaultdict(list)
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                places[node.name].append(f"{module_name(path)}:{node.lineno}")
    assert {name: found for name, found in places.items() if len(found) > 1} == {}


def calls_of_print(tree):
    """The lines that call `print` itself."""
    calls = (node for node in ast.walk(tree) if isinstance(node, ast.Call))
    return [c.lineno for c in calls if isinstance(c.func, ast.Name) and c.func.id == "print"]


BELOW = [f for f in FILES if f.parent.name != "cli"]


@pytest.mark.parametrize("path", BELOW, ids=module_name)
def test_nothing_below_the_commands_prints(path):
    """It logs, or says how far it is by `Progress`, which writes to the stream it is given."""
    source = path.read_text()
    assert calls_of_print(ast.parse(source)) == []
    if path.name != "progress.py":
        assert "console.print(" not in source and "sys.stderr" not in source.replace(
            "sys.stderr.flush()", ""
        )


def test_a_print_is_found():
    assert calls_of_print(ast.parse("def f():\n    print(1)\n    x.print()")) == [2]


COMMANDS = [f for f in FILES if f.parent.name == "cli"]
PRINTING = ("gemma_scope_jax.errors", "gemma_scope_jax.progress", "gemma_scope_jax.cli")


@pytest.mark.parametrize("path", COMMANDS, ids=module_name)
def test_commands_are_written_over_the_public_names(path):
    """`import gemma_scope_jax as gs`, what commands share, and how text is shown: nothing else."""
    tree, name = ast.parse(path.read_text()), module_name(path)
    own = [m for m in imported(tree, name) if m.split(".")[0] == ROOT.name and m != ROOT.name]
    assert [m for m in own if not m.startswith(PRINTING)] == []
    inside = set(imported(tree, name)) - set(imported(at_module_level(tree), name))
    assert [m for m in inside if m.split(".")[0] == ROOT.name] == []
    used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name) and node.value.id == "gs"}  # fmt: skip
    assert used <= set(gs.__all__)


@pytest.mark.parametrize("name", [n for n in gs.__all__ if callable(getattr(gs, n))])
def test_every_public_function_says_what_it_does(name):
    public = getattr(gs, name)
    if inspect.isfunction(inspect.unwrap(public)) or inspect.isclass(public):
        assert len(inspect.getdoc(public) or "") > 15


def test_import_brings_nothing_but_the_package_itself():
    """Names resolve on first use: not even jax comes with the bare import."""
    assert loaded_by("import gemma_scope_jax") & {*HEAVY, "jax", "numpy", "flax", "optax"} == set()


def test_models_and_coders_bring_nothing_heavy():
    ours = loaded_by("import gemma_scope_jax as gs; gs.run, gs.generate, gs.splice, gs.load_coder")
    assert "jax" in ours
    assert (ours - loaded_by("import flax.struct")) & set(HEAVY) == set()


def test_no_public_name_is_also_a_room():
    """Importing a room `x` would set the attribute `x` of the package, over the public name."""
    assert {path.stem for path in ROOT.iterdir()} & set(gs.__all__) == set()


@pytest.mark.parametrize("name", gs.__all__)
def test_every_public_name_resolves(name):
    assert getattr(gs, name) is not None
