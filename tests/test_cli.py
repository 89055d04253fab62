"""The command line as a user meets it."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import pandas as pd
import pytest
import torch

import initlab
from initlab.errors import LONGEST, UsageError, join_mistakes
from initlab.job import stages
from initlab.job.settings import CONF
from initlab.nn.init import RULES
from initlab.nn.loss_table import LOSSES
from initlab.stats.dtypes import DTYPES
from initlab.tasks import train
from initlab.tasks.course import ladders
from initlab.tasks.ensemble.training import OPTIMIZERS

Lab = Callable[..., tuple[int, str, str]]
STACK = ("task=stack", "depth=5", "seeds=2", "plots=false", "report=false")
QUICK = ("depth=5", "seeds=2", "train.steps=3", "plots=false", "report=false")


def runs(folder: Path = Path("outputs")) -> list[Path]:
    return sorted(path.parent for path in folder.glob("**/run.json"))


def test_one_run_leaves_a_whole_folder_and_a_table(lab: Lab) -> None:
    code, out, err = lab(*QUICK[:3])
    assert code == 0, err
    (folder,) = runs()
    assert folder.parts[:2] == ("outputs", "config")
    names = {path.name for path in folder.iterdir()}
    assert names >= {"stats.parquet", "losses.parquet", "parity.parquet", "run.json", "initlab.log", ".hydra"}
    assert {name for name in names if name.endswith(".png")} == {
        "activation_std.png", "gradient_std.png", "training_activations.png", "gradient_norm.png", "loss.png",
    }  # fmt: skip
    (header, row), verdict = out.splitlines()[:2], out.splitlines()[-1]
    assert verdict == "verdict: healthy: nothing found in 5 layers." and (folder / "verdict.json").exists()
    assert header.split()[:2] == ["init", "activation"] and row.split()[:2] == ["kaiming", "relu"]
    assert "gradient difference" in header and str(folder) in out
    frame = initlab.read("outputs/**")
    assert set(frame["stage"]) == {"stack", "train"} and set(frame["train_width"]) == {50} and set(frame["lr"]) == {0.1}
    assert json.loads((folder / "run.json").read_text())["status"] == "done"


def test_a_sweep_ends_in_one_table(lab: Lab) -> None:
    words = ("init=naive,small,lecun,kaiming", "task=stack", "depth=50", "seeds=2", "theory=off")
    code, out, _ = lab("-m", *words, "plots=false", "report=false")
    assert code == 0
    assert len(runs()) == 4
    frame = initlab.read("outputs/**")
    assert sorted(frame["init"].unique()) == ["kaiming", "lecun", "naive", "small"]
    table = {line.split()[0]: line for line in out.splitlines() if line.split()[1:2] == ["relu"]}
    assert "not finite from layer 45" in table["naive"] and "exactly 0 from layer 40" in table["small"]
    assert "alive" in table["lecun"] and "alive" in table["kaiming"]


@pytest.mark.parametrize("name", ["lecun", "half"])
def test_a_rule_of_ones_own_is_one_file(lab: Lab, tmp_path: Path, name: str) -> None:
    """A row of the table with some fields changed, or a rule of another name by its fields."""
    (tmp_path / "mine" / "init").mkdir(parents=True)
    (tmp_path / "mine" / "init" / "half.yaml").write_text(f"name: {name}\ngain: 0.5\ndistribution: uniform\n")
    code, _, err = lab("-cd", "mine", "init=half", "task=stack", *QUICK)
    assert code == 0, err
    frame = initlab.read("outputs")
    assert set(frame["init"]) == {"half"} and set(frame["gain"]) == {0.5} and set(frame["distribution"]) == {"uniform"}


def listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))


def choices(group: str) -> str:
    """The files of a group of conf/, as a mistake in its name lists them."""
    return listed(path.stem for path in (CONF / group).glob("*.yaml"))


MISTAKES = {
    "init=he": f"initlab: init=he: must be one of {choices('init')} - did you mean kaiming?",
    "lr=0.1": "initlab: lr: no such option - did you mean train.lr?; see --help",
    "dtype=fp16": f"initlab: dtype=fp16: must be one of {listed(DTYPES)} - did you mean float16?",
    "init=kaimng": f"initlab: init=kaimng: must be one of {choices('init')} - did you mean kaiming?",
    "init.name=half": f"initlab: init=half: must be one of {listed(RULES)}",
    "dept=50": "initlab: dept: no such option - did you mean depth?; see --help",
    "train.dept=50": "initlab: train.dept: no such option - did you mean train.depth?; see --help",
    "+init.gian=3": "initlab: init.gian: no such option - did you mean init.gain?; see --help",
    "depth=-1": "initlab: depth=-1: must be at least 1",
    "depth=abc": "initlab: depth=abc: must be an integer",
    "train.lr=abc": "initlab: train.lr=abc: must be a number",
    "train.lr=nan": "initlab: train.lr=nan: must be finite",
    "plots=maybe": "initlab: plots=maybe: must be true or false",
    "init=[naive,small]": "initlab: init=[naive,small]: one at a time; for several write -m init=naive,small",
    "init=[]": "initlab: init=[]: one at a time; for several write -m init=A,B",
    "depth=1,2": "initlab: depth=1,2: several values need a sweep; put -m before the options",
    "--depth=3": "initlab: --depth=3: options have no dashes, write depth=3",
    "-depth=3": "initlab: -depth=3: options have no dashes, write depth=3",
    "--dept=3": "initlab: --dept=3: no such flag - did you mean depth?; see --help and --hydra-help",
    "-cn": "initlab: argument --config-name/-cn: expected one argument; see --help",
    "init=null": f"initlab: init=null: must be one of {choices('init')}",
    "init=???": f"initlab: init=???: must be one of {choices('init')}",
    "device=${nope}": "initlab: device: interpolation key 'nope' not found",
    "resume=${nope}": "initlab: resume: interpolation key 'nope' not found",
    "expect=${depth}": "initlab: expect=5: must be a list",
    "expect=${resume}": "initlab: expect=None: must be a list",
    "study=${depth}": "initlab: study=5: must be a dictionary",
    "shapes=8": "initlab: shapes=8: must be a list, as in [VALUE,VALUE]",
    "sweep.init=[[naive]]": "initlab: sweep.init=[['naive']]: must be a list of words",
    "sweep.init=naive": "initlab: sweep.init=naive: must be a list, as in [VALUE,VALUE]",
    "depth=???": "initlab: depth=???: must have a value",
    "depth=null": "initlab: depth=null: must have a value",
    "~depth": "initlab: ~depth: an option cannot be taken away; give it another value",
    "study.cost.runs=???": "initlab: study.cost.runs=???: must have a value",
    "phase.sw=3": "initlab: phase.sw: holds options of its own: phase.sw.min, phase.sw.max, phase.sw.points",
    "model=3": "initlab: model=3: must be a dictionary, as in {NAME:VALUE}",
    "hydra.run.dir=???": "initlab: hydra.run.dir=???: must have a value",
    "hydra.output_subdir=x": "initlab: hydra.output_subdir=x: must be .hydra, where runs are looked up",
    "++hydra.verbose=1e-3": "initlab: ++hydra.verbose=1e-3: Hydra takes no such value",
    "+=???": "initlab: +=???: not an option; options are NAME=VALUE, see --help and --hydra-help",
    "train.lr=1e308": "initlab: train.lr=1e+308: must be at most 1e+30",
    "activation._target_=numpy.tanh": "initlab: activation._target_=numpy.tanh: cannot be trained with float32 tensors "
    "(Can't call numpy() on Tensor that requires grad. Use tensor.detach().numpy() instead.)",
    "hydra.run.dir=/dev/null/x": "initlab: /dev/null/x: cannot be written (Not a directory); a file stands where a "
    "folder should be: move it, or choose another folder",
    "activation=ReLU": f"initlab: activation=ReLU: must be one of {choices('activation')} - did you mean relu?",
    "seed=99999999999999999999": "initlab: seed=99999999999999999999: must be at most 4611686018427387904",
    "threads=100000": "initlab: threads=100000: must be at most 1024",
    "depth": "initlab: depth: not an option; options are key=value, see --help",
    "init.mode=fan": "initlab: init.mode=fan: must be one of constant, fan_avg, fan_in, fan_out - did you mean fan_in?",
    "dtype=float31": f"initlab: dtype=float31: must be one of {listed(DTYPES)} - did you mean float32?",
    "task=lb": f"initlab: task=lb: must be one of {listed(stages.TASKS)} - did you mean lab?",
    "train.loss=mae": f"initlab: train.loss=mae: must be one of {listed(LOSSES)} - did you mean mse?",
    "train.optimizer=adma": f"initlab: train.optimizer=adma: must be one of {listed(OPTIMIZERS)} - did you mean adam?",
    "train.batch=9999": "initlab: train.batch=9999: data=digits has 1797 training rows; use at most as many",
    "data=mnist": "initlab: data=mnist: no MNIST files in data.root=data/mnist; put train-images-idx3-ubyte and "
    "train-labels-idx1-ubyte (or .gz, or mnist.npz) there, or say data.download=true",
}


@pytest.mark.filterwarnings("ignore:__array_wrap__")  # of numpy, whose function is given
@pytest.mark.parametrize(("word", "line"), MISTAKES.items())
def test_a_mistake_is_one_line_and_leaves_nothing(lab: Lab, word: str, line: str) -> None:
    code, out, err = lab(*QUICK, word)
    assert (code, err) == (2, line + "\n")
    assert "Traceback" not in out
    assert not list(Path().glob("**/*.parquet")) and not runs()
    assert not Path("outputs").exists() or not list(Path("outputs").iterdir())


LONG = {
    "width=" + "1" * 3000: "must be at most",
    "init=" + "x" * 3000: "must be one of",
    "train.lr=\x1b[31mred": "\\x1b[31mred: not an option",
    "depth=a\nb": "not an option",
    "activation._target_=sys.exit": "sys.exit: cannot be called",
    "statistics.mine=sys.exit": "statistics.mine: fails for a tensor (2, 3, 4)",
    "statistics.mine=torch.mean": "one number for each (N, C)",
}


@pytest.mark.parametrize(("word", "text"), LONG.items(), ids=range(len(LONG)))
def test_a_line_is_short_and_printable_whatever_is_given(lab: Lab, word: str, text: str) -> None:
    code, _, err = lab(*QUICK, word)
    assert code == 2 and text in err and len(err) < 320 and err.endswith("\n") and err[:-1].isprintable()


@pytest.mark.parametrize("words", [("shapes=[[]]",), ("shapes=[[99999999999]]",)])
def test_shapes_that_no_input_has_are_one_line(lab: Lab, words: tuple[str, ...]) -> None:
    code, _, err = lab("task=graph", *words)
    assert code == 2 and err.count("\n") == 1 and not Path("outputs").exists()


def test_a_sweep_of_too_many_jobs_is_refused_before_one_is_made(lab: Lab) -> None:
    for word, text in (
        ("seed=range(0,1000000000000)", "seed=range(0,1000000000000): a sweep of 1e+12 jobs; at most 100,000"),
        ("seed=range(0,1000)", "seed=range(0,1000) depth=range(1,1000): a sweep of 999000 jobs; at most 100,000"),
        ("seed=range(0,9,0)", "seed=range(0,9,0): a range needs finite ends, and a step that is not 0"),
    ):
        more = ["depth=range(1,1000)"] if "1000)" in word else []
        assert lab("-m", word, *more, "task=stack")[::2] == (2, f"initlab: {text}\n")
    assert not Path("outputs").exists()


def test_flags_stand_anywhere_and_rules_are_found_by_a_pattern(lab: Lab) -> None:
    code, _, err = lab("task=stack", "depth=2", "-m", "init=glob(k*)", "seeds=1", "plots=false", "report=false")
    assert (code, err) == (0, "") and set(initlab.read("outputs/**")["init"]) == {"kaiming"}


def test_mnist_without_network_is_one_line(lab: Lab) -> None:
    code, _, err = lab("data=mnist", "data.download=true", "data.url=http://127.0.0.1:9", "data.root=x", *QUICK)
    assert code == 2 and err.count("\n") == 1 and "cannot be fetched" in err


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_cuda_without_a_gpu_ends_at_once(lab: Lab) -> None:
    code, _, err = lab("device=cuda", *QUICK)
    assert code == 2 and err.count("\n") == 1 and "device=auto|cpu|cuda" in err


def test_a_mistake_in_one_job_of_a_sweep(lab: Lab) -> None:
    """The other jobs run; the exit code tells."""
    code, out, err = lab("-m", "depth=-1,3", "task=stack", "seeds=1", "plots=false", "report=false")
    assert code == 2 and "depth=-1" in err
    assert len(runs()) == 1 and "alive" in out
    code, _, err = lab("-m", "init=kaimng,naive", *QUICK)
    assert code == 2 and len(runs()) == 1  # found before the first job runs


def test_mistakes_of_several_jobs_are_one_line(lab: Lab) -> None:
    """Values that are wrong for one reason stand together, different reasons beside each other."""
    _, _, err = lab("-m", "depth=-1,3", "width=-5,-6", "task=stack", "plots=false", "report=false")
    assert err == "initlab: depth=-1, width=-5, width=-6: must be at least 1\n"
    code, _, err = lab("-m", "dtype=int8,float32", "depth=-1", "gain=-2", "task=stack", "plots=false", "report=false")
    assert code == 2 and err.count("\n") == 1
    _, _, err = lab("-m", "device=tpu,cpu", "depth=-1", "task=stack", "plots=false", "report=false")
    assert err.count("\n") == 1 and "; depth=-1: must" in err and "device=tpu: must" in err


def test_lines_that_do_not_fit_in_one_stay_lines() -> None:
    reasons = [f"x={k}: {'why ' * 20}{k}" for k in range(7)]
    lines = join_mistakes([*reasons, *reasons])
    assert len(lines) == 3 and max(map(len, lines)) <= LONGEST
    assert [reason for line in lines for reason in line.split("; ")] == reasons
    assert join_mistakes(["nothing was found"]) == ["nothing was found"]
    many = join_mistakes(f"depth=-{k}: must be at least 1" for k in range(1, 100))
    assert len(many) == 1 and len(many[0]) <= LONGEST and many[0].startswith("depth=-1, depth=-2, ")


def test_a_fault_keeps_its_traceback_and_what_was_measured(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("a fault of ours")

    monkeypatch.setattr(train, "run_training", broken)
    code, out, err = lab(*QUICK)
    assert code == 1 and "a fault of ours" in out + err and "Traceback" in out + err
    (folder,) = runs()
    assert json.loads((folder / "run.json").read_text())["status"] == "failed"
    with pytest.warns(UserWarning, match="failed"):
        assert set(initlab.read("outputs")["stage"]) == {"stack"}


def test_teacher_takes_mse_by_itself(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    code, _, err = lab("data=teacher", "task=train", *QUICK)
    assert code == 0, err
    assert set(initlab.read("outputs", table="losses")["train_loss"]) == {"mse"}
    code, _, err = lab("data=teacher", "train.loss=cross_entropy", *QUICK)
    assert code == 2 and "use train.loss=mse" in err


def test_seeds_are_a_range(lab: Lab) -> None:
    assert lab("seed=3", "seeds=2", "task=stack", "depth=2", "plots=false", "report=false")[0] == 0
    assert sorted(initlab.read("outputs")["seed"].unique()) == [3, 4]


def test_the_same_command_gives_the_same_tables(lab: Lab) -> None:
    for _ in range(2):
        assert lab(*QUICK)[0] == 0
    one, two = (initlab.read(folder).drop(columns="run") for folder in runs())
    pd.testing.assert_frame_equal(one, two, check_exact=True)


def test_help_shows_every_option(lab: Lab) -> None:
    code, out, _ = lab("--help")
    assert code == 0
    for word in ("depth: 50", "train:", "lr: null", "init=kaiming|lecun|lsuv|mup|naive", "data=digits|mnist|teacher"):
        assert word in out


def _fresh(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("words", [[], ["--help"]])
def test_import_and_help_are_light(words: list[str]) -> None:
    """Neither torch nor pandas nor polars nor seaborn."""
    act = (
        "import runpy; runpy.run_module('initlab', run_name='__main__', alter_sys=True)" if words else "import initlab"
    )
    done = _fresh(
        f"import sys\nsys.argv[1:] = {words}\ntry:\n    {act}\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'pandas', 'polars', 'seaborn', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.long
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_a_run_without_figures_imports_no_compiler_and_nothing_that_draws(tmp_path: Path, optimizer: str) -> None:
    """Each of them takes up to a second and more; torch's optimizers import its compiler when they are first used."""
    words = ["plots=false", "report=false", "task=train", "train.steps=2", f"train.optimizer={optimizer}", "seeds=1"]
    done = _fresh(
        f"import runpy, sys\nsys.argv[1:] = {[*words, f'hydra.run.dir={tmp_path}/run']}\n"
        "try:\n    runpy.run_module('initlab', run_name='__main__', alter_sys=True)\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "heavy = {'torch._dynamo', 'sympy', 'scipy', 'seaborn', 'matplotlib'} & set(sys.modules)\n"
        "assert 'torch' in sys.modules and not heavy, heavy"
    )
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.glob("run/losses*.parquet"))


