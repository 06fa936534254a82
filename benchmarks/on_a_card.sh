#!/usr/bin/env bash
# What to run once an NVIDIA card is there, in under ten minutes: the tests on CUDA, the fused head
# against TRL, Liger and cut-cross-entropy, and the predictions beside what was measured.
#
#     pip install -e ".[test]" liger-kernel cut-cross-entropy && benchmarks/on_a_card.sh
set -euo pipefail
cd "$(dirname "$0")/.."
python -c 'import torch; print(torch.__version__, torch.cuda.get_device_name())'
timeout 180 pytest -q tests/torch/test_torch_cuda.py tests/torch/test_torch_fused.py -k "cuda or compiled" -m ""
# The 7B rows of results/roofline.csv. Full logits need 47 GiB.
timeout 360 python -m benchmarks.fused --device cuda --rounds 5 \
  --ways matmul_floor full_logits trl liger liger_compiled cut_cross_entropy_exact spoloss
python - <<'PY'
import csv

def rows(name):
    with open(f"benchmarks/results/{name}") as file:
        return list(csv.DictReader(line for line in file if not line.startswith("#")))

predicted = {(row["head"], row["way"]): row for row in rows("roofline.csv") if row["model"] == "7B"}
print("head, way: measured over the bare products, predicted for H200 and H100")
for row in rows("fused_cuda.csv"):
    head = "frozen" if row["frozen"] == "True" else "trained"
    found = predicted.get((head, row["way"]))
    if found and row["of_floor"]:
        print(f"{head}, {row['way']}: {row['of_floor']}, {found['h200']} and {found['h100']}")
PY
