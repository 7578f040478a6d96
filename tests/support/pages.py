"""The pages of the documentation, and what is in them: links, headings, commands, Python."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
DOCS = sorted((ROOT / "docs").rglob("*.md"))
CARDS = sorted(ROOT.glob("gemma_scope_jax/packaged/*/README.md"))
PAGES = [*(ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "SECURITY")), *DOCS, *CARDS]
_FENCED = re.compile(r"^```.*?^```", re.S | re.M)


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def prose(page: Path) -> str:
    """A page without its blocks of code and its code spans."""
    return re.sub(r"`[^`\n]*`", "", _FENCED.sub("", page.read_text(encoding="utf-8")))


def links(page: Path) -> list[str]:
    """Where links and pictures lead, but for addresses on the web."""
    text = prose(page)
    found = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(
        r'(?:src|srcset|href)="([^"]+)"', text
    )
    return [target for target in found if not re.match(r"[a-z]+:", target)]


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and Python-Markdown make them."""
    text = _FENCED.sub("", page.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ (.*)$", text, re.M)
    plain = (re.sub(r"[^\w\s-]", "", heading).strip().lower() for heading in headings)
    return {re.sub(r"\s+", "-", heading) for heading in plain}


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.S | re.M)


def command_lines(page: Path, program: str) -> list[str]:
    """The lines of indented blocks and shell blocks that begin with a program's name."""
    text = re.sub(r"\\\n\s*", "", page.read_text(encoding="utf-8"))  # lines that go on
    shell = "".join(re.findall(r"^```(?:sh|bash|console)\n(.*?)^```", text, re.S | re.M))
    indented = re.findall(r"^ {4}(\S.*)$", _FENCED.sub("", text), re.M)
    lines = [line.strip() for line in [*indented, *shell.splitlines()]]
    return [line for line in lines if line.split(" ")[0] == program]
