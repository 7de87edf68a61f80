"""The fused kernels against the eager route, bit for bit: on a GPU where there is one, else in Triton's interpreter."""

import sys

import pytest
import torch

from lowmem_wanda.sparsity.masks import prune_lowest
from lowmem_wanda.sparsity.patterns import NM, Unstructured

if sys.platform != "linux":
    pytest.skip("Triton is for Linux only", allow_module_level=True)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRET = "1" if DEVICE == "cpu" else "0"
triton = pytest.importorskip("triton", reason="needs Triton, which torch for CUDA brings: pip install triton")
with pytest.MonkeyPatch.context() as environment:
    environment.setenv("TRITON_INTERPRET", INTERPRET)  # each kernel reads it; conftest.py has set it for Triton itself
    from lowmem_wanda.sparsity import kernels

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
# 1030 and 1204 columns are more groups than one program takes; 0.6 % of 172 is one weight.
CASES = [(NM(1, 2), 1030), (NM(2, 4), 172), (NM(1, 4), 1204), (NM(4, 8), 688), (NM(8, 16), 688), (NM(3, 16), 48)]
CASES += [
    (Unstructured(0.1), 172),
    (Unstructured(0.5), 172),
    (Unstructured(0.006), 172),
    (Unstructured(0.5), 688),
    (Unstructured(0.99), 256),
]


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    """Kernels run on CPU tensors, and what `tried` remembers is of this test."""
    monkeypatch.setenv("TRITON_INTERPRET", INTERPRET)
    kernels.tried.cache_clear()
    yield
    kernels.tried.cache_clear()


def matrix(dtype, columns):
    """(5, columns): ties and zeros of both signs, no ties, denormals, one value, one value and a lower one at the end."""
    weight = torch.randn(5, columns, generator=torch.Generator().manual_seed(columns))
    weight[0] = weight[0].mul(2).round().div(2)
    weight[2] *= torch.finfo(dtype).tiny
    weight[3] = weight[3].sign()
    weight[4], weight[4, -1] = 1, -0.5
    return weight.to(dtype)


def norms_of(columns):
    """(columns): few values, so that products tie too; a zero; no powers of two, so that products round."""
    norms = torch.randint(1, 5, (columns,), generator=torch.Generator().manual_seed(1)) / 3
    norms[columns // 2] = 0
    return norms


def eager(weight, norms, pattern):
    """What `prune_lowest` makes of a copy."""
    weight = weight.clone()
    prune_lowest(weight, lambda rows: weight[rows].float().abs().mul_(1 if norms is None else norms), pattern)
    return weight


def fuse(weight, norms, pattern):
    """Prunes in place; gives back the flag."""
    group = pattern.groups(weight.shape[1])
    norms = None if norms is None else norms.to(DEVICE)
    finite = kernels.prune_(weight, norms, group.size, group.zeros)
    assert finite.shape == () and finite.dtype == torch.bool and finite.device == weight.device
    return bool(finite)


def bits(weight):
    """The weight as integers, on the CPU."""
    return weight.cpu().contiguous().view(kernels.BITS[weight.dtype])


@pytest.mark.slow
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("pattern", "columns"), CASES, ids=str)
def test_bits_are_those_of_the_eager_route(pattern, columns, dtype, scaled):
    weight, norms = matrix(dtype, columns), norms_of(columns) if scaled else None
    pruned = weight.clone().to(DEVICE)
    assert fuse(pruned, norms, pattern)
    assert torch.equal(bits(pruned), bits(eager(weight, norms, pattern)))


