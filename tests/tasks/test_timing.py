"""Laws of fair timing, on a clock of our own where times are asserted: no test depends on the speed of a machine."""

import gc
import math
from types import SimpleNamespace

import pytest
import torch

from initlab.errors import UsageError
from initlab.stats.dtypes import DTYPES, resolve_dtype
from initlab.tasks.course import rotated_timing, timing
from initlab.tasks.course.timing import COLUMNS, agreement, differences, time_ladder
from initlab.tasks.ensemble.memory import free_memory, peak_bytes

CPU = torch.device("cpu")
QUICK = {"rounds": 3, "seconds": 1e-3}


class Clock:
    """Stands still but for the versions, which say how long they take; `drift` is the factor at a time."""

    def __init__(self, drift=lambda now: 1.0):
        self.now, self.drift, self.calls = 0.0, drift, []

    def version(self, name, seconds):
        def call():
            self.now += seconds * self.drift(self.now)
            self.calls.append(name)
            return torch.ones(2)

        return call


@pytest.fixture
def clock(monkeypatch):
    made = Clock()
    monkeypatch.setattr(rotated_timing, "time", SimpleNamespace(perf_counter=lambda: made.now))
    monkeypatch.setattr(timing, "peak_bytes", lambda call, device: 0.0)
    return made


def row(frame, name):
    return frame.set_index("version").loc[name]


def test_times_are_seconds_a_call_and_ratios_times_over_the_references(clock):
    frame = time_ladder({"a": clock.version("a", 2e-5), "b": clock.version("b", 8e-5)}, shape="2")
    assert list(frame.columns) == list(COLUMNS)
    assert list(frame["version"]) == ["a", "b"] and set(frame["shape"]) == {"2"}
    for name, seconds, ratio in (("a", 2e-5, 0.25), ("b", 8e-5, 1.0)):
        found = row(frame, name)
        assert found["median"] == pytest.approx(seconds) and found["ratio"] == pytest.approx(ratio)
        assert found["q25"] == pytest.approx(seconds) and found["q75"] == pytest.approx(seconds)


def test_a_named_reference_has_ratio_one_and_no_error(clock):
    frame = time_ladder({"a": clock.version("a", 0.01), "b": clock.version("b", 0.03)}, reference="a")
    assert row(frame, "a")["ratio"] == 1 and row(frame, "a")["relative_error"] == 0
    assert row(frame, "b")["ratio"] == pytest.approx(3)


def test_a_machine_that_slows_down_changes_the_times_and_not_the_ratio(clock):
    clock.drift = lambda now: 1.0 if now < 0.25 else 3.0
    frame = time_ladder({"a": clock.version("a", 0.02), "b": clock.version("b", 0.01)}, seconds=1.0)
    assert row(frame, "a")["q75"] > 2 * row(frame, "a")["q25"]
    assert row(frame, "a")["ratio"] == pytest.approx(2)


def test_every_version_comes_at_every_place_of_the_round(clock):
    time_ladder({name: clock.version(name, 0.01) for name in "abc"}, rounds=3)
    assert "".join(clock.calls[-9:]) == "abcbcacab"


def test_a_sample_of_a_fast_version_lasts_long_enough(clock):
    time_ladder({"a": clock.version("a", 1e-4)}, rounds=1)
    assert len(clock.calls) >= 2 * rotated_timing.SAMPLE_SECONDS / 1e-4  # in finding the length, and in the sample


def test_a_slow_version_is_called_a_few_times_and_the_fast_one_in_every_round(clock):
    versions = {"slow": clock.version("slow", 5.0), "fast": clock.version("fast", 0.01)}
    frame = time_ladder(versions, rounds=15)
    assert clock.calls.count("slow") == 2 + rotated_timing.FEWEST_SAMPLES
    assert clock.calls.count("fast") == 2 + 15
    assert row(frame, "slow")["ratio"] == pytest.approx(500)


