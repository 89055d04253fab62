#!/usr/bin/env bash
# What must be known of initlab on a GPU, in order of worth; about 6 minutes on an H100. Run in the repository's root.
# Results go to $OUT. Every step has its own limit, and a failure stops no other. Rehearse it anywhere with DEVICE=cpu:
# fewer networks and steps, tests collected and not run, and benchmarks that say that there is no GPU.
set -u
: "${OUT:=gpu-results}" "${DEVICE:=cuda}" "${PYTHON:=python3}" "${BUDGET:=480}"
if [ "$DEVICE" = cpu ]; then networks=16 steps=5 collected=--collect-only timed=(gpu --quick)
else networks=1024 steps=100 collected= timed=(gpu --device "$DEVICE" --json "$OUT/gpu.json"); fi
mkdir -p "$OUT"; runs=$(mktemp -d); log="$OUT/log.txt"; begun=$SECONDS
export PYTHONPATH="${PYTHONPATH:+$PYTHONPATH:}$PWD" PYTHONUNBUFFERED=1 MPLBACKEND=Agg HYDRA_FULL_ERROR=1 PYTHON DEVICE runs
step() { # name, limit in seconds, command
  local name=$1 limit=$2 left=$((BUDGET - SECONDS + begun)); shift 2
  [ "$left" -lt 10 ] && { echo "$name: skipped, $left s left" | tee -a "$log"; return; }
  local from=$SECONDS; echo "=== $name" >> "$log"
  timeout -k 5 "$((limit < left ? limit : left))" "$@" >> "$log" 2>&1
  echo "$name: exit $?, $((SECONDS - from)) s" | tee -a "$OUT/summary.txt" "$log"
}
"$PYTHON" -c "import sys, torch; print(sys.version.split()[0], torch.__version__, torch.cuda.get_device_name() if torch.cuda.is_available() else 'no GPU')" | tee "$OUT/summary.txt"
step "main job, first run" 120 "$PYTHON" -m initlab init=kaiming device="$DEVICE" hydra.run.dir="$runs/first"
step "main job" 60 "$PYTHON" -m initlab init=kaiming device="$DEVICE" hydra.run.dir="$runs/device"
step "main job on the CPU" 60 "$PYTHON" -m initlab init=kaiming device=cpu hydra.run.dir="$runs/cpu"
step "the same networks on both" 60 "$PYTHON" - <<'PY'
import os, initlab
keys = ["stage", "implementation", "seed", "step", "layer", "tensor", "direction"]
a, b = (initlab.read(os.environ["runs"] + f"/{name}").set_index(keys) for name in ("device", "cpu"))
both = a.add_suffix("_a").join(b.add_suffix("_b"), how="inner")
stack = both[both.index.get_level_values("stage") == "stack"]
print("rows", len(a), len(b), len(both), "of the stack", len(stack))
for name in ("std", "mean", "std_within", "cosine", "frac_dead"):
    print(name, "largest difference over the rms", float(((stack[name + "_a"] - stack[name + "_b"]).abs() / stack["rms_b"]).max()))
PY
step "where float32 std is not finite" 30 "$PYTHON" - <<'PY'
import os, torch
for relu in (False, True):
    torch.manual_seed(0)
    x, first = torch.randn(200, 100).to(os.environ["DEVICE"]), {}
    for layer in range(1, 51):
        x = x @ torch.randn(100, 100).to(x.device)
        x = x.clamp_min(0) if relu else x
        rms = x.double().square().mean().sqrt()
        for name, value in (("std", x.std()), ("rms in float64", rms), ("activations", (x * 0).sum())):
            if not value.isfinite():
                first.setdefault(name, layer)
    print("relu" if relu else "linear", "first layer where it is not finite:", first)
PY
step "tests marked gpu" 200 "$PYTHON" -m pytest -q -m gpu -n 4 $collected --tb=short --maxfail=50 -p no:cacheprovider -p no:benchmark
step "benchmarks" 150 "$PYTHON" -m benchmarks "${timed[@]}"
step "many networks" 60 "$PYTHON" -m initlab task=stack init=kaiming seeds="$networks" device="$DEVICE" generator=philox theory=off plots=false hydra.run.dir="$runs/many"
step "fifty layers trained" 90 "$PYTHON" -m initlab task=train train.depth=50 train.width=100 train.steps="$steps" device="$DEVICE" plots=false theory=off hydra.run.dir="$runs/deep"
step "four rules" 120 "$PYTHON" -m initlab -m init=naive,small,lecun,kaiming train.steps="$steps" device="$DEVICE" hydra.sweep.dir="$runs/four"
cp "$runs/device/activation_std.png" "$runs/device/run.json" "$OUT/" 2>/dev/null
rm -rf "$runs"; cat "$OUT/summary.txt"
