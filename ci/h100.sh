#!/usr/bin/env bash
# Tune, verify and time the fused layer on a machine with an NVIDIA GPU, in one go: `ci/h100.sh FOLDER [tune seconds]`.
# Tunes the points where the stored readings are behind the stored peers; the rest of the table stays as it is.
# Needs torch, Triton and this project's other dependencies in `python3`; installs nothing. Results go to FOLDER, and the
# table to optimized/plans_sm90.json. Each part has its own limit, so that a late failure loses nothing of what came before.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
folder=${1:?usage: ci/h100.sh FOLDER [tune seconds]}
tune_seconds=${2:-100}
mkdir -p "$folder"

# Candidates are found by entry points. Where the project is not installed, this names them for this run only.
names=$(mktemp -d)
mkdir "$names/moeproof-0.dist-info"
printf 'Metadata-Version: 2.1\nName: moeproof\nVersion: 0\n' >"$names/moeproof-0.dist-info/METADATA"
printf '[moeproof.candidates]\noptimized = moeproof.optimized.candidates:candidates\n' >"$names/moeproof-0.dist-info/entry_points.txt"
export PYTHONPATH=src:$names OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE=1
peers=docs/results/h100-peers.csv

echo "== tune"
timeout $((tune_seconds + 60)) python3 -m moeproof tune triton-fused --seconds "$tune_seconds" \
    --weak docs/results/bench-h100.json --peers "$peers" --below 0.985 \
    --output optimized/plans_sm90.json --trace "$folder/tune-trace.json" 2>&1 | tee "$folder/tune.log" | tail -40
cp optimized/plans_sm90.json "$folder/" 2>/dev/null

echo "== bench"
timeout 150 python3 -m moeproof bench triton-fused torch-grouped --peers "$peers" --seconds 0.1 \
    --output "$folder/bench-h100.json" --json >"$folder/bench.jsonl" 2>"$folder/bench.txt"
grep -E 'triton-fused' "$folder/bench.txt" | cut -c1-150

echo "== every plan of the table"
timeout 120 python3 ci/every_plan.py --only table --jobs 14 --output "$folder/every-plan-h100.json" 2>&1 | tail -20

echo "== stages"
timeout 40 python3 -m moeproof bench triton-fused --model qwen3 --tokens 16 --tokens 1024 --tokens 4096 --tokens 16384 \
    --routing uniform --seconds 0.05 --stages --output "$folder/stages-h100.json" --json >/dev/null 2>&1
python3 - "$folder/stages-h100.json" <<'END'
import json, sys
for r in json.load(open(sys.argv[1]))["readings"]:
    print(r["model"], r["M"], round(r.get("us", 0), 1), {k[:24]: round(v, 1) for k, v in r.get("kernels", {}).items()}, r.get("reason", ""))
END