def test_a_slow_reference_serves_the_rounds_after_its_own(clock):
    frame = time_ladder({"fast": clock.version("fast", 0.01), "slow": clock.version("slow", 5.0)}, rounds=15)
    assert clock.calls.count("slow") == 2 + rotated_timing.FEWEST_SAMPLES
    assert row(frame, "fast")["ratio"] == pytest.approx(0.002)


def test_garbage_is_collected_again_afterwards():
    assert gc.isenabled()
    time_ladder({"a": lambda: torch.ones(2)}, **QUICK)
    assert gc.isenabled()


def test_equal_versions_are_said_to_be_equal_and_a_wrong_one_is_named():
    x = torch.linspace(1, 2, 100)
    right = {"plain": lambda: x.square(), "product": lambda: x * x}
    frame = time_ladder(right, **QUICK)
    assert agreement(frame).startswith("All 2 versions are equal up to rounding")
    assert list(frame["note"]) == ["", ""]
    frame = time_ladder({"zeros": lambda: x * 0, **right}, **QUICK)
    assert row(frame, "zeros")["relative_error"] == pytest.approx(1)
    assert "differs from product" in row(frame, "zeros")["note"]
    assert agreement(frame).startswith("NOT equal: zeros (")


def test_tolerances_are_the_dtypes():
    x = torch.linspace(1, 2, 100, dtype=torch.float64)
    versions = {"rounded": lambda: x.float().double() ** 2, "exact": lambda: x**2}
    frame = time_ladder(versions, **QUICK)
    assert "differs" in row(frame, "rounded")["note"]
    assert agreement(frame, "float64").startswith("NOT equal: rounded")
    assert agreement(frame, "float32").startswith("All 2")


@pytest.mark.parametrize("dtype", [resolve_dtype(name) for name in DTYPES])
@pytest.mark.parametrize("largest", [1.0, 1.5, 2.0, 3.0, 2.0**-10])
def test_one_unit_in_the_last_place_of_the_largest_entry_is_one_ulp(dtype, largest):
    expected = torch.tensor([largest, 0.0, -largest / 2], dtype=dtype)
    unit = torch.finfo(dtype).eps * 2.0 ** math.floor(math.log2(largest))
    out = expected.clone()
    out[0] += unit
    assert differences([out], [expected])[1] == 1
    assert differences([expected], [expected])[:2] == (0, 0)


def test_the_largest_of_nested_outputs_counts():
    x = torch.ones(3, 2)
    near, far = (lambda: (x.sum(), [(x, x[0])])), (lambda: (x.sum(), [(x, x[0] * 1.5)]))
    frame = time_ladder({"far": far, "same": near, "near": near}, **QUICK)
    assert row(frame, "far")["relative_error"] == pytest.approx(0.5)
    assert row(frame, "same")["relative_error"] == 0


def test_another_shape_is_infinitely_far_off():
    error, ulp, note = differences([torch.ones(2, 3)], [torch.ones(3, 2)])
    assert error == ulp == math.inf and "(2, 3)" in note and "(3, 2)" in note
    assert differences([torch.ones(2)], [torch.ones(2), torch.ones(2)])[0] == math.inf


def test_nan_is_data_and_said():
    x = torch.tensor([1.0, torch.nan])
    frame = time_ladder({"a": lambda: x + 0, "b": lambda: x + 0}, **QUICK)
    assert frame["relative_error"].isna().all() and frame["median"].notna().all()
    assert frame["note"].str.contains("not finite").all()
    assert agreement(frame).startswith("Not compared: a, b")


def test_zeros_and_nothing_at_all_agree():
    assert differences([torch.zeros(2, 2)], [torch.zeros(2, 2)]) == (0, 0, "")
    assert differences([torch.zeros(0, 2)], [torch.zeros(0, 2)]) == (0, 0, "")
    assert differences([torch.tensor([0.0, 1e-30])], [torch.zeros(2)])[0] == math.inf


def refuse():
    raise UsageError("needs a part that is not there")


def fault():
    raise RuntimeError("a bug")


