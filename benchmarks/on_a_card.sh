#!/usr/bin/env bash
# What to run once an NVIDIA card is there, in under ten minutes: the tests on CUDA, the fused head
# against TRL, Liger and cut-cross-entropy, and the predictions beside what was measured.
#
#     pip install -e ".[test]" liger-kernel cut-cross-entropy && benchmarks/on_a_card.sh
# A step that fails or takes too long does not keep the next from running.
set -u
cd "$(dirname "$0")/.." || exit
python -c 'import torch; print(torch.__version__, torch.cuda.get_device_name())'
timeout 180 pytest -q tests/torch/test_torch_cuda.py -k "not cpu" -m ""
# The 7B rows of results/roofline.csv. Full logits need 47 GiB.
timeout 360 python -m benchmarks.fused --device cuda --rounds 5 \
  --ways matmul_floor full_logits trl liger liger_compiled cut_cross_entropy_exact spoloss
python - <<'PY'
import csv

def rows(name):
    with open(f"benchmarks/results/{name}") as file:
        return list(csv.DictReader(line for line in file if not line.startswith("#")))

predicted = {(row["head"], row["way"]): row for row in rows("roofline.csv") if row["model"] == "7B"}
print("head, way: time over the bare products and GiB, measured; predicted for H200, H100; GiB")
for row in rows("fused_cuda.csv"):
    head = "frozen" if row["frozen"] == "True" else "trained"
    found = predicted.get((head, row["way"]))
    if found and row["of_floor"]:
        gib = float(row["memory_mib"]) / 1024
        print(f"{head}, {row['way']}: {row['of_floor']}, {gib:.2f};", end=" ")
        print(f"{found['h200']}, {found['h100']}; {found['memory_gib']}")
PY
