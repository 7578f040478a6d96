"""Files have their published sizes, and a few rows of a large one take no more memory."""

import io
import json
import subprocess
import sys

import jax
import ml_dtypes
import numpy as np
import pytest

from gemma_scope_jax.coders.load import decoder_rows, load_coder
from gemma_scope_jax.coders.release.files import save_coder
from gemma_scope_jax.coders.release.parameters import aligned_empty
from gemma_scope_jax.errors import InputError
from gemma_scope_jax.storage.safetensors_files import StreamedTensor, write_safetensors
from published import MULTI, SINGLE, publish, sparse_file


class Counter:
    """A file that only counts."""

    size = 0

    def write(self, data):
        self.size += len(data)


def streamed_size(shapes):
    zeros = np.zeros(2**23, np.float32)

    def chunks(left):
        while left:
            yield zeros[: min(left, zeros.size)]
            left -= min(left, zeros.size)

    counter = Counter()
    write_safetensors(
        counter,
        {k: StreamedTensor("float32", s, chunks(int(np.prod(s)))) for k, s in shapes.items()},
    )
    return counter.size


def test_the_bytes_are_those_of_the_safetensors_library():
    from safetensors.numpy import save

    kinds = ["float16", "uint16", "float32", "int64", "uint32"]
    tensors = {
        f"{i}.{kind}": np.arange(6).reshape(2, 3).astype(kind) for i, kind in enumerate(kinds)
    }
    tensors |= {"a": tensors["0.float16"][:1], "b": tensors["1.uint16"][:0]}
    file = io.BytesIO()
    write_safetensors(file, {name: StreamedTensor.whole(array) for name, array in tensors.items()})
    assert file.getvalue() == save(tensors)


def test_files_have_the_published_sizes():
    d, F = 2560, 16384
    single = {"w_enc": (d, F), "b_enc": (F,), "threshold": (F,), "w_dec": (F, d), "b_dec": (d,)}
    assert streamed_size(single) == 335_686_016 == 384 + 4 * (2 * d * F + 2 * F + d)
    d, F = 1152, 10080
    clt = {"w_enc": (d, F), "b_enc": (F,), "threshold": (F,), "w_dec": (F, 26, d), "b_dec": (d,)}
    header = streamed_size(clt) - 1_254_198_528
    assert 8 < header < 500 and header % 8 == 0


def test_a_saved_coder_has_the_published_size(tmp_path):
    d, F = 640, 64
    folder = publish(tmp_path, SINGLE[0], F=F)
    save_coder(load_coder(folder), tmp_path / "out")
    data = 4 * (2 * d * F + 2 * F + d)
    size = (tmp_path / "out" / "params.safetensors").stat().st_size
    assert size % 8 == 0 and 0 < size - data < 400


ROWS = """
import os, resource, sys
from gemma_scope_jax.coders.load import decoder_rows
from gemma_scope_jax.storage.safetensors_files import open_safetensors

def peak(run):  # bytes that resident memory, mapped files included, rises by at most
    if not os.path.exists("/proc/self/clear_refs"):  # macOS
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return run(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak starts again from here
    high = lambda: int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) * 1024
    before = high()
    return run(), high() - before

def half():
    with open_safetensors(sys.argv[1] + "/params.safetensors") as file:
        return file.get_slice("w_dec")[:100_000]

rows, used = peak(lambda: decoder_rows(sys.argv[1], [int(f) for f in sys.argv[2].split(",")]))
print(*rows[:, 0], used, peak(half)[1])
"""


def test_ten_rows_of_a_gigabyte_touch_a_few_pages(tmp_path):
    d, F = 640, 200_000
    features = [0, 199_999, 77, 78, 79, 100_000, 150_000, 3, 77, 50_001]
    folder = tmp_path / "resid_post" / "layer_5"
    folder.mkdir(parents=True)
    path = folder / "params.safetensors"
    sparse_file(path, d, F, {f: np.full(d, f + 1) for f in features})
    config = {"hf_hook_point_in": "model.layers.5.output", "type": "sae"}
    config["hf_hook_point_out"] = config["hf_hook_point_in"]
    (folder / "config.json").write_text(json.dumps(config))
    assert path.stat().st_size > 1e9
    out = subprocess.run(
        [sys.executable, "-c", ROWS, folder, ",".join(map(str, features))],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    ).stdout.split()
    assert [float(value) for value in out[:10]] == [f + 1 for f in features]
    assert int(out[10]) < 50e6
    assert int(out[11]) > 200e6, "reading half of the decoder must show, or the measure is blind"


def test_loading_to_a_cpu_makes_no_second_copy():
    read = aligned_empty((1000, 1000), np.float32)
    read[:] = 1
    cpu = jax.local_devices(backend="cpu")[0]
    assert jax.device_put(read, cpu).unsafe_buffer_pointer() == read.ctypes.data


def test_decoder_rows_equal_the_loaded_decoder(tmp_path):
    folder = publish(tmp_path, "transcoder/layer_12_width_16k_l0_big_affine", F=30)
    picked = [7, 3, 4, 5, 29, 3]
    np.testing.assert_array_equal(
        decoder_rows(folder, picked), np.asarray(load_coder(folder).w_dec)[picked]
    )
    assert decoder_rows(str(folder), []).shape == (0, 640)
    coder = load_coder(publish(tmp_path, MULTI[0], F=30))
    full = np.asarray(coder.full_decoder())
    for layer in range(4):
        rows = decoder_rows(coder, picked, layer=layer)
        np.testing.assert_array_equal(rows, full[layer, picked])
        for to in range(layer, 4):
            rows = decoder_rows(coder, np.asarray(picked), layer=layer, to=to)
            np.testing.assert_array_equal(rows, full[layer, picked, to])
    assert decoder_rows(coder, [], layer=1).shape == (0, 4, 640)
    narrow = publish(tmp_path, MULTI[1], dtype=ml_dtypes.bfloat16)
    assert decoder_rows(narrow, [1, 2], layer=17, to=17).dtype == ml_dtypes.bfloat16


@pytest.mark.parametrize(
    "where, arguments, word",
    [
        (SINGLE[0], dict(features=[8]), "0 to 7"),
        (SINGLE[0], dict(features=[-1]), "0 to 7"),
        (SINGLE[0], dict(features=[0.5]), "whole numbers"),
        (SINGLE[0], dict(features=3), "whole numbers"),
        (SINGLE[0], dict(features=[1], layer=0), "one"),
        (MULTI[0], dict(features=[1]), "0 to 3"),
        (MULTI[0], dict(features=[1], layer=4), "0 to 3"),
        (MULTI[0], dict(features=[1], layer=2, to=1), "2 to 3"),
    ],
)
def test_bad_rows(tmp_path, where, arguments, word):
    with pytest.raises(InputError, match=word):
        decoder_rows(publish(tmp_path, where), **arguments)
