"""Random option lists: each ends in a run that is whole, or in one line that says what was wrong and leaves no folder.

Words are drawn from a grammar: every option and group, right, misspelt and nested, values of every type and none, with
every prefix, sweep and flag that Hydra has. Each list runs in a forked child.
"""

import random
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from tests.reliability.attack import Case
from tests.reliability.forks import isolate, run_forked

LARGE = 2000
LONGEST = 330  # characters of a line: some 300, with what stands before it
# A run that takes a fraction of a second, unless a word that follows says otherwise.
QUICK = (
    "depth=3",
    "width=4",
    "batch=3",
    "seeds=1",
    "train.steps=2",
    "train.width=3",
    "plots=false",
    "report=false",
    "data=digits",
)
QUICK += ("phase.sw.points=2", "phase.sb.points=2", "device=cpu")
TASKS = ("lab", "stack", "train", "seeded", "graph", "explain")  # the others take seconds whatever is said

# fmt: off
NUMBERS = ("0", "1", "2", "3", "-1", "-0", "007", "1_0", "3.5", "-2.5", "1e-3", "1e308", "-1e308", "1e400", "1E3", ".5",
    "5.", "nan", "inf", "-inf", "NaN", "10" * 9, "1" + "0" * 30, "9223372036854775807", "9223372036854775808",
    "-9223372036854775809", "0x10", "0b1", "1e", "+3", "1j", "\u0663", "1" * 400, "1" * 5000)
WORDS = ("true", "false", "null", "???", "", "abc", "naive", "kaiming", "relu", "float16", "yes", "None", "~", "-", "*",
    "''", '""', "' '", "'a b'", "a b", "a:b", "a=b", "a,b", "é", "日本", "\u202eabc", "\x1b[31mred", "a\nb", "\t", "\\",
    "x" * 3000, "'" + "y" * 2000 + "'", "../../etc", "/dev/null", "/dev/null/x", "%s", "{0}", "$HOME", "\\n", "#")
NESTED = ("[]", "[[]]", "[[[]]]", "{}", "[{}]", "{a:1}", "{a:{b:{c:[1]}}}", "[1,2]", "[1,1]", "[naive]", "[[naive]]",
    "[naive,nope]", "[1.5,abc]", "[null]", "[???]", "{_target_:os.getcwd}", "{_target_:sys.exit}", "[", "]", "{",
    "[" * 60 + "]" * 60, "{a:" * 30 + "1" + "}" * 30, "[" + ",".join(["7"] * 400) + "]", "{1:2}", "{a:1,a:2}",
    "[[8,4]]", "[[0]]", "[[-1,2]]", "[8,4]", "[[8,4],[2]]", "[true,false]", "[1,true,abc,null,[]]")
INSIDE = ("${depth}", "${nope}", "${train}", "${", "${}", "${oc.env:HOME}", "${oc.env:NOPE}", "${now:%Y}", "${.width}",
    "${depth}x", "${oc.decode:'['}", "${by_thousand:seed}", "${processes:abc}", "${..depth}", "${width", "${a:b:c}",
    "${oc.select:nope,3}", "${hydra.job.name}", "${hydra:runtime.cwd}", "${oc.create:{a:1}}", "${resume}")
SWEEPS = ("range(1,3)", "range(3)", "range(3,1)", "range(0,1000000000000)", "range(0,1,1e-12)", "range(0,2,0)", "f(1)",
    "choice(1,2)", "choice()", "glob(*)", "glob(k*)", "glob(zz*)", "interval(0,1)", "shuffle(1,2)", "sort(2,1)",
    "tag(t,choice(1,2))", "int(3.5)", "str(3)", "bool(1)", "float(x)", "json_str({a:1})", "extend_list(1)", "range(a)",
    "1,2", "1,1", "naive,kaiming", "naive,nope", "1,", ",1", "1,,2", "range(1,3),5", "choice(range(1,3))")
FUNCTIONS = ("sys.exit", "os.getcwd", "numpy.tanh", "math.tanh", "torch.tanh", "torch.nn.Tanh", "torch.relu_", "torch",
    "torch.sum", "torch.log", "builtins.print", "builtins.input", "builtins.exit", "torch.nn.Linear", "", ".", "..",
    "a..b", "no.such", "torch.nn", "torch.nn.", ".tanh", "1.2", "torch.rand_like", "torch.sign", "torch.dropout",
    "torch.nn.functional.softmax", "builtins.eval", "torch.nn.PReLU", "torch.nn.RReLU", "initlab.stack", "torch.abs",
    "torch.Tensor.numpy", "torch.no_grad", "builtins.breakpoint", "torch.nn.functional.relu", "torch.nn.BatchNorm1d",
    "collections.abc", "torch.square", "torch.exp", "torch.long", "torch.tensor", "torch.median", "numpy.mean")
HYDRAS = ("hydra.run.dir", "hydra.sweep.dir", "hydra.sweep.subdir", "hydra.output_subdir", "hydra.verbose", "hydra",
    "hydra.mode", "hydra.job.chdir", "hydra.hydra_logging", "hydra.job_logging", "hydra.launcher", "hydra.sweeper",
    "hydra.sweeper.params", "hydra.sweeper.max_batch_size", "hydra.job.num", "hydra.callbacks", "hydra.searchpath",
    "hydra/launcher", "hydra/sweeper", "hydra/job_logging", "hydra/hydra_logging", "hydra/output", "hydra/help",
    "hydra.job.env_set.A", "hydra.runtime.choices", "hydra.job_logging.root.level", "hydra.callbacks.sweep._target_",
    "hydra.nope", "hydra.job.name")
