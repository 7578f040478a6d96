"""A run in a gs:// bucket, on a server that speaks the protocol of Google Cloud Storage."""

import json
import os
import re
import shutil
import time
from http import HTTPStatus
from http.server import HTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import fsspec.config
import jax
import jax.numpy as jnp
import pytest
from etils import epath
from etils.epath import gpath
from gcp_storage_emulator import server

from feature_writer import write
from gemma_scope_jax.autointerp.explanations import (
    explained_folder,
    read_explanations,
    write_explanations,
)
from gemma_scope_jax.coders.coder import CoderInfo
from gemma_scope_jax.coders.load import load_coder
from gemma_scope_jax.coders.release.files import save_coder
from gemma_scope_jax.coders.sparse_coder import SparseCoder
from gemma_scope_jax.errors import InputError
from gemma_scope_jax.storage.paths import folder_path, local_copy
from gemma_scope_jax.training import feeds
from gemma_scope_jax.training import log as progress
from training_runner import PASSES, run, same_bits, stopped


def closed_properly(response, close=server.Response.close):
    """Adds what tensorstore needs: which generation of an object was read.

    Tells gcsfs at once that objects are not moved here, instead of half a minute later.
    """
    if response.status == HTTPStatus.NOT_IMPLEMENTED:
        response.status = HTTPStatus.BAD_REQUEST
    url = urlsplit(response._handler.path)
    query = parse_qs(url.query)
    if query.get("alt") == ["media"] and response.status in (200, 206):
        name, key = re.search("/b/([^/]+)/o/(.+)", url.path).groups()
        found = response._handler.storage.get_file_obj(name, unquote(key))["generation"]
        response["x-goog-generation"] = found
        if query.get("ifGenerationNotMatch") == [found]:
            response.status, response._content = HTTPStatus.NOT_MODIFIED, ""
    close(response)


@pytest.fixture(scope="module")
def bucket(tmp_path_factory, compile_once):
    """gs://bucket, and local copies of it in a folder of the test."""
    with pytest.MonkeyPatch.context() as patch:
        # Orbax opens tens of connections at once; of those past the queue each waits seconds.
        patch.setattr(HTTPServer, "request_queue_size", 256)
        patch.setattr(server.Response, "close", closed_properly)
        storage = server.create_server("127.0.0.1", 0, in_memory=True, default_bucket="bucket")
        storage.start()
        address = f"http://127.0.0.1:{storage._api._httpd.server_port}"
        patch.setenv("STORAGE_EMULATOR_HOST", address)  # read by gcsfs
        patch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # which asks another server
        patch.setenv("TENSORSTORE_GCS_HTTP_URL", address)  # by Orbax's tensorstore
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        for protocol in ("gs", "gcs"):
            patch.setitem(fsspec.config.conf, protocol, {"token": "anon"})
        patch.setattr(gpath, "_is_tf_installed", lambda: False)  # whose client knows one server
        yield epath.Path("gs://bucket")
    storage.stop()