@pytest.mark.parametrize("pattern", [NM(2, 4), Unstructured(0.5)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_transposed_weight(dtype, pattern):
    weight, norms = matrix(dtype, 172), norms_of(172)
    pruned = weight.to(DEVICE).t().contiguous().t()  # GPT-2's
    assert fuse(pruned, norms, pattern) and pruned.stride() == (1, 5)
    assert torch.equal(bits(pruned), bits(eager(weight, norms, pattern)))


@pytest.mark.parametrize("pattern", [NM(2, 4), NM(4, 8), Unstructured(0.5)], ids=str)
def test_nothing_beside_a_part_of_a_matrix_is_read_or_written(pattern):
    weight = matrix(torch.bfloat16, 688)
    whole = torch.full((7, 1000), torch.nan, dtype=weight.dtype, device=DEVICE)
    whole[1:6, 100:788] = weight.to(DEVICE)
    before = bits(whole)
    assert fuse(whole[1:6, 100:788], None, pattern)
    before[1:6, 100:788] = bits(eager(weight, None, pattern))
    assert torch.equal(bits(whole), before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pattern", [NM(1, 2), Unstructured(0.5)], ids=str)
def test_kept_zeros_keep_their_sign_and_pruned_ones_lose_it(pattern, dtype):
    weight = torch.full((2, 8), -0.0, dtype=dtype, device=DEVICE)
    assert fuse(weight, None, pattern)
    kept = [False, True] * 4 if isinstance(pattern, NM) else [False] * 4 + [True] * 4
    assert torch.signbit(weight).tolist() == [kept, kept]


@pytest.mark.parametrize("pattern", [NM(2, 4), Unstructured(0.5)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_denormals_are_no_zeros(dtype, pattern):
    weight = torch.arange(64, 0, -1).mul(torch.finfo(dtype).smallest_normal / 128).to(dtype).reshape(2, 32)
    norms = torch.full((32,), 0.75 if dtype != torch.float16 else 2.0**-120)  # products denormal in float32
    pruned = weight.clone().to(DEVICE)
    assert fuse(pruned, norms, pattern)
    assert torch.equal(bits(pruned), bits(eager(weight, norms, pattern)))
    assert pruned[0, 0] != 0  # flushed to zero all would tie, and the first would go


@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")  # of the interpreter's NumPy
@pytest.mark.parametrize("pattern", [NM(2, 4), NM(8, 16), Unstructured(0.5)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_flag_sees_one_score_that_is_not_finite(dtype, pattern):
    finite = matrix(dtype, 176)[:2].to(DEVICE)
    for place, bad in (((0, 0), torch.nan), ((1, 175), torch.inf), ((0, 100), -torch.inf)):
        weight = finite.clone()
        weight[place] = bad
        assert not fuse(weight, None, pattern)
    norms = norms_of(176)
    norms[3] = torch.nan
    assert not fuse(finite.clone(), norms, pattern)
    norms[3] = 3e38
    finite[:, 3] = 0.5
    assert fuse(finite.clone(), norms, pattern)
    finite[1, 3] = 2
    assert not fuse(finite, norms, pattern)  # finite factors, and no finite product


@pytest.mark.parametrize(
    ("pattern", "dtype", "transposed"),
    [(NM(2, 4), torch.bfloat16, False), (NM(2, 4), torch.float32, True), (Unstructured(0.5), torch.float16, False)],
    ids=str,
)
def test_agrees_where_the_kernel_is_right(pattern, dtype, transposed):
    weight = torch.zeros((64, 2), dtype=dtype, device=DEVICE).t()
    weight = weight if transposed else weight.contiguous()
    state = torch.get_rng_state()
    for norms in (None, torch.ones(64, device=DEVICE)):
        assert kernels.agrees(weight, norms, pattern.groups(64).size, pattern.groups(64).zeros)
    assert torch.equal(torch.get_rng_state(), state) and not weight.any()
    assert kernels.tried.cache_info().misses == 2


@pytest.mark.parametrize(
    ("columns", "dtype", "size"),
    [
        (48, torch.float32, 3),
        (64, torch.float32, 32),
        (30, torch.float32, 4),
        (32, torch.float64, 4),
        (kernels.LONGEST + 1, torch.float32, kernels.LONGEST + 1),
    ],
)
def test_agrees_to_nothing_it_has_no_kernel_for(columns, dtype, size):
    assert not kernels.agrees(torch.zeros(1, columns, dtype=dtype, device=DEVICE), None, size, 1)
    assert not kernels.tried.cache_info().misses


def nothing(weight, *_):
    return torch.tensor(True)


def blind(weight, norms, count):
    right(weight.nan_to_num_(), norms, count)
    return torch.tensor(True)


def uncompiled(*_):
    raise triton.TritonError("PTXAS error")


def unloaded(*_):
    raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable")


right = kernels.lowest_of_rows_


@pytest.mark.parametrize("broken", [nothing, blind, uncompiled, unloaded])
def test_agrees_to_no_broken_kernel(monkeypatch, broken):
    monkeypatch.setattr(kernels, "lowest_of_rows_", broken)
    weight = torch.ones(3, 32, device=DEVICE)
    assert not kernels.agrees(weight, None, 32, 8)
    monkeypatch.setattr(kernels, "lowest_of_rows_", right)
    assert not kernels.agrees(weight, None, 32, 8)  # tried once


def test_without_a_gpu_or_the_interpreter_there_is_nothing_to_run_on(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(kernels, "prune_row", triton.runtime.JITFunction(kernels.prune_row.fn))
    kernels.available.cache_clear()
    assert not kernels.available("cuda") and not kernels.available("cpu")
    kernels.available.cache_clear()
