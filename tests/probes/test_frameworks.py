"""Loops that others run: Lightning and accelerate. Every row against hooks by hand."""

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, Adam, Optimizer
from torch.utils.data import DataLoader, TensorDataset

import initlab
from tests.probes.by_hand import WORDS, Trace, count_hooks, faults, once, watch

pytestmark = pytest.mark.filterwarnings("ignore")  # of these packages, about each other

X = torch.randn(24, 6, generator=torch.Generator().manual_seed(1))
Y = torch.arange(24) % 3


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


def batches(size: int = 8) -> DataLoader[tuple[Tensor, ...]]:
    return DataLoader(TensorDataset(X, Y), batch_size=size)


# --- Lightning ------------------------------------------------------------------------------------------------------


def lightning_net(manual: bool) -> Any:
    """A LightningModule: its `training_step` calls parts and never the module itself."""
    lightning = pytest.importorskip("lightning")

    class Net(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = mlp()[:2], mlp()[2]
            self.automatic_optimization = not manual

        def loss(self, batch: list[Tensor]) -> Tensor:
            return F.cross_entropy(self.head(self.body(batch[0])), batch[1])

        def training_step(self, batch: list[Tensor], index: int) -> Tensor | None:
            loss = self.loss(batch)
            if not manual:
                return loss
            optimizers = self.optimizers()
            for optimizer in optimizers:
                optimizer.zero_grad()
            self.manual_backward(loss)
            for optimizer in optimizers:
                optimizer.step()
            return None

        def validation_step(self, batch: list[Tensor], index: int) -> None:
            self.loss(batch)

        def configure_optimizers(self) -> Any:
            if manual:
                return [SGD(self.body.parameters(), 0.1), SGD(self.head.parameters(), 0.2)]
            return SGD(self.parameters(), 0.1)

    return Net()


def fit(net: Any, folder: Path, **words: object) -> None:
    lightning = pytest.importorskip("lightning")
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = lightning.Trainer(max_epochs=1, accelerator="cpu", default_root_dir=folder, **quiet, **words)
    trainer.fit(net, batches(), batches(12) if words.get("val_check_interval") else None)


def by_hand(
    manual: bool, accumulate: int = 1, clip: float | None = None, keep: dict[str, Tensor] | None = None
) -> Trace:
    """The loop written out, with hooks of torch."""
    net, trace = lightning_net(manual), Trace()
    made = net.configure_optimizers()
    optimizers: list[Optimizer] = made if isinstance(made, list) else [made]
    trace.follow(net, optimizers)
    for k, batch in enumerate(batches()):
        loss = net.loss(batch) / accumulate
        loss.backward()
        if (k + 1) % accumulate == 0:
            if clip:
                nn.utils.clip_grad_norm_(net.parameters(), clip)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            trace.end_step()
    if keep is not None:
        keep.update(net.state_dict())
    return trace


SETTINGS = [
    ({}, {}),
    ({"accumulate_grad_batches": 3}, {"accumulate": 3}),
    ({"gradient_clip_val": 0.01}, {"clip": 0.01}),
    ({"val_check_interval": 1.0}, {}),
]


@pytest.mark.parametrize(("words", "hand"), SETTINGS, ids=[" ".join(w) or "plain" for w, _ in SETTINGS])
def test_a_lightning_training_watched_from_outside(words: dict[str, Any], hand: dict[str, Any], tmp_path: Path) -> None:
    """The optimizer is made inside of `fit`: the probe is given one of the user's that never steps."""
    net = lightning_net(manual=False)
    before, kept = count_hooks(net), dict[str, Tensor]()
    with initlab.probe(net, optimizer=SGD(net.parameters(), 0.1)) as p:
        fit(net, tmp_path, **words)
    trace = by_hand(False, **hand, keep=kept)
    found = faults(p.frame(), trace, "")
    assert not found, "\n".join(found[:20])
    assert all(torch.equal(kept[name], value) for name, value in net.state_dict().items())
    assert count_hooks(net) == before


def test_a_lightning_training_watched_by_a_callback(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning")
    frames: list[pd.DataFrame] = []

    class Watch(lightning.Callback):
        def on_train_start(self, trainer: Any, module: Any) -> None:
            self.probe = initlab.probe(module, optimizer=module.optimizers())
            self.probe.__enter__()

        def on_train_end(self, trainer: Any, module: Any) -> None:
            self.probe.__exit__(None, None, None)
            frames.append(self.probe.frame())

    net = lightning_net(manual=False)
    fit(net, tmp_path, callbacks=[Watch()])
    found = faults(frames[0], by_hand(False), "")
    assert not found, "\n".join(found[:20])
    assert count_hooks(net) == 0


def test_lightning_with_two_optimizers_by_hand(tmp_path: Path) -> None:
    net = lightning_net(manual=True)
    with initlab.probe(net, optimizer=SGD(net.parameters(), 0.1)) as p:
        fit(net, tmp_path)
    rows = p.frame()
    found = faults(rows, by_hand(True), "")
    assert not found, "\n".join(found[:20])
    ratio = rows[rows["tensor"] == "update"]
    assert (ratio["update_ratio"] > 0).all() and not rows.duplicated(WORDS).any()


# --- accelerate -----------------------------------------------------------------------------------------------------


def accelerator(**words: object) -> Any:
    accelerate = pytest.importorskip("accelerate")
    state = pytest.importorskip("accelerate.state")
    state.AcceleratorState._reset_state(True)
    return accelerate.Accelerator(cpu=True, **words)


@pytest.mark.parametrize("given", ["wrapped", "its own"])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_accelerate(given: str, accumulate: int) -> None:
    """The prepared optimizer, or the one inside of it; steps that only accumulate are none."""
    frames, kept = [], []
    for watched in (False, True):
        prepared = accelerator(gradient_accumulation_steps=accumulate)
        plain = mlp()
        own = SGD(plain.parameters(), 0.1)
        model, optimizer, loader = prepared.prepare(plain, own, batches())
        probe = initlab.probe(model, optimizer=optimizer if given == "wrapped" else own)
        if watched:
            probe.__enter__()
        for x, y in loader:
            with prepared.accumulate(model):
                prepared.backward(F.cross_entropy(model(x), y))
                optimizer.step()
                optimizer.zero_grad()
        if watched:
            probe.__exit__(None, None, None)
            frames.append(probe.frame())
            assert count_hooks(model) == 0
        kept.append([p.detach().clone() for p in model.parameters()])
    assert all(map(torch.equal, *kept))
    net, trace = mlp(), Trace()
    optimizer = SGD(net.parameters(), 0.1)
    trace.follow(net, [optimizer])
    for k, (x, y) in enumerate(batches()):
        (F.cross_entropy(net(x), y) / accumulate).backward()
        if (k + 1) % accumulate == 0:
            optimizer.step()
            optimizer.zero_grad()
            trace.end_step()
    found = faults(frames[0], trace, "")
    assert not found, "\n".join(found[:20])


def test_accelerate_in_bfloat16() -> None:
    """Its wrapper of `forward` casts to bfloat16 inside and back outside; rows are those of what the layers gave."""

    def step(model: nn.Module, optimizers: list[Optimizer]) -> Tensor:
        return once(model, optimizers, lambda net: F.cross_entropy(net(X), Y))

    prepared = accelerator(mixed_precision="bf16")
    model, _ = prepared.prepare(mlp(), Adam(mlp().parameters()))
    del model.forward  # copies of it would call the first model's

    class Cast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = model

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                out: Tensor = self.net(x)
            return out.float()

    watch(Cast(), step).check()


def test_accelerate_in_bfloat16_as_prepared() -> None:
    prepared = accelerator(mixed_precision="bf16")
    plain = mlp()
    trace = Trace()
    model, optimizer = prepared.prepare(plain, SGD(plain.parameters(), 0.1))
    with initlab.probe(model, optimizer=optimizer) as p:
        for x, y in batches():
            optimizer.zero_grad()
            prepared.backward(F.cross_entropy(model(x), y))
            optimizer.step()
    assert count_hooks(model) == 0
    net = mlp()
    own = SGD(net.parameters(), 0.1)
    trace.follow(net, [own])
    for x, y in batches():
        own.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            out = net(x)
        F.cross_entropy(out.float(), y).backward()
        own.step()
        trace.end_step()
    rows = p.frame()
    found = [text for text in faults(rows, trace, "") if "name=''" not in text]  # the root's output is float32 again
    assert not found, "\n".join(found[:20])


# --- the trainer of Hugging Face ------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_trainer_of_hugging_face(accumulate: int, tmp_path: Path) -> None:
    """Clipped gradients, batches that add up, a wrapped optimizer: all inside of `train`."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    words = torch.randint(31, (8, 7), generator=torch.Generator().manual_seed(1))
    data = [{"input_ids": line, "labels": line} for line in words]
    dropouts = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    small = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16, "vocab_size": 31, **dropouts}
    quiet = {"report_to": [], "use_cpu": True, "save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True}
    trained: list[nn.Module] = []
    trace = Trace(axis=lambda name, x: x.ndim - 1)
    rows = pd.DataFrame()
    for watched in (False, True):
        torch.manual_seed(0)
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**small))
        optimizer = SGD(model.parameters(), 0.1)
        settings = transformers.TrainingArguments(
            str(tmp_path), per_device_train_batch_size=2, num_train_epochs=1, max_grad_norm=0.5,
            gradient_accumulation_steps=accumulate, **quiet,
        )  # fmt: skip
        schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
        trainer = transformers.Trainer(model, settings, train_dataset=data, optimizers=(optimizer, schedule))
        if watched:
            with initlab.probe(model, optimizer=optimizer) as p:
                trainer.train()
            rows = p.frame()
        else:
            trace.follow(model, [optimizer])
            optimizer.register_step_post_hook(lambda *_: trace.end_step())
            trainer.train()
        trained.append(model)
    assert set(rows["step"]) == set(range(4 // accumulate)) and count_hooks(trained[1]) == 0
    assert all(map(torch.equal, *[list(model.parameters()) for model in trained]))
    found = faults(rows, trace, "")
    assert not found, "\n".join(found[:20])
