"""`python -m gemma_scope_jax` is the command `gemma-scope`."""

import sys

from gemma_scope_jax.cli import main

if __name__ == "__main__":
    sys.exit(main())
