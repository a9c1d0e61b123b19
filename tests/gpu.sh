#!/bin/sh
# Checks that need a CUDA device, in eight minutes at most. It writes a JSON:
#   sh tests/gpu.sh [gpu.json]
# Run it in the root of the repository. It has not run anywhere yet.
set -u
out=${1:-gpu.json}
if ! python -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then
    echo "gpu.sh: PyTorch finds no CUDA device here, so there is nothing to check" >&2
    exit 3
fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
timeout 210 python -m pytest -q -m cuda tests >"$work/tests.txt" 2>&1
echo $? >"$work/tests.rc"
tail -n 3 "$work/tests.txt"
timeout 60 python tests/two_streams.py >"$work/streams.txt" 2>&1
echo $? >"$work/streams.rc"
cat "$work/streams.txt"
timeout 180 python -m optgen bench --data digits --repeats 1 --only elbo --out "$work/bench.json" \
    >"$work/bench.txt" 2>&1
echo $? >"$work/bench.rc"
tail -n 5 "$work/bench.txt"
python - "$work" "$out" <<'END'
import json
import sys
from pathlib import Path

import torch

work, out = map(Path, sys.argv[1:])
parts = ("tests", "streams", "bench")
codes = {part: int((work / f"{part}.rc").read_text()) for part in parts}
lines = {part: (work / f"{part}.txt").read_text().splitlines()[-20:] for part in parts}
found = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "exit_codes": codes}
found["last_lines"] = lines
bench = work / "bench.json"
found["bench"] = json.loads(bench.read_text()) if bench.exists() else None
out.write_text(json.dumps(found, indent=1) + "\n")
print(f"{out}: {', '.join(f'{part} {code}' for part, code in codes.items())}")
sys.exit(any(codes.values()))
END
