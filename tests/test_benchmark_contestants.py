"""What is raced against each other computes the same: the same losses, steps and statistics. Nothing is timed."""

import math
import re
from functools import partial
from types import SimpleNamespace

import pytest
import torch

import initlab
from benchmarks import (
    backward,
    bare,
    collect,
    ensemble,
    gpu,
    memory,
    nets,
    peers,
    phase,
    startup,
    step,
    subjects,
    train,
)
from benchmarks import stack as stack_group
from benchmarks.folders import run_folders
from benchmarks.nets import Net
from benchmarks.race import Asked, Contestant, NotAvailable, Outcome, Setting
from benchmarks.rows import IDS, VARIANTS
from initlab.engine.recorders import MOST_STEPS
from initlab.nn.init import rule
from initlab.probes.probe import Probe
from initlab.stats import measure as choice
from initlab.stats.kernels import cpu
from initlab.stats.statistics import STATISTICS
from initlab.stats.statistics import TRUE_COLUMNS as NUMBERS

SMALL = Net(12, 3, 8, 4, 16)


def available(record):
    """The recording's name, where this machine can run it."""
    if subjects.RECORDINGS[record]["accelerated"] and subjects.library() is None:
        pytest.skip("no compiler")
    return record


SEEDS = range(3)
ROUNDING = 1e-5  # float32 sums of at most some hundred terms, in another order


def close(a, b, tolerance=ROUNDING):
    a, b = (torch.as_tensor(t, dtype=torch.float64) for t in (a, b))
    return a.shape == b.shape and bool(torch.linalg.vector_norm(a - b) <= tolerance * torch.linalg.vector_norm(b))


@pytest.fixture
def fast(monkeypatch):
    """A learning rate under which one step can be seen, everywhere that it is used."""
    for module in (nets, bare, peers, subjects):
        monkeypatch.setattr(module, "LR", 0.1, raising=False)


def layers_in_float64(net=SMALL):
    """Outputs of every layer, linear and ReLU in turn, and their gradients, by autograd in float64."""
    model = bare.module(net).double()
    xb, yb = nets.batch(net)
    outs = [xb[0].double()]
    for layer in model:
        outs.append(layer(outs[-1]))
        outs[-1].retain_grad()
    torch.nn.functional.cross_entropy(outs[-1], yb[0]).backward()
    return model, [out.detach() for out in outs[1:]], [out.grad for out in outs[1:]]


# --- one step ---------------------------------------------------------------------------------------------------------


def test_by_hand_and_module_give_the_same_losses_step_after_step(fast):
    module, hand = bare.module_step(SMALL).call, subjects.bare_step(SMALL).call
    theirs, ours = ([float(call()) for _ in range(5)] for call in (module, hand))
    assert close(ours, theirs) and theirs[4] < theirs[0]


@pytest.mark.parametrize("record", subjects.RECORDINGS)
def test_recording_changes_no_step(fast, record):
    bare_step, watched = subjects.bare_step(SMALL).call, subjects.recorded_step(SMALL, available(record)).call
    steps = range(subjects.TABLE_STEPS + 10)  # more than are kept
    assert close([float(watched()) for _ in steps], [float(bare_step()) for _ in steps])


def test_bare_trainings_are_those_of_the_task(fast):
    """The losses of both, on the same batches from the same weights; recorded and compared by the typed one."""
    sizes = {"depth": 2, "width": 6, "batch": 16, "steps": 4}
    losses = torch.stack(bare.two_trainings(**sizes, seeds=(0, 3)).call()).view(2, 4, 2)
    assert torch.equal(*losses)
    wanted = initlab.train("digits", **sizes, lr=0.1, seeds=[0, 3])["losses"].query("implementation == 'module'")
    assert close(losses[0].flatten(), wanted["loss"].to_list())
    typed = train.typed_training(sizes, accelerated=False, seeds=2)
    per_step = 2 * (2 * 3 + 2 * 2 + 4 * 3 + 3) + 6 + (3 + 2 + 6) + 2  # rows of both, parity, losses
    assert typed.work == 8 and typed.call() == 8 * per_step


