"""The fused passes are accepted by Triton's compiler for a GPU, also where there is none: no kernel is run."""

import os

import pytest
import torch

from initlab.stats.kernels import triton_rows as fused

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not fused.TRITON, reason="Triton is not installed"),
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") == "1", reason="nothing is compiled under TRITON_INTERPRET=1"
    ),
]
POINTERS = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}
HOPPER = ("cuda", 90, 32)
BUFFERS = ["*fp64", "*fp64", "*i32"]


def accepted(program, types, **constants):
    """The size of the compiled program. An argument that is 1 is a constant to Triton: both cases are compiled."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    given = iter(types)
    kinds = {name: "constexpr" if name in constants else next(given) for name in program.arg_names}
    fixed = constants | {name: 1 for name, kind in kinds.items() if kind == 1}
    signature = {name: "constexpr" if kind == 1 else kind for name, kind in kinds.items()}
    options = {"num_warps": fused.WARPS}
    compiled = triton.compile(ASTSource(program, signature, fixed), target=GPUTarget(*HOPPER), options=options)
    assert ".ftz.f32" not in compiled.asm["ptx"]  # subnormal numbers stay what they are
    return len(compiled.asm["cubin"])


@pytest.fixture(autouse=True)
def fresh_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


FORMATS = pytest.mark.parametrize("dtype", POINTERS, ids=str)


@FORMATS
@pytest.mark.parametrize("kind", [0, 1, 2], ids=["alone", "relu", "mask"])
@pytest.mark.parametrize("c", ["i32", 1])
def test_batched(dtype, kind, c):
    x, program = POINTERS[dtype], fused._kernels()[0].measure_batched
    columns = fused.COLUMNS if c != 1 else 32 * fused.WARPS // fused.ROWS
    sizes = fused._formats(dtype) | {"KIND": kind, "ROWS": fused.ROWS, "COLUMNS": columns}
    assert accepted(program, [x, x, x, *BUFFERS, *BUFFERS, "i32", c], **sizes) > 0


@FORMATS
def test_without_a_batch(dtype):
    x, kernels, sizes = POINTERS[dtype], fused._kernels()[0], fused._formats(dtype) | {"ENTRIES": fused.ENTRIES}
    assert accepted(kernels.measure_flat, [x, *BUFFERS, "i32"], **sizes) > 0
    for step in ("i32", 1):
        assert accepted(kernels.measure_update, [x, x, "*fp32", step, *BUFFERS * 3, "i32"], **sizes) > 0


@FORMATS
@pytest.mark.parametrize(("blocks", "c", "entries"), [("i32", "i32", "i32"), (1, 1, 1), ("i32", 1, "i32")])
@pytest.mark.parametrize("batched", [True, False])
def test_putting_together(dtype, blocks, c, entries, batched):
    formats = fused._formats(dtype)
    sizes = {name: formats[name] for name in ("OCTAVES", "BINS")}
    sizes |= {"NORMAL": 10, "BATCHED": batched, "COLUMNS": 32 if c == 1 else fused.COLUMNS}
    types = [*BUFFERS, "*fp64", "*i32", blocks, blocks, c, c, entries, 1 if entries == 1 else "i32"]
    assert accepted(fused._kernels()[1].merge, types, **sizes) > 0
    assert accepted(fused._kernels()[1].merge_units, ["*fp64", blocks, c], COLUMNS=sizes["COLUMNS"]) > 0


@pytest.mark.parametrize("normal", [True, False])
@pytest.mark.parametrize("entries", ["i32", 1])
def test_random_numbers(normal, entries):
    from initlab.nn import triton_philox

    sizes = {"NORMAL": normal, "COUNTERS": triton_philox.COUNTERS}
    assert accepted(triton_philox.draw_kernel, ["*i64", "*fp32", entries], **sizes) > 0
