#!/usr/bin/env bash
# Runs the step budget and the first kernel experiments; results land in $1 (a folder).
set -u
out=${1:?folder for the results}
export PYTHONUNBUFFERED=1
nvidia-smi --query-gpu=name,driver_version,clocks.sm,temperature.gpu --format=csv,noheader
for k in o down; do for m in 1 16 64; do
  timeout 300 python3 docs/experiments/nf4_int8.py --compile-only --no-int8 --shapes $k --rows $m >"$out/compile_$k$m.log" 2>&1 &
done; done
timeout 300 python3 docs/experiments/nf4_int8.py --compile-only --rows "" >"$out/compile_int8.log" 2>&1 &
wait
grep -h -E "Error|error:" "$out"/compile_*.log | sort | uniq -c | head -20
timeout 200 python3 docs/experiments/step_budget.py --json "$out/step_budget.json" 2>&1 | tee "$out/step_budget.log" | tail -90
timeout 240 python3 docs/experiments/nf4_int8.py --json "$out/nf4_int8.json" 2>&1 | tee "$out/nf4_int8.log" | tail -90
rm -f "$out"/compile_*.log