def test_ten_steps_are_ten_steps_and_one_of_them_is_recorded(fast):
    one, ten = subjects.bare_step(SMALL), subjects.recorded_step(SMALL, "plain", every=10)
    for _ in range(9):
        one.call()
    assert close(float(one.call()), float(ten.call())) and (one.work, ten.work) == (1, 10)


def test_the_same_seed_is_the_same_network_for_every_contestant():
    w, b = nets.parameters(SMALL, SEEDS)[1]
    for member, seed in enumerate(SEEDS):
        linear = bare.module(SMALL, seed)[2]
        assert torch.equal(linear.weight.mT, w[member]) and torch.equal(linear.bias, b[member])
    assert not torch.equal(w[0], w[1])


def test_racing_does_not_change_the_network():
    """Thousands of steps are taken: with the benchmarks' own learning rate the loss stays where it was."""
    call = bare.module_step(SMALL).call
    first = float(call())
    for _ in range(200):
        last = float(call())
    assert last == pytest.approx(first, rel=1e-3)


@pytest.mark.parametrize("name", peers.STEP)
def test_a_peer_trains_as_the_bare_module_does(fast, name):
    """What it sees at the third step is what the bare module's weights say after two."""
    peer = peers.STEP[name](SMALL)
    seen = [peer.call() for _ in range(3)]
    model = bare.module(SMALL)
    xb, yb = nets.batch(SMALL)
    run = bare.step_of(model, torch.optim.SGD(model.parameters(), lr=0.1), xb[0], yb[0])
    for _ in range(2):
        run()
    look = seen[2][0][0] if name in ("makemore", "retain_grad") else seen[2][0]  # these look at a gradient beside it
    std = look[0] if name in ("std_mean", "retain_grad") else look[1]
    assert float(std) == pytest.approx(float(model[0](xb[0]).std().detach()), rel=ROUNDING)
    peer.close()


def test_peers_see_the_right_numbers():
    _, outs, grads = layers_in_float64()
    stds, means = [float(t.std()) for t in outs], [float(t.mean()) for t in outs]
    chapter, std_mean, course = (peers.STEP[name](SMALL).call() for name in ("chapter", "std_mean", "course"))
    assert close([m for m, _ in chapter], means) and close([s for _, s in chapter], stds)
    assert close([float(m) for _, m in std_mean], means) and close([float(s) for s, _ in std_mean], stds)
    assert close([float(m) for m, *_ in course], means) and close([float(s) for _, s, _ in course], stds)
    for out, (_, _, bins) in zip(outs, course, strict=True):
        assert int(bins.sum()) == int((out.abs() <= 10).sum())
    kept = peers.STEP["retain_grad"](SMALL).call()
    assert close([float(s) for (s, _), _ in kept], stds)
    assert close([float(s) for _, (s, _) in kept], [float(g.std()) for g in grads])


def test_makemore_sees_saturation_gradients_and_updates(fast):
    model, outs, grads = layers_in_float64()
    seen = peers.STEP["makemore"](SMALL).call()
    looks, ratios = seen[: len(outs)], seen[len(outs) :]
    assert close([look[1] for look, _ in looks], [float(t.std()) for t in outs])
    assert close([look[2] for look, _ in looks], [100 * float((t.abs() > 0.97).double().mean()) for t in outs])
    assert close([look[1] for _, look in looks], [float(g.std()) for g in grads])
    weights = [p for p in model.parameters() if p.ndim == 2]
    assert len(ratios) == len(weights) == SMALL.depth + 1
    # The ratio is taken after the update, as makemore does: the weights are one step on.
    expected = [((0.1 * p.grad).std() / (p - 0.1 * p.grad).std()).log10().item() for p in weights]
    assert close(ratios, expected, 1e-4)


