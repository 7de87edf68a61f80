"""The fused kernels against the eager route, bit for bit: on a GPU where there is one, else in Triton's interpreter."""

import sys

import pytest
import torch

from lowmem_wanda.patterns import NM, Ratio, prune_lowest

if sys.platform != "linux":
    pytest.skip("Triton is for Linux only", allow_module_level=True)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRET = "1" if DEVICE == "cpu" else "0"
with pytest.MonkeyPatch.context() as environment:
    environment.setenv("TRITON_INTERPRET", INTERPRET)  # read when Triton is first imported, and by each kernel
    triton = pytest.importorskip("triton", reason="needs Triton, which torch for CUDA brings: pip install triton")
    from lowmem_wanda import fused

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
# 1030 and 1204 columns are more groups than one program takes; 0.6 % of 172 is one weight.
CASES = [(NM(1, 2), 1030), (NM(2, 4), 172), (NM(1, 4), 1204), (NM(4, 8), 688), (NM(8, 16), 688), (NM(3, 16), 48)]
CASES += [(Ratio(0.1), 172), (Ratio(0.5), 172), (Ratio(0.006), 172), (Ratio(0.5), 688), (Ratio(0.99), 256)]


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    """Kernels run on CPU tensors, and what `tried` remembers is of this test."""
    monkeypatch.setenv("TRITON_INTERPRET", INTERPRET)
    fused.tried.cache_clear()
    yield
    fused.tried.cache_clear()


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
    if norms is None:
        return prune_lowest(weight, lambda rows: weight[rows].float().abs(), pattern)
    return prune_lowest(weight, lambda rows: weight[rows].float().abs().mul_(norms), pattern)


def of_and_count(pattern, columns):
    """Of how many the kernel prunes how many; (None, count) is of a row."""
    return (
        (pattern.of, pattern.of - pattern.kept) if isinstance(pattern, NM) else (None, int(columns * pattern.sparsity))
    )


def fuse(weight, norms, pattern):
    """Prunes in place; gives back the flag."""
    of, count = of_and_count(pattern, weight.shape[1])
    norms = None if norms is None else norms.to(DEVICE)
    finite = fused.lowest_of_groups_(weight, norms, of, count) if of else fused.lowest_of_rows_(weight, norms, count)
    assert finite.shape == () and finite.dtype == torch.bool and finite.device == weight.device
    return bool(finite)


def bits(weight):
    """The weight as integers, on the CPU."""
    return weight.cpu().contiguous().view(fused.BITS[weight.dtype])


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("pattern", "columns"), CASES, ids=str)
def test_bits_are_those_of_the_eager_route(pattern, columns, dtype, scaled):
    weight, norms = matrix(dtype, columns), norms_of(columns) if scaled else None
    pruned = weight.clone().to(DEVICE)
    assert fuse(pruned, norms, pattern)
    assert torch.equal(bits(pruned), bits(eager(weight, norms, pattern)))


@pytest.mark.parametrize("pattern", [NM(2, 4), Ratio(0.5)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_transposed_weight(dtype, pattern):
    weight, norms = matrix(dtype, 172), norms_of(172)
    pruned = weight.to(DEVICE).t().contiguous().t()  # GPT-2's
    assert fuse(pruned, norms, pattern) and pruned.stride() == (1, 5)
    assert torch.equal(bits(pruned), bits(eager(weight, norms, pattern)))


@pytest.mark.parametrize("pattern", [NM(2, 4), NM(4, 8), Ratio(0.5)], ids=str)
def test_nothing_beside_a_part_of_a_matrix_is_read_or_written(pattern):
    weight = matrix(torch.bfloat16, 688)
    whole = torch.full((7, 1000), torch.nan, dtype=weight.dtype, device=DEVICE)
    whole[1:6, 100:788] = weight.to(DEVICE)
    before = bits(whole)
    assert fuse(whole[1:6, 100:788], None, pattern)
    before[1:6, 100:788] = bits(eager(weight, None, pattern))
    assert torch.equal(bits(whole), before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pattern", [NM(1, 2), Ratio(0.5)], ids=str)
def test_kept_zeros_keep_their_sign_and_pruned_ones_lose_it(pattern, dtype):
    weight = torch.full((2, 8), -0.0, dtype=dtype, device=DEVICE)
    assert fuse(weight, None, pattern)
    kept = [False, True] * 4 if isinstance(pattern, NM) else [False] * 4 + [True] * 4
    assert torch.signbit(weight).tolist() == [kept, kept]


@pytest.mark.parametrize("pattern", [NM(2, 4), Ratio(0.5)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_denormals_are_no_zeros(dtype, pattern):
    weight = torch.arange(64, 0, -1).mul(torch.finfo(dtype).smallest_normal / 128).to(dtype).reshape(2, 32)
    norms = torch.full((32,), 0.75 if dtype != torch.float16 else 2.0**-120)  # products denormal in float32
    pruned = weight.clone().to(DEVICE)
    assert fuse(pruned, norms, pattern)
    assert torch.equal(bits(pruned), bits(eager(weight, norms, pattern)))
    assert pruned[0, 0] != 0  # flushed to zero all would tie, and the first would go


@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")  # of the interpreter's NumPy
@pytest.mark.parametrize("pattern", [NM(2, 4), NM(8, 16), Ratio(0.5)], ids=str)
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
    [(NM(2, 4), torch.bfloat16, False), (NM(2, 4), torch.float32, True), (Ratio(0.5), torch.float16, False)],
    ids=str,
)
def test_agrees_where_the_kernel_is_right(pattern, dtype, transposed):
    weight = torch.zeros((64, 2), dtype=dtype, device=DEVICE).t()
    weight = weight if transposed else weight.contiguous()
    state = torch.get_rng_state()
    for norms in (None, torch.ones(64, device=DEVICE)):
        assert fused.agrees(weight, norms, *of_and_count(pattern, 64))
    assert torch.equal(torch.get_rng_state(), state) and not weight.any()
    assert fused.tried.cache_info().misses == 2


@pytest.mark.parametrize(
    ("columns", "dtype", "of"),
    [
        (48, torch.float32, 3),
        (64, torch.float32, 32),
        (30, torch.float32, 4),
        (32, torch.float64, 4),
        (fused.LONGEST + 1, torch.float32, None),
    ],
)
def test_agrees_to_nothing_it_has_no_kernel_for(columns, dtype, of):
    assert not fused.agrees(torch.zeros(1, columns, dtype=dtype, device=DEVICE), None, of, 1)
    assert not fused.tried.cache_info().misses


def nothing(weight, *_):
    return torch.tensor(True)


def blind(weight, norms, count):
    right(weight.nan_to_num_(), norms, count)
    return torch.tensor(True)


def uncompiled(*_):
    raise triton.TritonError("PTXAS error")


def unloaded(*_):
    raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable")


right = fused.lowest_of_rows_


@pytest.mark.parametrize("broken", [nothing, blind, uncompiled, unloaded])
def test_agrees_to_no_broken_kernel(monkeypatch, broken):
    monkeypatch.setattr(fused, "lowest_of_rows_", broken)
    weight = torch.ones(3, 16, device=DEVICE)
    assert not fused.agrees(weight, None, None, 8)
    monkeypatch.setattr(fused, "lowest_of_rows_", right)
    assert not fused.agrees(weight, None, None, 8)  # tried once


def test_without_a_gpu_or_the_interpreter_there_is_nothing_to_run_on(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(fused, "prune_row", triton.runtime.JITFunction(fused.prune_row.fn))
    fused.available.cache_clear()
    assert not fused.available("cuda") and not fused.available("cpu")
    fused.available.cache_clear()