FLAGS = (["-m"], ["--multirun"], ["-c", "job"], ["-c", "hydra"], ["-c", "all"], ["-c", "x"], ["-cn", "nope"], ["-cn"],
    ["-cd", "nope"], ["-cd", "."], ["-cp", "nope"], ["--cfg"], ["-p", "train"], ["-p", "nope"], ["--resolve"],
    ["-c", "job", "--resolve"], ["--info", "config"], ["--info", "nope"], ["--info"], ["--nope"], ["-q"], ["--run"],
    ["--version"], ["--help"], ["--hydra-help"], ["-sc", "query=x"], ["-sc"], ["--experimental-rerun", "nope"], ["-"],
    ["--"], ["---"], ["-m=3"], ["--multirun=x"], ["-mm"], ["-cn=config"], ["--config-name", "config"], ["-h"])
# A right word for these may be a long run, or one that needs a network; it gets only wrong ones.
SLOW = ("train.steps", "seeds", "theory", "hydra.launcher", "hydra/launcher", "data", "data.download", "data.name",
    "phase.sw.points", "phase.sb.points", "task")
WRONG = ("???", "abc", "[]", "{}", "-1", "0", "null", "1,2", "", "${nope}", "${", "[[]]", "1.5", "nan")
# fmt: on


def words_of(draw: random.Random, options: list[str]) -> list[str]:
    """A list of options: a quick run, and one to four words that are drawn."""
    made = [*QUICK, f"task={draw.choice(TASKS)}"]
    if draw.random() < 0.03:
        made = []
    for _ in range(draw.choice((1, 1, 1, 2, 2, 3, 4))):
        new = list(draw.choice(FLAGS)) if draw.random() < 0.12 else [_word(draw, options)]
        place = draw.choice((len(made), len(made), len(made), 0, draw.randint(0, len(made))))
        made[place:place] = new
    if draw.random() < 0.25:
        made.insert(draw.choice((0, 0, 0, len(made), draw.randint(0, len(made)))), "-m")
    return made


def _word(draw: random.Random, options: list[str]) -> str:
    name = draw.choice(options) if draw.random() < 0.75 else draw.choice(HYDRAS)
    if draw.random() < 0.1:
        name = _misspell(draw, name)
    if draw.random() < 0.03:
        name += draw.choice((".x", ".", "..a", "@pkg", "@_global_", "[0]", ".0", ".name", ":3", " "))
    kinds = [NUMBERS, WORDS, NESTED, INSIDE, SWEEPS]
    value = draw.choice(draw.choices(kinds, (30, 22, 22, 12, 14))[0])
    if ("_target_" in name or name.startswith("statistics")) and draw.random() < 0.8:
        value = draw.choice(FUNCTIONS)
    if name in SLOW:
        value = draw.choice(WRONG)
    if draw.random() < 0.04:
        value = "".join(draw.choices("[]{}(),:='\"\\$~+@.-_ \t\n\x1b\x00ab1é\u2028", k=draw.randint(1, 12)))
    front = draw.choices(("", "+", "++", "~", "+++", "-", "--", " "), (78, 6, 6, 5, 1, 1, 1, 2))[0]
    middle = draw.choices(("=", "", "==", " = ", ":", "=="), (92, 3, 1, 2, 1, 1))[0]
    return f"{front}{name}{middle}{value if middle else ''}".replace("\x00", "0" if draw.random() < 0.9 else "")


def _misspell(draw: random.Random, name: str) -> str:
    at = draw.randrange(len(name))
    return draw.choice(
        (name[:at] + name[at + 1 :], name[:at] + draw.choice("xq_.E=+") + name[at:], name.upper(), name[::-1])
    )


def what_is_wrong(code: int, out: str, err: str, folder: Path, words: list[str]) -> str:
    """Nothing, or the first thing that was not as promised."""
    shown = err.strip().replace("\n", " | ")[-300:]
    if code < 0:
        return f"signal {-code}: {shown}"
    if "Traceback" in out + err:
        return f"traceback: {shown}"
    if re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2028\u2029]", err):
        return f"control characters: {err!r}"
    lines = err.splitlines()
    told = [line for line in lines if line.startswith("initlab: ") and len(line) <= LONGEST]
    if len(told) < len(lines) or (code == 2 and len(lines) != 1):
        return f"{len(lines)} lines, the longest of {max(map(len, lines), default=0)} characters: {shown}"
    if code == 2:
        left = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
        return f"left {left}" if left and not out else ""
    if code not in (0, 4):
        return f"exit code {code}: {shown}"
    asked = {"-c", "--cfg", "--info", "-h", "--help", "--hydra-help", "--version", "-sc"}
    whole = [path for path in folder.rglob("run.json") if '"status": "done"' in path.read_text(encoding="utf-8")]
    return "" if whole or asked & set(words) else "exit code 0 and no run"


def cases(count: int, seed: int, folder: Path) -> Iterator[Case]:
    return isolate("options", count, seed, folder)


def attempts(count: int, seed: int, folder: str) -> Iterator[Case]:
    import initlab.job.prepare  # noqa: F401 (what every child needs, imported once)
    from initlab.__main__ import main
    from initlab.job.options import option_names

    options = [
        *option_names(),
        "activation.arguments.x",
        "model._target_",
        "statistics.mine",
        "activation._target_",
    ]
    for number in range(count):
        draw = random.Random(f"{seed} {number}")
        words = words_of(draw, options)
        here = Path(folder, str(number))

        def call(words: list[str] = words) -> int:
            sys.argv = ["initlab", *words]
            return main()

        code, out, err = run_forked(call, here)
        yield Case(f"{seed} {number}: {words!r}", what_is_wrong(code, out, err, here, words))