def test_the_courses_hooks_are_gone_when_its_race_is_over(monkeypatch):
    made = []
    own = bare.module
    monkeypatch.setattr(bare, "module", lambda *words: made.append(own(*words)) or made[-1])
    peer = peers.course(SMALL)
    assert all(layer._forward_hooks for layer in made[0])
    peer.close()
    assert not any(layer._forward_hooks for layer in made[0])


@pytest.mark.parametrize("record", subjects.RECORDINGS)
def test_recorded_rows_are_complete(record):
    """Every layer, both directions: values and gradients of z, a, w and b, and the update of every weight matrix."""
    contestant = subjects.tabled_step(SMALL, available(record))
    contestant.call()
    frame, *histograms = contestant.call()  # the tables of these steps, not of those before
    assert sorted(set(frame["step"])) == list(range(subjects.TABLE_STEPS, 2 * subjects.TABLE_STEPS))
    counts = frame[frame["step"] == 60].groupby(["tensor", "direction"], observed=True).size().to_dict()
    both = {(t, d): n for t, n in (("preactivation", 4), ("activation", 3), ("weight", 4), ("bias", 4)) for d in
            ("forward", "backward")}  # fmt: skip
    assert counts == both | {("update", "forward"): 4}
    assert set(STATISTICS) <= set(frame.columns)
    update = frame[(frame["tensor"] == "update") & (frame["layer"] == 2)]["rms"].iloc[0]
    grad = frame[(frame["tensor"] == "weight") & (frame["layer"] == 2) & (frame["direction"] == "backward")]
    assert update == pytest.approx(nets.LR * grad["rms"].iloc[0], rel=0.05)  # w' - w is rounded to eps |w|
    assert [len(table) for table in histograms] == [len(frame)] * subjects.RECORDINGS[record]["histograms"]


def test_rows_are_let_go_before_they_are_many():
    hand = subjects.Hand(SMALL)
    held = []
    for _ in range(3 * subjects.TABLE_STEPS):
        hand.recorded()
        held.append(len(hand.recording.buffer))
    a_step = 8 + 6 + 16 + 4  # of z, a, parameters, updates
    assert 0 < max(held) <= a_step * (subjects.TABLE_STEPS + MOST_STEPS)


# --- ensembles, backward, stacks --------------------------------------------------------------------------------------


def test_four_ways_to_train_an_ensemble_give_the_same_losses(fast):
    loop = bare.loop_over_modules(SMALL, SEEDS).call
    vmap, hand = peers.vmap_step(SMALL, SEEDS).call, subjects.bare_step(SMALL, SEEDS).call
    watched = subjects.recorded_step(SMALL, "plain", SEEDS).call
    for _ in range(3):
        expected = [float(loss) for loss in loop()]
        assert close(vmap(), expected) and close(hand(), expected) and close(watched(), expected)
    assert len(set(expected)) == len(SEEDS)


def test_one_backward_pass_by_hand_and_by_module():
    small = nets.LARGE._replace(batch=40, inputs=12, width=8)
    _, by_hand = subjects.backward_pass(small).call()
    theirs = bare.module_backward(small).call()
    for (w, b), weight, bias in zip(by_hand, theirs[0::2], theirs[1::2], strict=True):
        assert close(w, weight.mT) and close(b, bias)


@pytest.mark.parametrize("accelerated", [True, False], ids=["accelerated", "plain"])
def test_a_stack_is_the_same_watched_and_unwatched(accelerated):
    weights, x = nets.stack_weights(16, depth=6), nets.stack_input(16, batch=20)
    last = bare.stack_pass(weights, x).call()
    looks = {name: build(weights, x).call() for name, build in peers.STACK.items()}
    available("accelerated" if accelerated else "plain")
    rows = subjects.watched_stack(weights, x, accelerated).call()
    own = dict(zip([*STATISTICS, *NUMBERS], rows[:, -1, 0].tolist(), strict=True))
    population = math.sqrt((last.numel() - 1) / last.numel())
    assert own["std"] == pytest.approx(float(last.std()) * population, rel=ROUNDING)
    assert looks["chapter"][-1] == pytest.approx((float(last.mean()), float(last.std())), rel=ROUNDING)
    assert float(looks["std_mean"][-1][0]) == looks["chapter"][-1][1] == looks["makemore"][-1][1]
    assert {len(seen) for seen in looks.values()} == {6}
    assert rows.shape == (len(own), 1 + 2 * 6, 1)


