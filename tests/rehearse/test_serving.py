"""Prefill and decode compile for devices that are not there, and write the cache in place."""

import importlib.util

import pytest

from moe_jax.rehearse import pod
from moe_jax.serve.programs import Programs
from tests.serve import case

if not importlib.util.find_spec("jax_plugins"):
  pytest.skip("the rehearse extra is not installed", allow_module_level=True)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["prefill", "decode"])
def test_serving_compiles_for_a_described_pod(kind):
  settings = case.settings_of((2, 2, 2), max_tokens=4096, page=16, prefill_chunk=32)
  programs = Programs(settings, pod.describe("h100:2x4").mesh(settings.mesh))
  lower = {"prefill": programs.lower_prefill, "decode": programs.lower_decode}[kind]
  memory = lower(programs.widths()[0]).compile().memory_analysis()
  whole = sum(leaf.size * leaf.dtype.itemsize for leaf in programs.abstract.cache[:2])
  cache_bytes = whole / settings.mesh.num_devices
  assert memory.alias_size_in_bytes >= cache_bytes
  assert memory.temp_size_in_bytes < cache_bytes / 2