def test_what_cannot_run_stays_in_the_table_with_its_reason():
    def never():
        raise AssertionError("was run")

    versions = {"skipped": never, "large": never, "absent": refuse, "works": lambda: torch.ones(2), "last": refuse}
    skip, needs = {"skipped": "takes too long"}, {"large": 7.84e9, "works": 8}
    frame = time_ladder(versions, skip=skip, needs=needs, memory_limit=1e9, **QUICK)
    assert list(frame["version"]) == list(versions)
    assert list(frame["median"].notna()) == [False, False, False, True, False]
    assert row(frame, "works")["ratio"] == 1  # the last that runs is the reference
    assert row(frame, "skipped")["note"] == "takes too long"
    assert row(frame, "large")["note"] == "skipped: needs 7.84 GB, allowed are 1 GB"
    assert row(frame, "absent")["note"] == row(frame, "last")["note"] == "unavailable: needs a part that is not there"


def test_running_out_of_memory_is_a_note():
    frame = time_ladder({"huge": lambda: torch.ones(2**58), "works": lambda: torch.ones(2)}, **QUICK)
    assert row(frame, "huge")["note"] == "ran out of memory" and row(frame, "works")["ratio"] == 1


def test_versions_that_write_into_one_tensor_are_told_apart():
    shared = torch.zeros(3)
    frame = time_ladder({"one": lambda: shared.fill_(1), "two": lambda: shared.fill_(2)}, **QUICK)
    assert row(frame, "one")["relative_error"] == pytest.approx(0.5)


def test_a_fault_of_ours_is_not_hidden():
    with pytest.raises(RuntimeError, match="a bug"):
        time_ladder({"a": fault}, **QUICK)


def test_without_its_reference_a_ladder_is_timed_and_not_compared():
    frame = time_ladder({"a": lambda: torch.ones(2), "gone": refuse}, reference="gone", **QUICK)
    assert row(frame, "a")["median"] > 0 and math.isnan(row(frame, "a")["ratio"])
    assert "not compared" in row(frame, "a")["note"] and "Not compared: a" in agreement(frame)
    assert agreement(time_ladder({"gone": refuse}, **QUICK)) == "No version ran."


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"reference": "plian"}, "did you mean plain"),
        ({"rounds": 0}, "rounds=0"),
        ({"seconds": math.nan}, "seconds=nan"),
        ({"device": "gpu"}, "device=gpu"),
    ],
    ids=["reference", "rounds", "seconds", "device"],
)
def test_mistakes_are_refused(options, says):
    with pytest.raises(UsageError, match=says):
        time_ladder({"plain": lambda: torch.ones(2)}, **options)


def test_an_empty_ladder_is_refused():
    with pytest.raises(UsageError, match="at least one version"):
        time_ladder({})


def test_memory_counts_what_is_held_at_once():
    x = torch.ones(1000)
    assert peak_bytes(lambda: x.neg(), CPU) == 4000
    assert peak_bytes(lambda: x.neg().abs(), CPU) == 8000  # a temporary and the result
    assert peak_bytes(lambda: [x.neg() for _ in range(5)], CPU) == 20_000
    assert peak_bytes(lambda: [x.neg().sum() for _ in range(5)], CPU) == 4000 + 5 * 4  # one after the other
    assert peak_bytes(lambda: x[:10], CPU) == 0  # a view


def test_half_of_the_free_memory_is_the_limit(monkeypatch):
    monkeypatch.setattr(timing, "free_memory", lambda device: 1000.0)
    versions = {"a": lambda: torch.ones(2), "b": lambda: torch.ones(2)}
    frame = time_ladder(versions, needs={"a": 501, "b": 500}, **QUICK)
    assert list(frame["median"].notna()) == [False, True]
    assert row(frame, "a")["note"] == "skipped: needs 501 bytes, allowed are 500 bytes"


def test_free_memory_is_a_number_of_bytes():
    assert free_memory(CPU) > 1e6


def test_the_profiler_leaves_standard_error_alone(capfd):
    time_ladder({"a": lambda: torch.ones(2)}, **QUICK)
    assert capfd.readouterr() == ("", "")
