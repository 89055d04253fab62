import torch
from dispatch import WAITS, count_ops
from torch import nn


def test_operations_are_counted_by_name_and_views_only_on_demand():
    x = torch.ones(3, 4)
    assert count_ops(lambda: None) == {}
    assert count_ops(lambda: (x + 1).mul_(2).t()) == {"add": 1, "mul_": 1}
    assert count_ops(lambda: (x + 1).mul_(2).t(), views=True) == {"add": 1, "mul_": 1, "t": 1}
    assert count_ops(lambda: torch._foreach_add_([x, x.clone()], 1)) == {"clone": 1, "_foreach_add_": 1}


def test_reading_a_number_is_seen():
    x = torch.ones(3)
    for read in (lambda: x.sum().item(), lambda: float(x.sum()), lambda: bool((x > 0).all())):
        assert count_ops(read)["_local_scalar_dense"] == 1
        assert any(count_ops(read)[name] for name in WAITS)
    assert not any(count_ops(lambda: x.sum().sqrt())[name] for name in WAITS)


def test_autograd_and_sgd_dispatch_six_operations_a_layer():
    """Linear, ReLU, mask, two gradients, the bias's sum: 6, and a few for the whole step."""

    def step_of(depth: int):
        layers = [part for _ in range(depth) for part in (nn.Linear(10, 10), nn.ReLU())]
        model = nn.Sequential(*layers, nn.Linear(10, 5))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, foreach=True)
        x, y = torch.ones(7, 10), torch.zeros(7, dtype=torch.int64)

        def step() -> None:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()

        step()
        return step

    few, many = (count_ops(step_of(depth)) for depth in (10, 50))
    assert many["_local_scalar_dense"] == 0
    assert 6 <= (many.total() - few.total()) / 40 <= 6.2
