"""Tensors without memory of their own: a wrong address would end the process, so each case has a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
BEGIN = """
import torch, warnings, initlab
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.two_tensor import TwoTensor
torch.manual_seed(0)
x, w = torch.randn(5, 4), torch.randn(4, 4)
model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
"""
END = """
from initlab.errors import UsageError
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    try:
        rows = initlab.measure(model, x)
        said = " ".join(str(one.message) for one in caught)
        names = set(rows["name"])
        print([name for name in ("0", "1", "2") if name not in names and name not in said.replace(",", " ").split()])
    except UsageError as error:
        print("one line" if "\\n" not in str(error) else error)
"""
SHARDED = """
import os, tempfile, torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.device_mesh import init_device_mesh
dist.init_process_group("gloo", init_method=f"file://{tempfile.mkdtemp()}/meet", rank=0, world_size=1)
fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
optimizer = torch.optim.SGD(model.parameters(), 0.1)
with initlab.probe(model, optimizer=optimizer) as p:
    for _ in range(2):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
rows = p.frame()
outputs = rows[rows["part"].eq("") & rows["direction"].eq("forward") & rows["name"].ne("")]
print([] if outputs.groupby("step").size().tolist() == [3, 3] else outputs)
dist.destroy_process_group()
"""
CASES = {
    "a parameter of two tensors": BEGIN + "model[0].weight = nn.Parameter(TwoTensor(w, w))" + END,
    "an input of two tensors": BEGIN + "x = TwoTensor(x, x)" + END,
    "fake tensors": BEGIN + "mode = FakeTensorMode(allow_non_fake_inputs=True)\nmode.__enter__()" + END,
    "meta": BEGIN + "model, x = model.to('meta'), x.to('meta')" + END,
    "jagged": BEGIN + "x = torch.nested.nested_tensor([x[:3], x[3:]], layout=torch.jagged)" + END,
    "fully sharded": BEGIN + SHARDED,
}


FORKED = """
import os, sys
import torch, initlab, torch.distributed.fsdp, torch.distributed.device_mesh, torch.testing._internal.two_tensor
import torch._subclasses.fake_tensor
initlab.measure(torch.nn.Linear(2, 2), torch.ones(1, 2))  # imports what every case needs
for what, code in eval(sys.stdin.read()).items():
    sys.stdout.flush()
    child = os.fork()
    if not child:
        exec(code, {})
        sys.stdout.flush()
        os._exit(0)
    print(f"{what}: {os.waitpid(child, 0)[1]}")
"""


def test_tensors_without_memory_of_their_own_end_no_process() -> None:
    """Every module has rows, or is named in a warning or in one line. One process loads torch, each case has a fork."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(
        [sys.executable, "-c", FORKED], input=repr(CASES), env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-500:]
    lines = done.stdout.splitlines()
    for what in CASES:
        said = lines[lines.index(f"{what}: 0") - 1] if f"{what}: 0" in lines else done.stdout + done.stderr[-500:]
        assert said in ("[]", "one line"), (what, said)