def test_a_stopped_run_keeps_what_it_measured(tmp_path: Path) -> None:
    """By Ctrl-C, in a process of its own; by SIGTERM at the worst moments in job/test_how_runs_end.py."""
    process = subprocess.Popen(
        [sys.executable, "-m", "initlab", *QUICK[:2], "task=lab", "train.steps=1000000", "plots=false", "report=false"],
        cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": str(Path(initlab.__file__).parents[1])},
    )  # fmt: skip
    while not list(tmp_path.glob("outputs/**/parts/theory-*.parquet")):  # the stack is done, and the training is not
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate()
    # Python ends by SIGINT itself if that arrived inside `exec` of a text, as in an import: to a shell that is 130 too.
    assert process.returncode in (130, -signal.SIGINT) and "Traceback" not in err, err
    with pytest.warns(UserWarning, match="interrupted"):
        frame = initlab.read(tmp_path / "outputs")
    assert "stack" in set(frame["stage"])
    with pytest.warns(UserWarning, match="interrupted"):
        theory = initlab.read(tmp_path / "outputs", table="theory")
    assert "stack" in set(theory["stage"])


def test_a_stopped_training_has_its_prediction(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = train.run_training

    def stopped(*args: object, **options: object) -> None:
        whole(*args, **options)  # type: ignore[arg-type]
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "run_training", stopped)
    assert lab("task=train", "theory=simulation", *QUICK)[0] == 130
    with pytest.warns(UserWarning, match="interrupted"):
        theory = initlab.read("outputs", table="theory")
    assert set(theory["stage"]) == {"train"} and {"forward", "backward"} <= set(theory["direction"])


