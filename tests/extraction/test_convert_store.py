"""A store as version 0.1.0 first wrote it, converted: what `extract` writes today."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from feature_writer import write
from gemma_scope_jax.errors import InputError
from gemma_scope_jax.extraction.store.store import FeatureStore

ROOT = Path(__file__).parents[2]
OLD = ROOT / "tests" / "golden" / "features_version_1"  # of ten texts, by the same `write`


def convert(old, new):
    program = [sys.executable, ROOT / "packaging" / "convert_store.py", old, new]
    return subprocess.run(program, capture_output=True, text=True)


def test_a_converted_store_is_that_of_today(tmp_path):
    with pytest.raises(InputError, match="version is 1, not 2.*packaging/convert_store.py"):
        FeatureStore(OLD)
    assert convert(OLD, tmp_path / "new").returncode == 0
    found, wanted = FeatureStore(tmp_path / "new"), write(tmp_path / "wanted", count=10)
    found.verify()
    assert found.complete and found.counted == wanted.counted and len(wanted.shards) == 2
    for a, b in zip(found.segments(), wanted.segments(), strict=True):
        for name in ("tokens", "documents", "positions", "offsets", "counted", "pieces"):
            assert (getattr(a, name) == getattr(b, name)).all()
        for one, two in zip(a.by_token()[:2], b.by_token()[:2]):
            np.testing.assert_array_equal(one, two)
        np.testing.assert_allclose(a.by_token().values, b.by_token().values, rtol=2**-10)
    assert found.where(3) == wanted.where(3)


def test_what_is_no_old_store_is_one_line(tmp_path):
    assert convert(OLD, tmp_path / "new").returncode == 0
    said = convert(tmp_path / "new", tmp_path / "again").stderr
    assert said == f"{tmp_path / 'new'}: holds no feature store of version 1\n"
