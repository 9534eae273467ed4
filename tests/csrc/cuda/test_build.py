"""The CUDA kernels compile for sm_80, sm_90a and sm_100 without spills; needs nvcc and no GPU.

Asserted is what the byte models rest on: nothing spills, registers and shared memory are those of
nvcc_resources.json, and the streaming kernels touch memory in 16-byte accesses.
"""

import json

import pytest

from tests.csrc.cuda import nvcc_build
from tests.made_once import made_once

NVCC = nvcc_build.find_nvcc()
pytestmark = pytest.mark.skipif(NVCC is None, reason="no nvcc in CUDA_HOME, on PATH or /usr/local")
TABLE = json.loads(nvcc_build.TABLE.read_text())
TARGETS = set(nvcc_build.TARGETS)
# The longest to compile has its place among the slow tests.
SOURCES = [
    pytest.param(name, marks=pytest.mark.slow) if name == "linear_chunk.cu" else name
    for name in nvcc_build.SOURCES
]

# Kernels that stream rows -> at least so many 16-byte (loads, stores).
STREAMING = {
    "residual_fwd_kernel": (3, 0),  # two vectors at a time, and one for the rest
    "residual_bwd_kernel": (2, 2),
    "sample_blocks_kernel": (2, 0),
    "linear_cluster_kernel": (2, 1),
    "linear_loop_kernel": (4, 1),
}


def test_the_table_has_every_source():
    assert {key.split(": ")[0] for key in TABLE if ": " in key} == set(nvcc_build.SOURCES)


@pytest.fixture
def compiled(source, tmp_path_factory):
    def build(out):
        nvcc_build.compile_source(source, out)

    return made_once(tmp_path_factory, f"nvcc-{source}", build)


@pytest.mark.parametrize("source", SOURCES)
def test_compiles_for_all_targets_within_its_resources(source, compiled):
    found = nvcc_build.resources(compiled)
    expected = {k.split(": ")[1]: v for k, v in TABLE.items() if k.startswith(f"{source}: ")}
    assert set(found) == set(expected)
    for kernel, targets in found.items():
        assert set(targets) == TARGETS, kernel
        for target, (registers, shared, stack, spilled) in targets.items():
            title = f"{kernel} {target}: {registers} registers"
            assert stack == 0 and spilled == 0, title
            if nvcc_build.release() == TABLE["nvcc"]:
                assert [registers, shared] == expected[kernel][target][:2], title
            else:  # other compilers allocate a little differently
                assert registers <= expected[kernel][target][0] + 16, title
                assert shared <= expected[kernel][target][1], title


@pytest.mark.parametrize("source", SOURCES)
def test_streaming_kernels_use_16_byte_accesses(source, compiled):
    cuobjdump = nvcc_build.find_cuobjdump()
    if cuobjdump is None:
        pytest.skip("no cuobjdump beside nvcc, in Triton or on PATH")
    found = nvcc_build.accesses(compiled, cuobjdump)
    assert {target for _, target in found} == TARGETS
    for (kernel, target), (loads, stores) in found.items():
        least = STREAMING.get(kernel.split("<")[0], (0, 0))
        assert loads >= least[0] and stores >= least[1], (kernel, target, loads, stores)
