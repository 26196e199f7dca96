#!/usr/bin/env bash
# Gathers what a bare GPU machine lacks (one that has torch with CUDA, transformers and peft) into a folder to carry there.
#
#     bash benchmarks/gpu/wheels.sh FOLDER [--python 3.12] [--cuda 13.0]
#
# Versions are those of constraints.txt. Of bitsandbytes only the libraries for the CPU and for that CUDA are kept; deepspeed is built
# here without its compiled ops, since it is published as source alone. There, without a network:
#
#     python3 -m pip install --no-index --no-deps --target /tmp/site FOLDER/*.whl
#     PYTHONPATH=/tmp/site bash benchmarks/gpu/run_all.sh
#
# Run it in the repository's root, with PYTHON naming an interpreter that has pip, setuptools and torch (default: .venv/bin/python).

set -euo pipefail
usage="usage: bash benchmarks/gpu/wheels.sh FOLDER [--python 3.12] [--cuda 13.0]"
[ $# -ge 1 ] && [ "${1#-}" = "$1" ] || { echo "$usage" >&2; exit 64; }
folder=$1; shift
version=3.12 cuda=13.0
while [ $# -gt 0 ]; do
    case $1 in
        --python) version=${2:?$usage}; shift 2 ;;
        --cuda) cuda=${2:?$usage}; shift 2 ;;
        *) echo "$usage" >&2; exit 64 ;;
    esac
done
[[ $version =~ ^3\.[0-9]+$ ]] || { echo "--python $version: must be such as 3.12" >&2; exit 64; }
[[ $cuda =~ ^[0-9]+\.[0-9]+$ ]] || { echo "--cuda $cuda: must be such as 13.0" >&2; exit 64; }
[ ! -e "$folder" ] || { echo "$folder is there already: remove it, or name another" >&2; exit 73; }
python=${PYTHON:-.venv/bin/python}
part=$folder.part
rm -rf "$part"; mkdir -p "$part"
trap 'rm -rf "$part"' EXIT

packages=(
    annotated-types bitsandbytes datasets dill einops hjson msgpack multiprocess ninja omegaconf py-cpuinfo pydantic pydantic_core
    typing-inspection xxhash
)
platforms=()
for glibc in 2_17 2_24 2_28; do platforms+=(--platform "manylinux_${glibc}_x86_64"); done
"$python" -m pip --disable-pip-version-check download -q --no-deps --only-binary=:all: -c constraints.txt -d "$part" \
    --implementation cp --python-version "$version" --abi "cp${version/./}" --abi abi3 --abi none \
    "${platforms[@]}" --platform manylinux2014_x86_64 "${packages[@]}"
DS_BUILD_OPS=0 DS_ACCELERATOR=cpu "$python" -m pip --disable-pip-version-check wheel -q --no-deps --no-build-isolation \
    -c constraints.txt -w "$part" deepspeed

"$python" - "$part" "cuda${cuda/./}" <<'PYTHON'
import re
import sys
import zipfile
from pathlib import Path

folder, wanted = Path(sys.argv[1]), sys.argv[2]
(wheel,) = folder.glob("bitsandbytes-*.whl")
library = re.compile(r"bitsandbytes/libbitsandbytes_(\w+)\.(so|dll|dylib)$")
with zipfile.ZipFile(wheel) as source:
    there = {found[1]: found[0] for found in map(library.match, source.namelist()) if found}
    if wanted not in there:
        sys.exit(f"{wheel.name} has no library for {wanted}: it has {', '.join(sorted(there))}")
    left_out = {name for kind, name in there.items() if kind not in ("cpu", wanted)}
    small = wheel.with_suffix(".small")
    with zipfile.ZipFile(small, "w", zipfile.ZIP_DEFLATED) as target:
        for item in source.infolist():
            data = source.read(item)
            if item.filename.endswith(".dist-info/RECORD"):
                lines = data.decode().splitlines(keepends=True)
                data = "".join(line for line in lines if line.partition(",")[0] not in left_out).encode()
            if item.filename not in left_out:
                target.writestr(item, data, zipfile.ZIP_DEFLATED)
small.replace(wheel)
PYTHON

mv "$part" "$folder"
trap - EXIT
(cd "$folder" && du -h -- *.whl && du -sh . | sed 's/\.$/in all/')
