import threading

import pytest
import torch

from initlab.stats.histogram import histogram
from initlab.stats.summarize import summarize
from initlab.stats.workspace import AT_ONCE, ones, workspace

F32, F64 = torch.float32, torch.float64


def test_two_blocks_that_do_not_overlap_and_are_kept() -> None:
    first, second = workspace(torch.Size((2, 3)), F32)
    first.fill_(1)
    second.fill_(2)
    assert (first.dtype, second.dtype) == (F32, F32) and (first == 1).all()
    assert workspace(torch.Size((2, 3)), F32)[0] is first
    for k in range(1, 100):  # of views only so many are kept
        workspace(torch.Size((k, 1)), F64)
    assert workspace(torch.Size((2, 3)), F32)[0].data_ptr() == first.data_ptr()
    assert workspace(torch.Size((AT_ONCE,)), F64)[1].shape == ones().shape


def test_each_thread_has_its_own() -> None:
    shape = torch.Size((2, 3))
    here, there = workspace(shape, F64)[0].data_ptr(), []
    thread = threading.Thread(target=lambda: there.append(workspace(shape, F64)[0].data_ptr()))
    thread.start()
    thread.join()
    assert there != [here]


@pytest.mark.parametrize("inside_first", [True, False])
def test_what_inference_mode_has_touched_serves_outside_it(inside_first: bool) -> None:
    x = torch.randn(11, 13 + inside_first)  # a shape of its own, so that its views are made here
    for inside in (inside_first, not inside_first):
        with torch.inference_mode(inside):
            assert float(summarize(x)[0]) == x.numel() and int(histogram(x).sum()) == x.numel()
