"""Watching changes no number and leaves nothing behind; what cannot be watched is refused in one line."""

import copy
import pickle
import random
from collections.abc import Callable, Iterator
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import initlab
from initlab.errors import UsageError
from initlab.probes import probe_buffer
from initlab.stats import backend as backend_module
from initlab.stats.kernels.cpu import plain
from tests.long import long_except

HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_backward_hooks",
    "_backward_pre_hooks",
)


def hooks(model: nn.Module, *optimizers: torch.optim.Optimizer) -> int:
    """How many are left, of any kind."""
    found = sum(len(getattr(module, kind)) for module in model.modules() for kind in HOOKS)
    found += sum(len(p._backward_hooks or {}) for p in model.parameters())
    for optimizer in optimizers:
        found += len(optimizer._optimizer_step_pre_hooks) + len(optimizer._optimizer_step_post_hooks)
    return found


class Residual(nn.Module):
    """A block called twice, with an in-place sum and functional activations."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.block, self.last = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        for _ in range(2):
            step = self.block(h)
            step += h
            h = torch.relu(step)
        return self.last(h)


class Branches(nn.Module):
    """A dict of tuples out, an LSTM and attention inside."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(6, 8, batch_first=True)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.gate, self.out = nn.Sequential(nn.Linear(8, 8), nn.Sigmoid()), Pair()

    def forward(self, x: Tensor) -> Tensor:
        h, _ = self.rnn(x.unsqueeze(1).expand(-1, 4, -1))
        h = h + self.attention(h, h, h)[0]
        return self.out(h * self.gate(h))["pair"][0]


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 3)

    def forward(self, h: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        return {"pair": (self.linear(h.mean(1)), h.argmax(-1))}


class Tied(nn.Module):
    """Weights used twice, a chunk that is a view, normalization and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.drop, self.last = nn.Linear(6, 16), nn.LayerNorm(8), nn.Dropout(0.3), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.up(x).chunk(2, -1)
        h = self.drop(self.norm(value * torch.sigmoid(gate)))
        return self.last(torch.cat([h, h], -1) @ self.up.weight)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "mlp": lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 3)),
    "in place": lambda: nn.Sequential(
        nn.Linear(6, 8), nn.Dropout(0.2, inplace=True), nn.ReLU(inplace=True), nn.Linear(8, 3), nn.ELU(inplace=True)
    ),
    "convolution": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 6)),
        nn.Conv1d(1, 4, 3),
        nn.BatchNorm1d(4),
        nn.SiLU(),
        nn.MaxPool1d(2),
        nn.Flatten(),
        nn.Linear(8, 3),
    ),
    "residual": Residual,
    "branches": Branches,
    "tied": Tied,
    "transformer": lambda: nn.Sequential(
        nn.Unflatten(1, (3, 2)),
        nn.Linear(2, 8),
        nn.TransformerEncoderLayer(8, 2, 16, batch_first=True),
        nn.Flatten(),
        nn.Linear(24, 3),
    ),
    "parametrized": lambda: nn.Sequential(
        nn.utils.parametrizations.weight_norm(nn.Linear(6, 8)), nn.Tanh(), nn.GroupNorm(2, 8), nn.Linear(8, 3)
    ),
    "frozen": lambda: nn.Sequential(nn.Linear(6, 8).requires_grad_(False), nn.Tanh(), nn.Linear(8, 3)),
    "one module": lambda: nn.Linear(6, 3),
}
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {"sgd": torch.optim.SGD, "adam": torch.optim.AdamW}


def batches(steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    for _ in range(steps):
        yield torch.randn(10, 6, generator=generator), torch.randint(0, 3, (10,), generator=generator)


def trained(
    build: Callable[[], nn.Module], kind: str, autocast: bool, watch: Callable[..., object] | None
) -> list[Tensor]:
    """Every output, gradient and parameter of three steps, and what the generator says in the end."""
    torch.manual_seed(0)
    model = build()
    optimizer = OPTIMIZERS[kind]([p for p in model.parameters() if p.requires_grad], lr=0.1)
    found: list[Tensor] = []

    def loop() -> None:
        for x, y in batches(3):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                out = model(x)
            cross_entropy(out.float(), y).backward()
            found.extend([out.detach().clone(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
            optimizer.step()
            found.extend(v.clone() for v in model.state_dict().values())

    if watch is None:
        loop()
    else:
        with watch(model, optimizer) as p:
            loop()
        assert hooks(model, optimizer) == 0
        assert len(p.frame()) > 0
    return [*found, torch.get_rng_state()]


WATCHES: dict[str, Callable[..., object]] = {
    "every step": lambda model, optimizer: initlab.probe(model, optimizer=optimizer),
    "every other": lambda model, optimizer: initlab.probe(model, optimizer=optimizer, every=2),
    "passes": lambda model, optimizer: initlab.probe(model),
}


@pytest.mark.filterwarnings("ignore:probe. never called:UserWarning")
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("autocast", long_except([False, True], True), ids=["", "autocast"])
def test_a_watched_training_is_the_unwatched_one_bit_for_bit(name: str, kind: str, autocast: bool) -> None:
    bare = trained(MODELS[name], kind, autocast, None)
    for watch in WATCHES.values():
        watched = trained(MODELS[name], kind, autocast, watch)
        assert len(bare) == len(watched)
        for a, b in zip(bare, watched, strict=True):
            assert a.dtype == b.dtype and torch.equal(a, b)


@pytest.mark.filterwarnings("ignore:probe. never called:UserWarning")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_a_call_leaves_no_trace(name: str, training: bool) -> None:
    """The model is where it was: its next pass is what it would have been, and its gradients stand."""
    torch.manual_seed(0)
    model = MODELS[name]().train(training)
    (x, y), (other, _) = batches(2)
    cross_entropy(model(x), y).backward()
    before = copy.deepcopy(model.state_dict())
    grads = [None if p.grad is None else (p.grad, p.grad.clone()) for p in model.parameters()]
    states = torch.get_rng_state(), random.getstate()
    modes = [module.training for module in model.modules()]
    rows = initlab.measure(model, other, y, cross_entropy)
    assert {"forward", "backward"} == set(rows["direction"])
    assert hooks(model) == 0
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    for p, grad in zip(model.parameters(), grads, strict=True):
        assert p.grad is grad if grad is None else p.grad is grad[0] and torch.equal(p.grad, grad[1])
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
    assert [module.training for module in model.modules()] == modes
    pickle.loads(pickle.dumps(model)) if name != "parametrized" else None  # which torch itself refuses to pickle


def test_a_call_between_a_forward_pass_and_its_backward() -> None:
    model = MODELS["convolution"]()
    (x, y), (other, _) = batches(2)
    grads = []
    for between in (False, True):
        value = cross_entropy(model(x), y)
        if between:
            initlab.measure(model, other, y, cross_entropy)
        grads.append(torch.autograd.grad(value, list(model.parameters())))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_an_optimizer_that_lives_in_the_backward_pass_is_not_woken() -> None:
    model = nn.Linear(6, 3)
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(lambda p: p.data.fill_(torch.nan))
    ((x, y),) = batches(1)
    rows = initlab.measure(model, x, y, cross_entropy)
    assert ("weight", "backward") in set(zip(rows["tensor"], rows["direction"], strict=True))
    assert model.weight.isfinite().all()


@pytest.mark.parametrize("where", ["loop", "forward", "backward", "hook", "block", "keyboard"])
@pytest.mark.parametrize("alone", [True, False], ids=["passes", "optimizer"])
def test_after_an_exception_every_hook_is_gone(where: str, alone: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what closed steps have measured is there."""
    torch.manual_seed(0)
    model = MODELS["in place"]()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    kind = KeyboardInterrupt if where == "keyboard" else ZeroDivisionError
    out = torch.zeros(1, requires_grad=True)
    with plain() if where in ("hook", "block") else nullcontext():
        p = initlab.probe(model, optimizer=None if alone else optimizer)

    def broken(*args: object) -> Tensor:
        raise kind(where)

    with pytest.raises(kind, match=where), p:
        for step, (x, y) in enumerate(batches(3)):
            if step == 2 and where == "forward":
                model[4].forward = broken  # type: ignore[method-assign]
            if step == 2 and where in ("hook", "block"):  # at once, or when what was gathered is measured
                monkeypatch.setattr(backend_module, "summarize", broken)
                monkeypatch.setattr(probe_buffer, "BLOCK_ENTRIES", 1 if where == "hook" else 2**18)
            out = model(x)
            if step == 2 and where == "backward":
                out.register_hook(broken)
            value = cross_entropy(out, y)
            if step == 2 and where in ("loop", "keyboard"):
                broken()
            value.backward()
            optimizer.step()
            optimizer.zero_grad()
    monkeypatch.undo()
    assert hooks(model, optimizer) == 0
    measured = (
        {0} if alone and where in ("hook", "block") else {0, 1}
    )  # without an optimizer step 1 ends inside of step 2's pass
    assert measured <= set(p.frame()["step"])
    rows = len(p.frame())
    if where not in ("backward", "forward", "hook", "block"):
        cross_entropy(out, y).backward()  # the graph of the step that failed has forgotten the probe too
    assert len(p.frame()) == rows


def test_copies_made_while_it_is_watched_are_free() -> None:
    """deepcopy, as a moving average of the weights makes it, and pickle, as a checkpoint."""
    model = MODELS["mlp"]()
    ((x, _),) = batches(1)
    with initlab.probe(model) as p:
        model(x)
        twin = copy.deepcopy(model)
        back = pickle.loads(pickle.dumps(model))
        model(x)
        for other in (twin, back):
            assert torch.equal(other(x), model(x))
    rows = p.frame()
    assert sorted(set(rows["step"])) == [0, 1, 2, 3]
    assert rows.loc[rows["step"] == 1, "count"].sum() == rows.loc[rows["step"] == 3, "count"].sum()
    pickle.loads(pickle.dumps(twin))


def test_two_probes_do_not_disturb_each_other() -> None:
    model = MODELS["mlp"]()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with initlab.probe(model, optimizer=optimizer, layers="0") as a, initlab.probe(model, layers="2") as b:
        for x, y in batches(2):
            cross_entropy(model(x), y).backward()
            optimizer.step()
    assert (set(a.frame()["name"]), set(b.frame()["name"])) == ({"0"}, {"2"})
    assert hooks(model, optimizer) == 0


def test_a_graph_that_outlives_its_step_gives_no_rows_later() -> None:
    model = MODELS["mlp"]()
    ((x, y),) = batches(1)
    with initlab.probe(model) as p:
        first = cross_entropy(model(x), y)
        model(x)
        first.backward()
        model(x)
    rows = p.frame()
    assert set(rows.loc[rows["tensor"].isin(["preactivation", "activation"]), "direction"]) == {"forward"}


@pytest.mark.parametrize("how", ["module", "in place", "function"])
@pytest.mark.parametrize("mode", ["call", "optimizer", "passes"])
def test_compiled_models_run_uncompiled_where_they_are_recorded(how: str, mode: str) -> None:
    """The rows are those of the model that was compiled, and in between the compiled code runs as before."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    plain = Residual()  # torch compiles an nn.Sequential in place without ever calling the backend
    model = copy.deepcopy(plain)
    ran: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: object) -> Callable[..., object]:
        def run(*args: Tensor) -> object:
            ran.append(1)
            return graph(*args)

        return run

    if how == "in place":
        model.compile(backend=backend)
    watched = torch.compile(model, backend=backend) if how == "module" else model
    forward = torch.compile(model, backend=backend) if how == "function" else watched
    if how == "function" and mode != "optimizer":
        pytest.skip("a call of the model itself is no call of the function that was compiled")
    frames = []
    for net, call in ((plain, plain), (watched, forward)):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        ((x, y),) = batches(1)
        call(x)
        ran.clear()
        if mode == "call":
            frames.append(initlab.measure(net, x, y, cross_entropy))
        else:
            with initlab.probe(net, optimizer=optimizer if mode == "optimizer" else None, every=2) as p:
                for step, (x, y) in enumerate(batches(4)):
                    before = len(ran)
                    cross_entropy(call(x), y).backward()
                    if call is forward and not (how == "in place" and mode == "passes"):
                        assert (len(ran) > before) == (step % 2 == 1)
                    optimizer.step()
            frames.append(p.frame())
        assert hooks(net, optimizer) == 0
    assert frames[0].equals(frames[1])
    ran.clear()
    forward(x)
    assert ran


def refused(call: Callable[[], object]) -> str:
    with pytest.raises(UsageError) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text
    return text


BATCH = torch.zeros(4, 6)
CLASSES = torch.zeros(4, dtype=torch.int64)
REFUSED: dict[str, tuple[Callable[[nn.Module], object], str]] = {
    "no module": (lambda m: initlab.measure([1], BATCH), "model=list: must be an nn.Module"),
    "no module in a loop": (lambda m: initlab.probe([1]), "model=list: must be an nn.Module, or offer watch"),
    "a class": (lambda m: initlab.measure(nn.Linear, BATCH), "model=type: must be an nn.Module"),
    "no loss": (lambda m: initlab.measure(m, BATCH, CLASSES), "y without a loss: give one too"),
    "no x": (lambda m: initlab.measure(m, None, CLASSES, cross_entropy), "measure: x is missing; give the batch"),
    "loss by name": (lambda m: initlab.measure(m, BATCH, CLASSES, "mse"), "loss='mse': must be a function"),
    "loss of many": (lambda m: initlab.measure(m, BATCH, loss=lambda out: out), r"loss: gives a tensor \(4, 3\)"),
    "loss of none": (lambda m: initlab.measure(m, BATCH, loss=lambda out: 1), "loss: gives int"),
    "wrong y": (
        lambda m: initlab.measure(m, BATCH, CLASSES[:2], cross_entropy),
        "loss: does not fit the model's output and y: ValueError: Expected",
    ),
    "wrong x": (
        lambda m: initlab.measure(m, BATCH[:, :5]),
        r"x=float32 \(4, 5\): does not fit 0 \(Linear\): RuntimeError: mat1 and mat2",
    ),
    "wrong dtype": (lambda m: initlab.measure(m, BATCH.long()), r"x=int64 \(4, 6\): does not fit 0 \(Linear\)"),
    "too many x": (lambda m: initlab.measure(m, (BATCH, BATCH)), "does not fit the model"),
    "elsewhere": (lambda m: initlab.measure(m.to("meta"), BATCH), "x: is on cpu, the model on meta: move one"),
    "no layer": (
        lambda m: initlab.measure(m, BATCH, layers=["0", "encodr.*"]),
        r"layers=encodr.\*: matches none of 0, 1, encoder",
    ),
    "no glob": (lambda m: initlab.measure(m, BATCH, layers=[]), "layers: empty; give at least one glob"),
    "near layer": (lambda m: initlab.measure(m, BATCH, layers="encodr"), r"did you mean encoder\?"),
    "every": (lambda m: initlab.probe(m, every=0), "every=0: must be at least 1"),
    "flush": (lambda m: initlab.probe(m, flush_steps=0), "flush_steps=0: must be at least 1"),
    "seeds": (lambda m: initlab.measure(m, BATCH, seeds=[1, 2]), "seeds: 2 given; an nn.Module is one network"),
    "a pass as a loop": (lambda m: initlab.probe(m, BATCH), r"for one pass on x use initlab.measure\(model, x"),  # type: ignore[arg-type]
    "no optimizer": (lambda m: initlab.probe(m, optimizer=0.1), "optimizer=0.1: must be a torch.optim.Optimizer"),
    "foreign": (
        lambda m: initlab.probe(m, optimizer=torch.optim.SGD(nn.Linear(2, 2).parameters())),
        "optimizer=SGD: holds none of the model's parameters",
    ),
}


@pytest.mark.parametrize("mistake", REFUSED)
def test_mistakes_are_one_line_and_leave_no_hook(mistake: str) -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU())
    model.add_module("encoder", nn.Linear(8, 3))
    call, said = REFUSED[mistake]
    with pytest.raises(UsageError, match=said):
        call(model)
    assert "\n" not in refused(lambda: call(model))
    assert hooks(model) == 0


@pytest.mark.parametrize("alone", [True, False], ids=["passes", "optimizer"])
@pytest.mark.parametrize("transform", [torch.func.vmap, torch.func.jacrev])
def test_inside_a_transform_there_is_nothing_to_measure(transform: Callable[..., object], alone: bool) -> None:
    model = MODELS["mlp"]()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def inside() -> None:
        with initlab.probe(model, optimizer=None if alone else optimizer):
            transform(model)(BATCH)

    if alone:
        assert refused(inside).startswith("probe: inside torch.func (vmap, grad, ...)")
    else:  # a Jacobian in the middle of a training ends nothing
        with pytest.warns(UserWarning, match="the model was called 1 times, always .* inside of a transform"):
            inside()
    assert hooks(model, optimizer) == 0


def test_a_mistake_of_the_loop_is_the_loops() -> None:
    """Inside `with` nothing is reworded: the exception is the one that the user's own code raises."""
    model = MODELS["mlp"]()
    with pytest.raises(RuntimeError, match="mat1 and mat2") as caught, initlab.probe(model):
        model(BATCH[:, :5])
    assert not isinstance(caught.value, UsageError) and hooks(model) == 0


def test_a_probe_opens_once_at_a_time() -> None:
    model = MODELS["mlp"]()
    with initlab.probe(model) as p:
        assert "is open already" in refused(p.__enter__)
        model(BATCH)
    assert hooks(model) == 0 and len(p.frame())


@pytest.mark.parametrize("alone", [True, False], ids=["passes", "optimizer"])
def test_a_probe_that_is_opened_again_goes_on_counting(alone: bool) -> None:
    model = MODELS["mlp"]()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    p = initlab.probe(model, optimizer=None if alone else optimizer, every=2)
    for _ in range(2):
        with p:
            for x, y in batches(3):
                cross_entropy(model(x), y).backward()
                optimizer.step()
    rows = p.frame()
    assert rows.groupby("step").size().nunique() == 1 and list(rows["step"].unique()) == [0, 2, 4]
    assert hooks(model, optimizer) == 0


def test_modules_that_never_run_are_named() -> None:
    model = nn.ModuleDict({"used": nn.Linear(6, 2), "idle": nn.Linear(6, 2)})
    model.forward = lambda x: model["used"](x)  # type: ignore[method-assign]
    with pytest.warns(UserWarning, match="never called in a recorded step: idle"):
        rows = initlab.measure(model, BATCH)
    assert set(rows.loc[rows["name"] == "idle", "tensor"]) == {"weight", "bias"}
    assert dict(zip(rows["name"], rows["layer"], strict=True)) == {"": 0, "used": 1, "idle": 2}
    assert len(initlab.measure(model, BATCH, layers="used"))
    with pytest.warns(UserWarning, match="the model was never called"), initlab.probe(model):
        pass