def test_the_chapters_four_attempts_end_as_the_chapter_says():
    torch.manual_seed(0)
    large, small, fitting, kaiming = (seen[-1][1] for seen in peers.chapter_four())
    assert math.isnan(large) and small == 0
    assert 0.1 < fitting < 10 and 0.1 < kaiming < 10


def test_our_four_scalings_are_a_row_for_each_tensor_of_each_attempt():
    assert subjects.four_scalings(accelerated=False).call() == [1 + 2 * 50] * 4


@pytest.mark.parametrize("networks", [1, 3])
def test_a_forward_only_stack_counts_a_row_for_each_tensor_and_network(networks):
    given = {"depth": 5, "width": 8, "rows": 10, "seeds": range(networks)}
    assert subjects.forward_only("kaiming", **given) == networks * (1 + 2 * 5)
    assert subjects.forward_only(rule("naive"), "linear", **given) == networks * (1 + 2 * 5)


@pytest.fixture
def looks(monkeypatch):
    """Whether the compiled passes could be had each time that somebody looked for them."""
    found, own = [], subjects.library

    def looked():
        found.append(not cpu._plain)
        return own()

    monkeypatch.setattr(choice, "library", looked)
    return found


PLAIN = {
    "stack": lambda: subjects.watched_stack(nets.stack_weights(16, 6), nets.stack_input(16, 20), False),
    "networks": lambda: subjects.stack_networks(2, False),
    "scalings": lambda: subjects.four_scalings(False),
    "probe": lambda: subjects.probed_step(SMALL, "plain"),
    "training": lambda: train.typed_training({"depth": 1, "width": 4, "batch": 8, "steps": 2}, accelerated=False),
}


@pytest.mark.parametrize("build", PLAIN.values(), ids=PLAIN)
def test_a_plain_contestant_leaves_the_compiled_passes_alone_and_to_others(looks, build):
    contestant = build()
    contestant.call()
    contestant.close()
    assert looks and not any(looks)
    choice.measure(torch.ones(1, 2, 2))
    assert looks[-1]


def test_without_a_compiler_nothing_is_accelerated(monkeypatch):
    monkeypatch.setattr(subjects, "library", lambda: None)
    for build in (
        partial(subjects.recorded_step, SMALL, "accelerated"),
        partial(subjects.probed_step, SMALL, "nohist"),
        partial(subjects.stack_networks, 2, True),
        partial(subjects.four_scalings, True),
        partial(subjects.watched_stack, [], torch.ones(1, 2, 2), True),
    ):
        with pytest.raises(NotAvailable, match="no compiler"):
            build()
    assert subjects.RECORDINGS[subjects.fastest()] == {"histograms": True, "accelerated": False}


@pytest.mark.parametrize("fresh", [False, True])
def test_a_plane_has_the_networks_that_one_by_one_have(fresh):
    """In the mean over 40 points; a point's q has a spread of 20 %, the mean ratio one of 3 to 5 %.

    Where all points share their weights, other ones on each side, the mean ratio has a spread of 30 %.
    """
    together = subjects.plane(40, 12, 100, 8, fresh).call().q[:, -1]
    alone = torch.stack([q for q, _ in bare.networks_one_by_one(40, 12, 100, 8, fresh).call()]).double()
    ratio = float((torch.as_tensor(together) / alone).mean())
    assert abs(math.log(ratio)) < (0.25 if fresh else 1.2)
    assert together[-5:].mean() > 10 * together[:5].mean()
    assert subjects.plane(3, 2, 4, 2).work == 3


# --- what is asked of the races ---------------------------------------------------------------------------------------