@pytest.mark.gpu
def test_the_main_job_on_a_gpu(lab: Lab) -> None:
    code, _, err = lab("init=kaiming", "device=cuda", "train.steps=20")
    assert code == 0, err
    assert set(initlab.read("outputs")["device"]) == {"cuda"}


@pytest.mark.long
def test_a_failed_expectation_is_told_by_the_exit_code(lab: Lab, tmp_path: Path) -> None:
    (tmp_path / "study").mkdir()
    text = "defaults: [config, _self_]\ntask: stack\nexpect:\n  - {say: it grows, where: {layer: 5}, statistic: std, "
    (tmp_path / "study" / "hope.yaml").write_text(text + "reduce: median, is: above, value: 1000}\n")
    code, out, _ = lab("-cd", "study", "-cn", "hope", *QUICK)
    assert code == 4 and "FAILS: it grows (measured " in out
    assert lab("-cd", "study", "-cn", "hope", *QUICK, "init=naive", "depth=6")[0] == 0
    code, out, err = lab("-cd", "study", "-cn", "hope", "-m", *QUICK, "init=naive,small", "depth=4")
    assert code == 2 and "selects no rows" in err and len(runs()) == 4


@pytest.mark.long
def test_the_ladder_and_the_graph_from_the_command_line(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = ladders.matmul_ladder
    names = [name for name in ladders.LADDER if name != "compiled"]  # whose compiler other tests wait for
    monkeypatch.setattr(ladders, "matmul_ladder", lambda **how: whole([(2, 3, 4)], names, rounds=1, **how))
    code, out, err = lab("task=matmul")
    assert code == 0, err
    assert "einsum" in out and "equal up to rounding" in out
    assert set(initlab.read("outputs", table="timings")["shape"]) == {"2x3 @ 3x4"}
    code, out, err = lab("task=graph", "model._target_=torch.nn.Linear", "model.in_features=3",
                         "model.out_features=2")  # fmt: skip
    assert code == 0, err
    assert "AddmmBackward0" in out and "Lin.backward" in out
    assert "AccumulateGrad" in set(initlab.read("outputs/**", table="nodes")["node"])
    assert {path.name for path in Path("outputs").glob("**/*.png")} == {"timings.png", "graph.png"}


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("model._target_=torch.nn.Linearr",), "torch.nn.Linearr cannot be built"),
        (("model._target_=torch.nn.Linear",), "missing 2 required positional arguments"),
        (("model.in_features=3",), "no _target_"),
    ],
)
def test_a_model_that_cannot_be_built_is_one_line(lab: Lab, words: tuple[str, ...], text: str) -> None:
    code, _, err = lab("task=graph", *words)
    assert code == 2 and text in err and err.count("\n") == 1


