import pytest
import torch

from initlab.errors import UsageError
from initlab.nn.init import gaussian
from initlab.stats.summarize import relative_error
from initlab.tasks.ensemble.device import MATMULS, drops_subnormals, set_matmul


@pytest.fixture(autouse=True)
def as_it_was():
    before = torch.backends.cuda.matmul.allow_tf32
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.parametrize("name", [*MATMULS, *reversed(MATMULS)])
def test_both_of_torchs_switches_tell_the_choice(name):
    set_matmul(name)
    assert torch.backends.cuda.matmul.allow_tf32 == (name == "tf32")
    assert torch.backends.cuda.matmul.fp32_precision == name
    assert torch.get_float32_matmul_precision() == {"ieee": "highest", "tf32": "high"}[name]


def test_a_cpu_multiplies_as_before():
    a, b = gaussian((50, 60), 0, "a"), gaussian((60, 70), 0, "b")
    set_matmul("ieee")
    exact = a @ b
    set_matmul("tf32")
    assert torch.equal(a @ b, exact)


def test_another_name_is_refused():
    with pytest.raises(UsageError, match="matmul=tf23: must be one of ieee, tf32 - did you mean tf32"):
        set_matmul("tf23")


def test_a_machine_that_flushes_is_told_by_its_product():
    assert not drops_subnormals("float32") and not drops_subnormals(torch.float64)
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush float32")
    try:
        assert drops_subnormals("float32")
    finally:
        torch.set_flush_denormal(False)
    assert not drops_subnormals("float32")


@pytest.mark.gpu
def test_a_gpu_multiplies_as_it_was_told():
    """Rounding to 11 bits leaves about 2^-12 per product, to 24 bits 2^-25; sums of K = 1024 random signs keep that."""
    a, b = gaussian((512, 1024), 0, "a"), gaussian((1024, 512), 0, "b")
    exact = a.double() @ b.double()
    found = {}
    for name in MATMULS:
        set_matmul(name)
        found[name] = float(relative_error((a.cuda() @ b.cuda()).cpu().double(), exact)[0])
    assert found["ieee"] < 2e-6
    assert 2e-5 < found["tf32"] < 2e-3
