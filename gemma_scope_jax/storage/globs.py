"""Names and globs of files and folders: a name is what it says before it is a pattern.

`[` and `*` may stand in names: data[1].txt, a folder run [3]. What is there under the very name is
meant by it.
"""

import glob
import os


def named_paths(pattern: str) -> list[str]:
    """The files and folders that a name or a glob stands for, sorted; `~` is the home folder."""
    pattern = os.path.expanduser(pattern)
    if os.path.lexists(pattern):
        return [pattern]
    start = os.path.dirname(pattern)  # the longest that is there as it is spelled
    while start and not os.path.isdir(start):
        start = os.path.dirname(start)
    return sorted(glob.glob(glob.escape(start) + pattern[len(start) :], recursive=True))