def test_one_backward_pass_is_explained(lab: Lab) -> None:
    code, out, err = lab("task=explain", "train.loss=mse", "train.depth=2", "train.batch=1")
    assert code == 0, err
    assert "Where does self.out.g come from?" in out and "Why inp.g in the loss?" in out
    assert set(initlab.read("outputs/**", table="steps")["init"]) == {"kaiming"}


def test_the_backward_ladder_from_the_command_line(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    quick = {"rounds": 1, "seconds": 0.01, "inputs": 4, "versions": ["outer", "engine"]}
    monkeypatch.setattr(stages, "TEACHER_ROWS", 100)
    whole = ladders.backward_ladder
    monkeypatch.setattr(ladders, "backward_ladder", lambda *what, **how: whole(*what, **how, **quick))
    code, out, err = lab("task=backward", "train.batch=7", "train.depth=2", "train.width=3")
    assert code == 0, err
    assert "nn.Linear" in out and "equal up to rounding" in out
    assert set(initlab.read("outputs", table="timings")["shape"]) == {"7x4-3-3-1", "100x4-3-3-1"}


def test_a_row_named_without_its_file_is_the_row_in_the_tables(lab: Lab) -> None:
    assert lab("init.name=naive", "activation.name=tanh", "task=stack", *QUICK)[0] == 0
    frame = initlab.read("outputs")
    assert set(frame["init"]) == {"naive"} and set(frame["activation"]) == {"tanh"} and set(frame["gain"]) == {1.0}


def test_too_large_for_the_memory_is_one_line(lab: Lab) -> None:
    code, _, err = lab(*QUICK, "width=9999999999")
    assert code == 2 and err.startswith("initlab: depth=5 width=9999999999 inputs=9999999999 batch=")
    assert " are free and one network works on " in err and err.count("\n") == 1


def test_a_stack_without_its_backward_pass(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "WORTH_SAYING", 0)
    code, out, err = lab("task=stack", "backward=false", *QUICK)
    assert code == 0, err
    assert set(initlab.read("outputs")["direction"]) == {"forward"} and "backward pass keeps" not in out
    assert "keeps 1.2 MB: preactivations and weights, 2 networks at a time" in lab("task=stack", *QUICK)[1]
    assert "log2_rms_true" in initlab.read("outputs")


def test_training_rows_have_no_true_logarithm(lab: Lab) -> None:
    assert lab(*QUICK)[0] == 0
    frame = initlab.read("outputs")
    assert (frame["log2_rms_true"].isna() == (frame["stage"] == "train")).all() and "train" in set(frame["stage"])


def test_who_draws_and_how_a_gpu_multiplies_are_options_and_columns(lab: Lab) -> None:
    assert lab("task=stack", *QUICK)[0] == 0
    assert lab("task=stack", "generator=torch", *QUICK)[0] == 0
    frame = initlab.read("outputs")
    assert set(frame["generator"]) == {"torch", "philox"} and set(frame["matmul"]) == {"ieee"}
    inputs = frame[frame["layer"] == 0].groupby("generator", observed=True)["rms"].unique()
    assert not set(inputs["torch"]) & set(inputs["philox"])
    for word, allowed in (("generator=numpy", "philox, torch"), ("matmul=tf23", "ieee, tf32 - did you mean tf32?")):
        code, _, err = lab(word, *QUICK)
        assert code == 2 and err == f"initlab: {word}: must be one of {allowed}\n"


def test_every_measured_number_has_its_prediction(lab: Lab) -> None:
    """The table `theory` of both stages, a line that tests all layers, and theory=off."""
    code, out, err = lab("depth=6", "seeds=4", "train.steps=3", "plots=false", "report=false")
    assert code == 0, err
    assert "theory: 6 layers agree, p = " in out and " alive p " in out
    theory = initlab.read("outputs", table="theory")
    assert set(theory["stage"]) == {"stack", "train"} and set(theory["step"]) == {0}
    assert {"measured", "predicted", "band_low", "band_high", "z", "method"} <= set(theory)
    assert sorted(theory["seed"].unique()) == [-1, 0, 1, 2, 3]
    assert theory["gain"].to_numpy() == pytest.approx(2**0.5)
    stats = initlab.read("outputs").query("step == 0")
    key = ["stage", "implementation", "seed", "step", "layer", "tensor", "direction"]
    std = theory.query("statistic == 'std' and seed >= 0").merge(stats, on=key)
    assert len(std) == 4 * (1 + 6 * 4) + 4 * 2 * (3 + 2 + 2) and (std["measured"] == std["std"]).all()
    code, out, _ = lab("theory=off", *QUICK)
    assert code == 0 and "theory" not in out
    assert not list(sorted(runs())[-1].glob("theory.parquet"))
    assert lab("theory=of", *QUICK)[::2] == (2, "initlab: theory=of: must be one of auto, closed, off, simulation "
                                                "- did you mean off?\n")  # fmt: skip


def test_a_wrong_prediction_is_seen_on_the_command_line(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    told = stages.compare_stack
    monkeypatch.setattr(stages, "compare_stack", lambda stats, **asked: told(stats, **{**asked, "init": "lecun"}))
    code, out, _ = lab("task=stack", *QUICK)
    assert code == 0 and "theory: does not agree, p < 0.001: " in out


@pytest.mark.long
def test_a_run_says_which_gain_it_took_and_a_sweep_each_note_once(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    _, out, _ = lab("init=xavier", "activation=tanh", *STACK)
    assert "gain: 1.467 (chi: " in out and "torch has 1.667, init.gain_kind=torch)" in out
    _, out, _ = lab("init=kaiming", "init.gain_kind=torch", "activation=tanh", *STACK)
    assert "gain: 1.667 (torch: " in out and "the one that keeps gradients is 1.467, init.gain_kind=chi)" in out
    assert "gain: " not in lab("init=lecun", *STACK)[1] and "gain: " not in lab("-m", "init=kaiming", *STACK)[1]
    _, out, _ = lab("activation._target_=torch.nn.Softsign", *STACK)
    assert "difference quotient" not in out and "torch has none" in out  # autograd goes through it

    def silent(stats: pd.DataFrame, **asked: object) -> pd.DataFrame:
        raise UsageError("not known here")

    monkeypatch.setattr(stages, "compare_stack", silent)
    code, out, _ = lab("-m", "task=stack", "init=kaiming,lecun", "depth=3", "seeds=2", "plots=false", "report=false")
    assert code == 0 and out.count("theory: no prediction (not known here)\n") == 1


def test_an_activation_of_ones_own_is_one_file(lab: Lab, tmp_path: Path) -> None:
    """A class with arguments, from a file; a function, on the command line: stack, training and theory take both."""
    (tmp_path / "mine" / "activation").mkdir(parents=True)
    (tmp_path / "mine" / "activation" / "soft.yaml").write_text(
        "_target_: torch.nn.Softplus\narguments: {beta: 2}\n", encoding="utf-8"
    )
    (tmp_path / "waves.py").write_text("import torch\n\ndef wave(z, k=1.0):\n    return z + torch.sin(k * z)\n")
    code, out, err = lab("-cd", "mine", "activation=soft", *QUICK)
    assert code == 0, err
    assert out.splitlines()[1].split()[1] == "soft" and "theory: " in out
    code, out, err = lab("activation._target_=waves.wave", "activation.arguments.k=0.5", *QUICK)
    assert code == 0, err
    parity = initlab.read("outputs", table="parity").query("direction == 'backward'")
    assert set(parity["activation"]) == {"soft", "wave"} and parity["relative_error"].max() < 1e-5
    theory = initlab.read("outputs", table="theory").query("seed == -1 and statistic == 'std' and stage == 'stack'")
    assert set(theory["activation"]) == {"soft", "wave"} and theory["z"].abs().max() < 6  # 98 rows of two means


@pytest.mark.long
def test_the_researchers_page(lab: Lab, tmp_path: Path) -> None:
    """What the README says of its own rule and its own activation, with its numbers."""
    for path, text in (
        ("init/strong.yaml", "name: lecun\ngain: 1.5\ndistribution: uniform\n"),
        ("activation/clip.yaml", "_target_: torch.nn.Hardtanh\narguments: {min_val: -2.0, max_val: 2.0}\n"),
    ):
        (tmp_path / "mine" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "mine" / path).write_text(text, encoding="utf-8")
    code, _, err = lab("-cd", "mine", "init=strong", "activation=clip", "task=stack", "plots=false", "report=false")
    assert code == 0, err
    mean = initlab.read("outputs/**", table="theory").query(
        "stage == 'stack' and seed == -1 and tensor == 'activation' and statistic == 'std' and layer == 1"
    )
    gradient = mean[mean["direction"] == "backward"].iloc[0]
    assert gradient["predicted"] == pytest.approx(4900, rel=0.1) and abs(gradient["z"]) < 3
    assert (gradient["init"], gradient["activation"]) == ("strong", "clip")
    clip = torch.nn.Hardtanh(-2.0, 2.0)
    where = initlab.phase(clip, sigma_w=1.5)
    assert where.phase == "chaotic" and where.chi_1 == pytest.approx(1.41, abs=0.005)
    assert initlab.gain(clip) == pytest.approx(1.0236, abs=1e-4)


@pytest.mark.long
def test_an_activation_by_target_is_the_row_that_it_names(lab: Lab) -> None:
    assert lab("activation._target_=torch.nn.ReLU", *QUICK)[0] == 0
    assert lab("activation=relu", *QUICK)[0] == 0
    frame = initlab.read("outputs")
    own, table = (frame[frame["activation"] == name] for name in ("ReLU", "relu"))
    assert len(own) == len(table) > 0
    key = ["stage", "implementation", "seed", "step", "layer", "tensor", "direction"]
    both = own.merge(table, on=key)
    # Gains differ in their last digits, and float32 rounds on: 1e-4 of a std, three steps of training included.
    assert len(both) == len(own)
    assert ((both["std_x"] - both["std_y"]).abs() <= 1e-4 * both["std_y"].abs()).all()


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("activation._target_=torch.nn.Softpluss",), "cannot be had (module 'torch.nn' has no attribute 'Softpluss') "
         "- did you mean Softplus?"),
        (("activation._target_=no.such.module",), "No module named 'no'"),
        (("activation._target_=softplus",), "cannot be had"),
        (("activation._target_=torch.log",), "torch.log: not finite at z=-16"),
        (("activation._target_=torch.softmax", "activation.arguments.dim=-1"), "not an elementwise function"),
        (("activation._target_=torch.nn.Softplus", "activation.arguments.gamma=2"), "unexpected keyword argument"),
        (("activation=leaky_relu", "activation.arguments.negative_slope=0.2"), "those of activation._target_"),
        (("activation._target_=torch.relu_",), "changes its argument in place"),
        (("activation._target_=torch.sin", "task=explain"), "is for task=lab, stack, train, seeded"),
        (("activation._targett_=torch.sin",), "did you mean activation._target_?"),
    ],
)  # fmt: skip
def test_an_activation_that_cannot_be_had_is_one_line(lab: Lab, words: tuple[str, ...], text: str) -> None:
    code, _, err = lab(*words, *QUICK)
    assert code == 2 and text in err and err.count("\n") == 1