@pytest.fixture
def asked(monkeypatch):
    """Run a group with races that only collect what they are asked."""
    found, built = [], {}

    def collect(builds, questions, setting):
        found.extend(questions)
        built.update(builds)
        assert all({question.over, question.under} <= set(builds) for question in questions)
        return Outcome()

    for module in (step, stack_group, ensemble, backward, phase, gpu, train):
        monkeypatch.setattr(module, "run", collect)
    monkeypatch.setattr(subjects, "require_gpu", lambda: None)
    monkeypatch.setattr(backward, "peak_bytes", lambda call, device: 2.0**20)
    monkeypatch.setattr(backward, "LARGE", nets.LARGE._replace(batch=10))
    return SimpleNamespace(questions=found, builds=built)


@pytest.mark.parametrize(
    ("group", "prefix"),
    [
        (step.group, "step"),
        (stack_group.group, "stack"),
        (stack_group.chapter, "chapter"),
        (ensemble.group, "ensemble"),
        (train.group, "train"),
        (backward.group, "backward"),
        (phase.group, "phase"),
        (gpu.group, "gpu"),
    ],
    ids=["step", "stack", "chapter", "ensemble", "train", "backward", "phase", "replay"],
)
def test_a_group_asks_for_all_of_its_ids_once(asked, group, prefix):
    group(Setting(quick=True))
    names = [(question.id, question.variant) for question in asked.questions]
    assert len(set(names)) == len(names)
    assert {name for name in IDS if name.startswith(prefix)} <= {name for name, _ in names}
    assert {variant for _, variant in names} <= set(VARIANTS)
    used = {name for question in asked.questions for name in (question.over, question.under)}
    assert set(asked.builds) == used


def test_bare_steps_are_what_steps_are_divided_by(asked):
    step.group(Setting())
    by_id = {(question.id, question.variant): question for question in asked.questions}
    assert by_id["step.deep.full", "accelerated"] == Asked(
        "step.deep.full", "accelerated", "deep by hand, accelerated", "deep module"
    )
    assert by_id["step.deep.cost", "every10"].under == "deep by hand"
    assert {variant for name, variant in by_id if name == "step.deep.cost"} == {"accelerated", "nohist", "every10"}
    assert {variant for name, variant in by_id if name == "step.deep.full"} == {"accelerated", "nohist", "plain"}
    assert by_id["step.module.full", "every10"].under == "deep module"
    assert {f"step.{net}.peer.{peer}" for net in ("deep", "book") for peer in peers.STEP} <= {name for name, _ in by_id}


def test_networks_per_second_divide_the_loop_by_ours(asked):
    stack_group.group(Setting())
    found = [question for question in asked.questions if question.id == "stack.nets"]
    assert found and all("chapter" in question.over for question in found)


def test_memory_is_counted_in_mib(asked):
    outcome = backward.group(Setting(quick=True))
    assert [(row.id, row.ratio, row.unit) for row in outcome.rows] == [
        ("backward.50000.memory", 1.0, "MiB"),
        ("backward.50000.peer.module.memory", 1.0, "MiB"),
    ]


def test_outer_products_that_do_not_fit_are_left_out(monkeypatch):
    monkeypatch.setattr(backward, "free_memory", lambda device: 1e9)
    outcome = Outcome()
    backward._outer(outcome, Setting())
    assert not outcome.rows and outcome.missing[0][:2] == ("backward.50000.peer.outer", "plain")
    assert re.match(r"needs 7\.8\d GB, half of the free memory is 500 MB", outcome.missing[0].reason)


def test_outer_products_are_timed_once(monkeypatch):
    calls = []
    monkeypatch.setattr(backward, "_ladder", lambda version: Contestant(lambda: calls.append(version)))
    monkeypatch.setattr(backward, "seconds_each", lambda call, times, device, clock: call() or 3.0 * times)
    outcome = Outcome(seconds={"50000 module": 0.5})
    backward._outer(outcome, Setting())
    assert calls == ["outer"] and (outcome.rows[0].ratio, outcome.rows[0].q25) == (6.0, 6.0)


