"""`init.critical`: the gain as a multiple of the one at which an activation's gradients keep their size."""

from collections.abc import Callable

import pytest

import initlab

Lab = Callable[..., tuple[int, str, str]]
STACK = ("task=stack", "depth=2", "width=8", "seeds=1", "batch=4", "theory=off", "plots=false", "report=false")


@pytest.mark.long
def test_each_activation_of_a_sweep_has_its_own_critical_gain(lab: Lab) -> None:
    words = ("activation=relu,tanh,selu", "init.critical=0.9,1.0", "init=lecun,orthogonal")
    assert lab("-m", *words, *STACK)[0] == 0
    found = initlab.read("outputs/**").drop_duplicates("run")
    assert len(found) == 12
    for name, times, gain in found[["activation", "init.critical", "gain"]].itertuples(index=False):
        assert gain == times * initlab.critical(name), name
    with_biases = ("init.critical=1.1", "init.sigma_b=0.3", "activation=tanh", "hydra.run.dir=biases")
    assert lab(*with_biases, *STACK)[0] == 0
    alone = initlab.read("biases")
    assert (alone["gain"] == 1.1 * initlab.critical("tanh", 0.3)).all() and set(alone["init.critical"]) == {1.1}
    assert initlab.critical("tanh", 0.3) > initlab.critical("tanh")


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("activation=gelu",), "init.critical=1: sigma_b=0: activation=gelu has chi_1 = 1 at q=0, sigma_w=2"),
        (("activation=softplus",), "init.critical=1: activation=softplus: has no critical line"),
        (("init.gain=2",), "init.critical=1: is a gain, as is init.gain=2; give one of them"),
        (("sweep.gain=[1,2]",), "init.critical=1: is a gain, as is sweep.gain=[1.0, 2.0]; give one of them"),
        (("sweep.init=[lecun,kaiming]",), "init.critical=1: is a gain, as is sweep.init=['lecun', 'kaiming']"),
        (("init=naive",), "init.critical=1: needs weights by fan_in, and biases by init.sigma_b; the rule has mode"),
        (("init=torch_default",), "init.critical=1: needs weights by fan_in, and biases by init.sigma_b; the rule"),
        (("init.critical=-1",), "init.critical=-1: must be"),
        (("init.critical=nan",), "init.critical=nan: must be"),
    ],
)
def test_a_gain_that_is_not_there_or_said_twice_is_one_line(lab: Lab, words: tuple[str, ...], text: str) -> None:
    code, _, err = lab("init.critical=1", *words, *STACK)
    assert code == 2 and err.startswith(f"initlab: {text}") and err.count("\n") == 1, err