def test_the_public_door() -> None:
    for name in ("read", "probe", "predict", "phase", "critical", "gain", "limits"):
        assert name in dir(initlab) and callable(getattr(initlab, name))
    last = initlab.predict(init="kaiming", activation="relu", depth=3, width=100, wide=True).iloc[-1]
    assert {"std", "ln_std_mean", "ln_std_sd", "std_low", "std_high", "method"} <= set(last.index)
    assert initlab.phase("tanh", initlab.critical("tanh", 0.2), 0.2).chi_1 == pytest.approx(1, abs=1e-6)
    assert initlab.gain(torch.nn.ReLU(), "std") == pytest.approx(initlab.gain("relu", kind="std"), rel=1e-9)


def test_a_statistic_of_the_user_is_a_column(lab, tmp_path):
    (tmp_path / "of_mine.py").write_text("def top(x):\n    return x.amax((-2, -1))\n")
    code, _, err = lab(
        "depth=2",
        "width=4",
        "batch=3",
        "seeds=2",
        "train.steps=2",
        "statistics.top=of_mine.top",
        "plots=false",
        "report=false",
    )
    assert code == 0, err
    stats = initlab.read("outputs/**")
    assert stats["top"].notna().all() and (stats["top"] == stats["max"]).all()
    assert set(stats["stage"]) == {"stack", "train"}
    code, _, err = lab("statistics.width=of_mine.top")
    assert code == 2 and "statistics.width: the tables have a column of this name" in err
    code, _, err = lab("task=gains", "statistics.top=of_mine.top")
    assert code == 2 and err.strip() == "initlab: statistics.top: is for task=lab, stack, train"


@pytest.mark.parametrize(
    "words",
    [
        ("activation.arguments={min_val:-2.0,max_val:2.0}",),
        ("activation.arguments.min_val=-2.0", "+activation.arguments.max_val=2.0"),
    ],
)
def test_keys_of_a_dictionary_need_no_plus(lab: Lab, words: tuple[str, ...]) -> None:
    code, _, err = lab("activation._target_=torch.nn.Hardtanh", *words, *QUICK)
    assert (code, err) == (0, "")
    found = initlab.read("outputs").query("tensor == 'activation' and direction == 'forward' and layer > 0")
    assert found["max"].max() == 2 and found["min"].min() == -2


def test_what_ends_the_program_before_anything_ran_is_a_mistake(lab: Lab) -> None:
    code, out, err = lab(*QUICK, "depth=3", "hydra.callbacks.sweep._target_=sys.exit")
    assert (code, out) == (2, "") and err.count("\n") == 1 and "ended the program before anything" in err
    code, _, err = lab(*QUICK, "depth=3", "statistics.mine=torch.tensor")
    assert code == 2 and err.count("\n") == 1 and "statistics.mine: gives (" in err  # and no warning of the function's
