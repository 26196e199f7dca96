#!/usr/bin/env bash
# Everything that needs a GPU, on a bare machine, in under 8 minutes: correctness first, then speed; one table last.
#
#     bash benchmarks/gpu/run_all.sh OUT [--device cpu --tiny]
#
# Run it in the repository's root. python3 needs torch with CUDA, triton, and what setup.py names (on PYTHONPATH will do).
# Every stage has its own time limit, and a stage that fails does not stop the next. JSON and logs go into the folder OUT. The exit
# code is the number of stages that failed. --device cpu --tiny shows that the script itself runs.

set -u
usage="usage: bash benchmarks/gpu/run_all.sh OUT [--device cuda|cpu] [--tiny]"
[ $# -ge 1 ] || { echo "$usage" >&2; exit 64; }
out=$1; shift
device=cuda; tiny=""
while [ $# -gt 0 ]; do
    case $1 in
        --device) device=${2:?$usage}; shift 2 ;;
        --tiny) tiny=--tiny; shift ;;
        *) echo "$usage" >&2; exit 64 ;;
    esac
done
mkdir -p "$out" || exit 73
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
python=${PYTHON:-python3}
failed=0
summary=""

stage() { # name, seconds, command...
    local name=$1 limit=$2 began=$SECONDS code
    shift 2
    echo "== $name (at most $limit s): $*"
    timeout --kill-after=10 "$limit" "$@" 2>&1 | tee "$out/$name.log"
    code=${PIPESTATUS[0]}
    local outcome="$name: passed in $((SECONDS - began)) s"
    if [ "$code" -eq 124 ] || [ "$code" -eq 137 ]; then
        outcome="$name: FAILED: stopped after $limit s"
    elif [ "$code" -ne 0 ]; then
        outcome="$name: FAILED with exit code $code after $((SECONDS - began)) s (see $name.log)"
    fi
    [ "$code" -eq 0 ] || failed=$((failed + 1))
    summary+="$outcome"$'\n'
    echo "== $outcome"
}

gate_options=()
[ -n "$tiny" ] && gate_options=(--rounds 2 --no-compile)

visible="import torch; assert torch.cuda.is_available(), 'no CUDA device'; print(torch.cuda.get_device_name(), torch.__version__)"
[ "$device" = cuda ] && stage device 60 "$python" -c "$visible"
stage correctness 170 "$python" -m pytest -q -m gpu -p no:cacheprovider tests/gpu tests/kernels
stage gate 100 "$python" -m benchmarks.gate --device "$device" "${gate_options[@]}" --out "$out/gate.json"
stage large 200 "$python" -m benchmarks.gpu.large --device "$device" $tiny --out "$out/large.json"

echo
echo "== summary"
printf '%s' "$summary"
grep -E 'passed|failed|skipped' "$out/correctness.log" | tail -1
grep -E 'us:|tensors moved' "$out/gate.log"
grep -E 'samples/s|^(bf16|nf4) ' "$out/large.log"
exit "$failed"