def test_startup_subtracts_the_import_of_the_same_round(monkeypatch):
    order = {0: ("help", "run", "import"), 1: ("run", "import", "help"), 2: ("import", "help", "run")}
    assert {k: tuple(name for name, _ in startup._rotated(k)) for k in order} == order
    values = {1: {"run": 3.0, "import": 2.0, "help": 0.25}, 2: {"import": 1.0, "help": 0.75, "run": 2.5}}
    spent = iter([9.0, 9.0, 9.0, *(values[k][name] for k in (1, 2) for name in order[k])])
    monkeypatch.setattr(startup, "python", lambda words, threads, folder: (next(spent), ""))
    helped, ran = startup.group(Setting(rounds=2)).rows
    assert (helped.id, helped.q25, helped.q75, helped.unit) == ("startup.help", 0.375, 0.625, "s")
    assert (ran.id, ran.q25, ran.q75) == ("startup.run", 1.125, 1.375)


def test_depth_and_steps_are_charged_with_what_they_add(monkeypatch):
    said = {"child(3000, 1)": {"kib": 5120.0, "seconds": 3e-3}, "child(10, 1)": {"kib": 4096.0, "seconds": 2e-3}}
    said |= {"train(2000)": {"kib": 9216.0}, "train(1000)": {"kib": 7168.0}}
    monkeypatch.setattr(memory, "_measured", lambda call, setting: said[call])
    grown, slower, longer = memory.group(Setting()).rows
    assert (grown.id, grown.ratio, grown.unit) == ("memory.stack", 1.0, "MiB")
    assert (slower.id, slower.ratio, slower.unit) == ("memory.stack.time", 1.5, "ratio")
    assert (longer.id, longer.ratio, longer.unit) == ("memory.train", 2.0, "MiB")


def test_the_probe_records_what_was_asked_and_is_gone_afterwards(monkeypatch, fast):
    made, frames = [], []
    own = bare.module
    monkeypatch.setattr(bare, "module", lambda *words: made.append(own(*words)) or made[-1])
    monkeypatch.setattr(Probe, "histograms", lambda self: frames.append("histograms"))
    monkeypatch.setattr(subjects, "TABLE_STEPS", 3)
    contestant = subjects.probed_step(SMALL, "plain_histograms", every=10, tables=True)
    first = float(contestant.call())
    assert contestant.work == 30 and frames == ["histograms"]
    module = bare.module_step(SMALL).call
    assert close(first, [float(module()) for _ in range(30)][-1])
    contestant.close()
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in made[0].modules())


def test_a_contestant_does_one_unit_of_work_unless_it_says_more():
    assert Contestant(partial(int)).work == 1 and subjects.stack_networks(16, accelerated=False).work == 16


def test_all_readers_of_many_files_give_the_same_rows(tmp_path):
    files = run_folders(tmp_path, 3)
    own = subjects.collected(tmp_path).call()
    assert len(own) == 3 * 500 and own["lr"].nunique() == 3 and own["mean"].nunique() > 1000
    for build in peers.FILES.values():
        theirs = build(files).call()
        assert list(theirs) == list(own)[:-1]  # `run` is ours
        for name in theirs:
            assert theirs[name].astype(str).tolist() == own[name].astype(str).tolist(), name


def test_the_seconds_of_fewer_folders_stand_for_all(monkeypatch):
    monkeypatch.setattr(collect, "QUICK_FOLDERS", 4)
    outcome = collect.group(Setting(rounds=2, quick=True))
    found = {row.id: row for row in outcome.rows}
    assert set(found) == {"collect", "collect.seconds", "collect.peer.concat"} and found["collect.seconds"].unit == "s"
    per_folder = outcome.seconds["initlab.read"] / 4
    assert found["collect.seconds"].ratio == pytest.approx(3000 * per_folder, rel=0.5)  # the same calls, timed twice
    assert "collect.seconds" not in {row.id for row in collect.group(Setting(threads=2, rounds=1, quick=True)).rows}
