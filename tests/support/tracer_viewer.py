"""circuit-tracer's own viewer of graphs, served with all that it takes from the web beside it.

Its page loads six scripts by their addresses. Here a copy of it loads the same libraries of npm,
which `make peers` puts into .venv-peers/js; two that only help their author are empty. Of jetpack
npm has another variant than the page's, whose `conventions` cannot draw their axes: these lines are
added. Nothing else of the page is changed.
"""

import contextlib
import re
import shutil
import socket
import sys
from pathlib import Path

LIBRARIES = Path(sys.prefix) / "js" / "node_modules"
SCRIPTS = {
    "d3.js": "d3/dist/d3.min.js",
    "jetpack_2024-07-20.js": "d3-jetpack/build/d3-jetpack.cjs",
    "dagre.min.js": "dagre/dist/dagre.min.js",
    "pako.min.js": "pako/dist/pako.min.js",
    "hotserver-client-ws.js": "",
    "npy_v0.js": "",
}
JETPACK = """{collection}
(() => {{
  const module = {{}}, exports = {{}}, require = () => d3;
  {text}
  const make = exports.conventions
  exports.conventions = (given) => {{
    const c = make(given)
    c.drawAxis = (svg = c.svg) => exports.drawAxis({{...c, svg}})
    return c
  }}
  window.d3 = {{...d3, ...exports}}
}})()
"""


def page_of_viewer(folder: Path) -> Path:
    """A copy of the viewer in `folder` that needs no network."""
    from circuit_tracer.frontend.local_server import DEFAULT_FRONTEND_DIR

    shutil.copytree(str(DEFAULT_FRONTEND_DIR), folder)
    page, lib = folder / "index.html", folder / "lib"
    lib.mkdir()
    text = page.read_text(encoding="utf-8")
    for address in re.findall(r"src='(https://[^']+)'", text):
        name = address.rsplit("/", 1)[1]
        text = text.replace(address, f"./lib/{name}")
        (lib / name).write_text(_script(name), encoding="utf-8")
    page.write_text(text, encoding="utf-8")
    (folder / "favicon.ico").touch()  # browsers ask for it
    return folder


def _script(name: str) -> str:
    if not SCRIPTS[name]:
        return ""
    read = lambda path: (LIBRARIES / path).read_text(encoding="utf-8")
    text = read(SCRIPTS[name])
    if name.startswith("jetpack"):
        text = JETPACK.format(text=text, collection=read("d3-collection/dist/d3-collection.js"))
    return text


@contextlib.contextmanager
def served(data: Path, folder: Path):
    """The address at which circuit-tracer's server shows the graphs in `data`."""
    from circuit_tracer.frontend.local_server import serve

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = serve(str(data), str(page_of_viewer(folder)), port)
    try:
        yield f"http://127.0.0.1:{port}/index.html"
    finally:
        server.stop()
