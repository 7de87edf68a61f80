"""How long a pruning takes: measured rates, given rates, and what is made of them."""

import json
from dataclasses import replace

import pytest
from helpers import save_tiny

from lowmem_wanda import plan, prune
from lowmem_wanda.cli.main import main
from lowmem_wanda.errors import BudgetError
from lowmem_wanda.pruning.estimate import LAUNCH, Rates, estimate, measure
from lowmem_wanda.pruning.job import prepare
from lowmem_wanda.pruning.plan import predict

ABSENT = {"vram": "24GB", "ram": "32GB"}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("source"), "llama")


def test_the_time_is_that_of_what_takes_longest(source, token_file):
    job = prepare(source, text=[str(token_file)])
    made, depth = predict(job), job.model.depth
    inside = sum(tensor.nbytes for index in range(depth) for tensor in job.model.block_tensors(index))
    nbytes = job.model.checkpoint.nbytes
    computing, reading, writing = made.flops / 0.7 / 1e6, inside / 2e5, nbytes / 4e5
    fast = Rates(flops=1e6, exact=2e6, weights=float("inf"), read=2e5, written=4e5)
    for slots, expected in (
        (1, computing + reading + writing),
        (2, (depth - 1) / depth * max(computing, reading + writing) + (computing + reading + writing) / depth),
        (3, (depth - 1) / depth * max(computing, reading, writing) + (computing + reading + writing) / depth),
    ):
        one = replace(made, layout=replace(made.layout, slots=slots))
        assert estimate(job, one, fast) == pytest.approx(expected)
    masked = sum(matrix.weights for block in job.selected for matrix in block) / 1e3
    slow = replace(fast, weights=1e3, busy=1e-5, cores=2)
    whole = replace(made, layout=replace(made.layout, slots=1))
    solving = replace(whole, flops=whole.flops + 14 * 10**6, exact=14 * 10**6, launches=30)
    assert estimate(job, solving, replace(fast, launches=10)) == pytest.approx(computing + reading + writing + 10 + 3)
    assert estimate(job, whole, slow) == pytest.approx(computing + reading + writing + masked + inside * 1e-5 / 2)


@pytest.mark.parametrize("settings", [{}, {"method": "magnitude"}, {"pattern": "50%", "method": "magnitude"}])
def test_this_machine_is_measured_and_nothing_is_left_behind(source, token_file, tmp_path, settings):
    text = {} if settings else {"text": [str(token_file)]}
    made = plan(source, **text, **settings)
    assert made.seconds > 0 and all(rate > 0 for rate in made.rates.values())
    assert ("flops" in made.rates) == (not settings) and {"weights", "read", "written"} <= made.rates.keys()
    begun = []
    report = prune(source, tmp_path / "out", **text, **settings, on_start=begun.append)
    assert report["timing"]["expected"] == begun[0]["seconds"] > 0
    assert [file.name for file in tmp_path.iterdir()] == ["out"]
    begun.clear()
    prune(source, tmp_path / "out", **text, **settings, on_start=begun.append)
    assert begun[0]["resumed"] and begun[0]["seconds"] is None


def test_where_nothing_can_be_written_writing_takes_no_time(source, token_file, tmp_path):
    job = prepare(source, text=[str(token_file)])
    assert measure(job, predict(job), tmp_path / "nowhere").written == float("inf")


def test_a_machine_that_is_not_here(source, token_file):
    text = {"text": [str(token_file)]}
    made = plan(source, **text, **ABSENT)
    assert made.device_peak > 0 and made.seconds is None and made.rates is None
    known = plan(source, **text, **ABSENT, flops="80T", disk="3GB")
    assert (
        known.rates == {"flops": 80e12, "exact": 40e12, "read": 3e9, "written": 3e9, "launches": 1 / LAUNCH, "cores": 1}
        and known.seconds > 0
    )
    alone = plan(source, method="magnitude", ram="8GB", disk="1GB")
    assert alone.device_peak == 0 and alone.seconds > 0
    with pytest.raises(BudgetError, match=r"--vram: 2 MB cannot be kept, .*give --vram \d+MB"):
        plan(source, **text, vram="2MB", ram="32GB")
    with pytest.raises(BudgetError, match=r"give --ram \d+MB"):
        plan(source, **text, vram="24GB", ram="100MB")
    with pytest.raises(BudgetError, match="--ram: 0 MB cannot be kept"):
        plan(source, **text, ram="1KB")
    with pytest.raises(BudgetError, match="--device cpu is none"):
        plan(source, **text, **ABSENT, device="cpu")
    with pytest.raises(BudgetError, match="give its --ram"):
        plan(source, **text, flops="80T")
    for more in ({"device": "cuda"}, {"max_vram": "8GB"}):
        with pytest.raises(BudgetError, match="has no GPU"):
            plan(source, **text, ram="8GB", **more)
    with pytest.raises(BudgetError, match="give more than 0"):
        plan(source, **text, **ABSENT, flops="0T")
    with pytest.raises(BudgetError, match="vram='lots'"):
        plan(source, **text, vram="lots")


def test_the_command_says_it(source, token_file, capsys):
    text = [str(source), "--text", str(token_file)]
    assert main(["plan", *text]) == 0
    assert "time about 1.0 s after the start (products" in " ".join(capsys.readouterr().out.split())
    assert main(["plan", *text, "--vram", "24GB"]) == 0
    assert "give that machine's rates: --disk 3GB/s and --flops 80T" in " ".join(capsys.readouterr().out.split())
    flags = ["--vram", "24GB", "--ram", "32GB", "--flops", "80 TFLOPS", "--disk", "3GB/s"]
    assert main(["plan", *text, *flags, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rates"]["flops"] == 80e12
    for wrong in ("fast", "80", "0T"):
        with pytest.raises(SystemExit):
            main(["plan", *text, "--flops", wrong])
