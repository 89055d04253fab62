"""Philox against its published answers, and the laws that random numbers by position must keep."""

import math
import os
from itertools import product

import numpy as np
import pytest
import torch

from initlab.nn import philox
from initlab.nn.philox import LOW, gaussian, key, uniform, words
from initlab.stats.kernels import cpu

# Random123 1.14, tests/kat_vectors, lines `philox4x32 10`: counter, key, answer.
KNOWN = {
    "zeros": ((0,) * 4, (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    "ones": ((LOW,) * 4, (LOW, LOW), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    "digits of pi": (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
}
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
BOTH = pytest.mark.parametrize("draw", [uniform, gaussian])
N = 2**18
FIVE = 5 / math.sqrt(N)  # five standard errors of the mean of N numbers of variance 1


def on(values, device):
    return tuple(torch.tensor([v], device=device) for v in values)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN.values(), ids=KNOWN)
def test_published_answers(counter, key, answer, device):
    found = philox.philox(on(counter, device), *on(key, device))
    assert tuple(int(word) for word in found) == answer


@pytest.mark.parametrize("rounds", [9, 11])
def test_another_number_of_rounds_gives_other_answers(rounds, monkeypatch):
    monkeypatch.setattr(philox, "ROUNDS", rounds)
    counter, key, answer = KNOWN["digits of pi"]
    found = philox.philox(on(counter, "cpu"), *on(key, "cpu"))
    assert not set(answer) & {int(word) for word in found}


def test_the_words_of_a_key_are_the_answers_to_the_counters_in_order():
    keys = [0, 0x299F31D0A4093822]
    found = words(keys, 4 * 5 + 3)
    assert found.shape == (2, 23)
    assert tuple(found[0, :4].tolist()) == KNOWN["zeros"][2]
    for member, k in enumerate(keys):
        for block in range(5):
            answer = philox.philox(on((block, 0, 0, 0), "cpu"), *on((k & LOW, k >> 32), "cpu"))
            assert found[member, 4 * block : 4 * block + 4].tolist() == [int(word) for word in answer]


def test_words_are_words_and_all_their_bits_are_fair():
    drawn = words([key(0, "weight", 1)], N)
    assert int(drawn.min()) >= 0 and int(drawn.max()) <= LOW
    for bit in range(32):  # the standard error of a share of N fair bits is 1 / (2 sqrt N)
        assert abs(float((drawn >> bit & 1).double().mean()) - 0.5) < FIVE / 2, bit


@BOTH
@pytest.mark.parametrize("shape", [(100, 100), (7, 5), (3, 3), (1, 1), (5,), (784, 10)])
def test_a_member_is_the_single_draw_and_the_order_of_seeds_is_nothing(draw, shape):
    together = draw(shape, [4, 0, 11], "weight", 2)
    assert together.shape == (3, *shape) and together.dtype == torch.float32
    for member, seed in enumerate([4, 0, 11]):
        assert torch.equal(together[member], draw(shape, [seed], "weight", 2)[0])
    torch.manual_seed(1)
    assert torch.equal(draw(shape, [11, 4, 0], "weight", 2), together[[2, 0, 1]])


@BOTH
def test_a_longer_tensor_begins_like_a_shorter_one(draw):
    assert torch.equal(draw((40,), [3], "input")[:, :21], draw((21,), [3], "input"))


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(100, 100), (7, 5)])
def test_a_gpu_draws_the_same_integers_and_the_same_numbers_to_one_rounding(shape):
    seeds = range(16)
    keys = [key(seed, "weight", 1) for seed in seeds]
    assert torch.equal(words(keys, 1003, "cuda").cpu(), words(keys, 1003))
    assert torch.equal(uniform(shape, seeds, "weight", 1, "cuda").cpu(), uniform(shape, seeds, "weight", 1))
    there, here = (gaussian(shape, seeds, "weight", 1, device).cpu() for device in ("cuda", "cpu"))
    torch.testing.assert_close(there, here, rtol=2 * torch.finfo(torch.float32).eps, atol=1e-15)  # cos near its zeros
    assert float((there != here).double().mean()) < 1e-3


HERE = pytest.mark.skipif(
    not (philox.TRITON and os.environ.get("TRITON_INTERPRET") == "1"),
    reason="needs Triton, and TRITON_INTERPRET=1 on a CPU",
)
THERE = [pytest.mark.gpu, pytest.mark.skipif(not philox.TRITON, reason="Triton is not installed")]


@pytest.mark.parametrize("device", [pytest.param("cpu", marks=HERE), pytest.param("cuda", marks=THERE)])
@pytest.mark.parametrize("shape", [(100, 100), (7, 5), (1, 1), (3,), (0, 4), (784, 10)])
def test_one_pass_makes_the_same_numbers(shape, device):
    from initlab.nn import triton_philox

    seeds = [0, 3, 2**62]
    keys = [key(seed, "weight", 1) for seed in seeds]
    assert any(k >= 2**63 for k in [*keys, key(5, "bias", 2), key(1, "bias", 2)])  # the sign bit is a bit
    even, normal = (triton_philox.draw(keys, shape, torch.device(device), law).cpu() for law in (False, True))
    assert torch.equal(even, uniform(shape, seeds, "weight", 1))
    reference = gaussian(shape, seeds, "weight", 1)
    torch.testing.assert_close(normal, reference, rtol=2 * torch.finfo(torch.float32).eps, atol=1e-15)
    assert int((normal != reference).sum()) <= 1e-3 * reference.numel()


@pytest.mark.parametrize("shape", [(100, 100), (7, 5), (1, 1), (3,), (0, 4), (784, 10), (2**18,)])
def test_compiled_numbers_are_the_plain_ones(shape):
    """Words to the last bit. Of normal numbers none differed where two mathematical libraries were compared."""
    if cpu.library() is None:
        pytest.skip("needs a C++ compiler")
    seeds = [0, 3, 2**62]
    fast = [draw(shape, seeds, "weight", 1) for draw in (uniform, gaussian)]
    with cpu.plain():
        slow = [draw(shape, seeds, "weight", 1) for draw in (uniform, gaussian)]
    assert torch.equal(fast[0], slow[0])
    torch.testing.assert_close(fast[1], slow[1], rtol=torch.finfo(torch.float32).eps, atol=1e-15)
    assert int((fast[1] != slow[1]).sum()) <= 1e-5 * fast[1].numel()


@pytest.mark.parametrize("seeds", [2000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_no_two_tensors_share_a_stream(seeds):
    """Up to a million tensors: by chance two of them would share 64 bits once in 4e7 such sets."""
    named = product(range(seeds), ("weight", "bias"), range(50))
    keys = np.fromiter((key(*one) for one in named), np.uint64)
    assert len(np.unique(keys)) == len(keys) == 100 * seeds
    assert len(np.unique(keys & np.uint64(LOW))) < len(keys)  # 32 bits would not do: 5 or 116 pairs are expected
    first = words(keys[::100].tolist(), 4)  # and what is drawn from different keys differs
    assert len(torch.unique(first, dim=0)) == len(first)


def normal_cdf(x):
    return torch.special.ndtr(x)


def distance(sample, cdf):
    """Kolmogorov's sqrt(n) sup |F_n - F|: beyond 3.3 with probability 2 exp(-2 * 3.3^2) = 7e-10."""
    x = sample.double().flatten().sort().values
    steps = torch.arange(len(x) + 1, dtype=torch.float64) / len(x)
    f = cdf(x)
    return math.sqrt(len(x)) * float(torch.maximum((f - steps[:-1]).abs(), (f - steps[1:]).abs()).max())


CDF = {"gaussian": (gaussian, normal_cdf), "uniform": (uniform, lambda x: (x + 1) / 2)}


@pytest.mark.parametrize("law", CDF)
@pytest.mark.parametrize("seed", [0, 1, 2**62])
def test_the_laws_by_kolmogorov_and_smirnov(law, seed):
    draw, cdf = CDF[law]
    drawn = draw((N,), [seed], "weight", 1)
    assert distance(drawn, cdf) < 3.3
    assert distance(drawn * 1.05, cdf) > 3.3  # 5 % too wide is seen at this size
    assert distance(drawn[:, : N // 2] + 0.05, cdf) > 3.3
    assert distance(drawn, CDF["uniform" if law == "gaussian" else "gaussian"][1]) > 3.3


def test_moments():
    """Variances of the k-th power of a standard normal number: 1, 2, 15, 96; of a uniform one 1/3, 4/45."""
    z, u = (draw((N,), [7], "weight", 3).double() for draw in (gaussian, uniform))
    for power, expected, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(float(z.pow(power).mean()) - expected) < FIVE * math.sqrt(variance), power
    for power, expected, variance in ((1, 0, 1 / 3), (2, 1 / 3, 4 / 45)):
        assert abs(float(u.pow(power).mean()) - expected) < FIVE * math.sqrt(variance), power


def test_the_tails_are_there_and_end():
    """P(|z| > 4) = 6.3e-5: 16.6 of N are expected, 5 standard errors are 20; the farthest number possible is 6.76."""
    z = gaussian((N,), [0, 1, 2, 3], "weight", 1)
    beyond = int((z.abs() > 4).sum())
    assert abs(beyond - 4 * N * 6.334e-5) < 5 * math.sqrt(4 * N * 6.334e-5)
    assert float(z.abs().max()) < 6.77


def test_the_worst_words_still_give_numbers(monkeypatch):
    """No logarithm of 0, and nothing at the ends of the interval but inside it."""
    for word, largest in ((0, math.sqrt(66 * math.log(2))), (LOW, 2.0**-16)):
        monkeypatch.setattr(philox, "words", lambda keys, n, device, w=word: torch.full((len(keys), n), w))
        with cpu.plain():
            z, u = gaussian((6,), [0], "weight"), uniform((6,), [0], "weight")
        assert z.isfinite().all() and float(z.abs().max()) == pytest.approx(largest, rel=1e-3)
        assert (u.abs() < 1).all() and float(u.abs()[0, 0]) == 1 - 2**-24


def correlation(x, y):
    return abs(float((x.double() * y.double()).mean()))


@BOTH
def test_layers_seeds_things_and_neighbours_are_independent(draw):
    def one(seed, what, layer):
        return draw((N,), [seed], what, layer)[0]

    base = one(5, "weight", 1)
    for other in (
        one(5, "weight", 2),
        one(6, "weight", 1),
        one(5, "bias", 1),
        one(5, "weight", 11),
        one(51, "weight", 1),
    ):
        assert correlation(base, other) < FIVE
        assert correlation(base.square() - base.square().mean(), other.square()) < 2 * FIVE
    for shift in (1, 2, 3, 4, 100):  # neighbours of one block, of one pair, of one column
        assert correlation(base, base.roll(shift)) < FIVE
    assert correlation(base, base) > 0.3 and correlation(base, base + 0.2 * one(5, "weight", 2)) > 0.3
