#!/usr/bin/env bash
# Everything that needs a GPU, on a bare machine: correctness first, then speed, what compiles for minutes last.
#
#     bash benchmarks/gpu/run_all.sh                        all stages, as many as begin and end within --budget
#     bash benchmarks/gpu/run_all.sh --from large           that one and those after it
#     bash benchmarks/gpu/run_all.sh first large            these alone
#     bash benchmarks/gpu/run_all.sh --list                 the stages and their limits
#     bash benchmarks/gpu/run_all.sh --device cpu --tiny --out FOLDER        shows that the script itself runs
#
# Run it in the repository's root; benchmarks/gpu/wheels.sh gathers what such a machine lacks. Imports and the GPU are tried first, and all
# that is missing is named. Every stage has its own limit, after which it is interrupted, so that it prints its summary, and killed 20 s
# later; one that fails does not stop the next. Logs and JSON go into benchmarks/results/gpu/CARD, or --out.
#
# Exit code: 0 all passed, 1 a stage failed, 64 usage, 69 no GPU or a package is missing, 75 stages are left for another call.

set -u
usage="usage: bash benchmarks/gpu/run_all.sh [STAGE...] [--from STAGE] [--list] [--out FOLDER] [--device cuda|cpu] [--tiny] [--budget SECONDS] [--limit SECONDS]"
names=(first packed gate training large large-cudnn deterministic flex gate-speed)
declare -A limits=([first]=60 [packed]=120 [gate]=120 [training]=180 [large]=200 [large-cudnn]=150 [deterministic]=120 [flex]=240 [gate-speed]=120)
ready=60 # seconds for imports and the GPU's first use
stop_usage() { echo "${1:-$usage}" >&2; exit 64; }

out="" device=cuda tiny="" budget=590 limit="" from="" list=""
wanted=()
while [ $# -gt 0 ]; do
    case $1 in
        --from) from=${2:?$usage}; shift 2 ;;
        --out) out=${2:?$usage}; shift 2 ;;
        --device) device=${2:?$usage}; shift 2 ;;
        --budget) budget=${2:?$usage}; shift 2 ;;
        --limit) limit=${2:?$usage}; shift 2 ;; # of every stage, in place of its own
        --tiny) tiny=--tiny; shift ;;
        --list) list=1; shift ;;
        -*) stop_usage ;;
        *) wanted+=("$1"); shift ;;
    esac
done
for name in "${wanted[@]}" $from; do
    [ -n "${limits[$name]:-}" ] || stop_usage "no stage $name: there are ${names[*]}"
done
[[ $budget$limit =~ ^[0-9]+$ ]] || stop_usage
[ "$device" = cuda ] || [ "$device" = cpu ] || stop_usage
[ -z "$from" ] || [ ${#wanted[@]} -eq 0 ] || stop_usage "--from $from: goes with no names of stages"
if [ ${#wanted[@]} -eq 0 ]; then
    for name in "${names[@]}"; do
        if [ -z "$from" ] || [ "$name" = "$from" ] || [ ${#wanted[@]} -gt 0 ]; then wanted+=("$name"); fi
    done
fi
if [ -n "$list" ]; then
    for name in "${wanted[@]}"; do printf '%-14s at most %4d s\n' "$name" "${limit:-${limits[$name]}}"; done
    exit 0
fi
[ "$device" = cuda ] || [ -n "$out" ] || stop_usage "--device cpu: name a folder with --out, since its figures are no GPU's"

export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
python=${PYTHON:-python3}
timeout --kill-after=20 "$ready" "$python" -m benchmarks.gpu.ready --device "$device" || exit 69
[ -n "$out" ] || out=benchmarks/results/gpu/$("$python" -m benchmarks.gpu.ready --card)
mkdir -p "$out" || exit 73

failed=0
summary=""
run_stage() { # name, command...
    local name=$1 most=${limit:-${limits[$1]}} began=$SECONDS code
    shift
    echo "== $name (at most $most s): $*"
    timeout --signal=INT --kill-after=20 "$most" "$@" 2>&1 | tee "$out/$name.log"
    code=${PIPESTATUS[0]}
    local outcome="$name: passed in $((SECONDS - began)) s"
    if [ "$code" -eq 124 ] || [ "$code" -eq 137 ]; then
        outcome="$name: FAILED: stopped after $most s"
    elif [ "$code" -ne 0 ]; then
        outcome="$name: FAILED with exit code $code after $((SECONDS - began)) s (see $name.log)"
    fi
    [ "$code" -eq 0 ] || failed=1
    summary+="$outcome"$'\n'
    echo "== $outcome"
}

tests=("$python" -m pytest -q -n 6 -m gpu -p no:cacheprovider)
on=(--device "$device")
run_named() {
    case $1 in
        first) run_stage "$1" "$python" -m benchmarks.gpu.first_gpu "${on[@]}" $tiny --out "$out/first.json" ;;
        packed) run_stage "$1" "${tests[@]}" tests/gpu/test_packed_gpu.py tests/gpu/test_losses_gpu.py -k "not flex" ;;
        gate) run_stage "$1" "${tests[@]}" tests/gpu/test_gate_cuda.py ;;
        training) run_stage "$1" "${tests[@]}" tests/gpu/test_gpu.py ;;
        large) run_stage "$1" "$python" -m benchmarks.gpu.large "${on[@]}" $tiny --column ours --out "$out/large.json" ;;
        large-cudnn) run_stage "$1" "$python" -m benchmarks.gpu.large "${on[@]}" $tiny --column ours --precision nf4 --cudnn --out "$out/large-cudnn.json" ;;
        deterministic) run_stage "$1" "$python" -m benchmarks.gpu.deterministic "${on[@]}" $tiny --out "$out/deterministic.json" ;;
        flex) run_stage "$1" "${tests[@]}" tests/gpu/test_packed_gpu.py tests/gpu/test_losses_gpu.py -k flex ;;
        gate-speed) run_stage "$1" "$python" -m benchmarks.gate "${on[@]}" ${tiny:+--rounds 2 --no-compile} --out "$out/gate.json" ;;
    esac
}

left=()
for name in "${wanted[@]}"; do
    if [ ${#left[@]} -gt 0 ] || [ $((SECONDS + ${limit:-${limits[$name]}})) -gt "$budget" ]; then
        left+=("$name")
    else
        run_named "$name"
    fi
done

echo
echo "== summary"
printf '%s' "$summary"
for name in "${wanted[@]}"; do
    if [ -f "$out/$name.log" ]; then grep -hE '^[^ ].*(passed|failed|skipped)|us:|tensors moved|samples/s|^(bf16|nf4) |same bits|OTHER BITS|a new shape' "$out/$name.log" | tail -12; fi
done
[ ${#left[@]} -eq 0 ] || echo "== left for another call: bash benchmarks/gpu/run_all.sh ${left[*]}"
[ "$failed" -eq 0 ] || exit 1
[ ${#left[@]} -eq 0 ] || exit 75
