"""The two sides of a comparison, each a process that answers when it is asked.

Theirs runs in an environment of its own, and neither pays for the other's threads and memory. A
script starts itself as both (`Side`), with `--role`, and each answers its lines (`serve`).
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def serve(answers: Mapping[str, Callable[..., Any]]) -> None:
    """Answer each line "name arguments" of stdin by a line of JSON."""
    print("ready", flush=True)
    for line in sys.stdin:
        name, *rest = line.split()
        print(json.dumps(answers[name](*rest)), flush=True)


class Side:
    """One process of the comparison: `script` in another Python, with arguments and variables."""

    def __init__(
        self, python: Path | str, script: str, role: str, *given: Any, **variables: str
    ) -> None:
        self.role = role
        self.process = subprocess.Popen(
            [str(python), script, "--role", role, *map(str, given)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=os.environ | variables,
        )
        assert self.process.stdin and self.process.stdout
        self.write, self.read = self.process.stdin, self.process.stdout
        for line in self.read:
            if line.strip() == "ready":
                return
        raise SystemExit(f"the {role} side stopped: see its message above")

    def ask(self, *line: Any) -> Any:
        self.write.write(" ".join(map(str, line)) + "\n")
        self.write.flush()
        answer = self.read.readline()
        if not answer:
            raise SystemExit(f"the {self.role} side stopped at {line}: see its message above")
        return json.loads(answer)

    def close(self) -> None:
        self.write.close()
        self.process.wait()