def test_a_run_in_a_bucket_is_stopped_resumed_and_loaded(bucket, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(progress, "EVERY", 0.0)
    whole = run(tmp_path / "whole", checkpoint_every=1e9)
    with stopped(monkeypatch, feeds.TextFeed, 12):
        run("gs://bucket/run", checkpoint_every=1e9)
    found = run("gs://bucket/run", checkpoint_every=1e9)
    same_bits(found, whole)
    checkpoints = {p.name for p in (bucket / "run/checkpoints").iterdir()}
    assert checkpoints == {"12", str(PASSES)}
    log = (bucket / "run/log.jsonl").read_text().splitlines()
    assert [json.loads(line)["tokens"] // 128 for line in log] == list(range(1, PASSES + 1))
    [folder] = (bucket / "run/coders/resid_post").iterdir()
    names = {p.name for p in folder.iterdir()}
    assert {"README.md", "config.json", "params.safetensors", "train_config.json"} <= names
    same_bits(load_coder(str(folder)), whole)
    assert not os.path.exists("gs:")  # nothing fell beside it

    files = list((bucket / f"run/checkpoints/{PASSES}/state").glob("*/d/*"))
    assert files
    for path in files:
        path.write_bytes(path.read_bytes()[::2])
    caplog.clear()
    same_bits(run("gs://bucket/run", checkpoint_every=1e9), whole)
    lines = [x for x in caplog.messages if "damaged, set aside" in x]
    assert len(lines) == 1 and f"gs://bucket/run/damaged-checkpoint-{PASSES}" in lines[0]


def test_a_copy_is_made_once_for_the_same_files(bucket):
    coder = run("gs://bucket/other", checkpoint_every=1e9)
    save_coder(coder, "gs://bucket/mine")
    copy = local_copy("gs://bucket/mine")
    assert local_copy("gs://bucket/mine/") == copy
    time.sleep(1.1)  # times are whole seconds
    save_coder(jax.tree.map(lambda w: 2 * w, coder), "gs://bucket/mine")
    assert local_copy("gs://bucket/mine") != copy
    same_bits(load_coder("gs://bucket/mine").w_dec, 2 * coder.w_dec)


def test_two_processes_may_copy_at_once(bucket, monkeypatch):
    (bucket / "files" / "a").write_text("one")
    copy = shutil.copyfileobj

    def slow(*arguments):
        monkeypatch.setattr(shutil, "copyfileobj", copy)
        local_copy("gs://bucket/files")  # the other process
        copy(*arguments)

    monkeypatch.setattr(shutil, "copyfileobj", slow)
    assert (local_copy("gs://bucket/files") / "a").read_text() == "one"


def test_features_in_a_bucket_are_those_of_a_folder(bucket, tmp_path):
    whole = write(tmp_path / "whole", count=100)
    for index in (1, 0):
        store = write("gs://bucket/features", (index, 2), count=100)
    assert store.complete and len(store) == len(whole)
    local = Path(whole.folder)
    names = {p.relative_to(local) for p in local.rglob("*") if p.is_file()}
    remote = bucket / "features"
    assert len(names) > 3
    for name in names:
        assert (remote / name).read_bytes() == (local / name).read_bytes()
    store.verify()
    rows, values = store.feature(7)
    assert (rows == whole.feature(7)[0]).all() and (values == whole.feature(7)[1]).all()
    assert not os.path.exists("gs:")


def test_explanations_in_a_bucket_are_read_and_kept(bucket):
    entry = {"text": "ü", "method": "endpoint", "model": "m", "scores": {}}
    assert read_explanations("gs://bucket/explained") == {}
    write_explanations("gs://bucket/explained", "c", {3: entry})
    assert read_explanations("gs://bucket/explained", 8) == {3: entry}
    assert read_explanations("gs://bucket/explained/explanations.json") == {3: entry}
    assert not os.path.exists("gs:")


def test_explanations_of_a_coder_in_a_bucket_lie_there(bucket):
    """Not in the copy, which another one takes the place of."""
    one = jnp.ones((2, 2))
    coder = SparseCoder(one, one[0], one[0], one, one[0], layer=0, info=CoderInfo(l0=1.0))
    save_coder(coder, "gs://bucket/sae", config_extra={"model_name": "acme/tiny"})
    found = load_coder("gs://bucket/sae")
    assert explained_folder(found.info) == "gs://bucket/sae" != found.info.folder


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: folder_path("ftp://a/b"), "ftp:// is not supported"),
        (lambda: folder_path("s3://a/b"), "s3:// needs `pip install s3fs`"),
        (lambda: load_coder("gs://bucket/nothing"), "gs://bucket/nothing: no such folder"),
    ],
)
def test_what_cannot_be_found_is_said_in_a_line(bucket, call, message):
    with pytest.raises(InputError, match=message) as refused:
        call()
    assert "\n" not in str(refused.value)
