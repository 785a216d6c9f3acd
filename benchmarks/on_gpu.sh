#!/usr/bin/env bash
# What is run on a machine with a GPU, a step at a time, each within nine minutes:
#
#   benchmarks/on_gpu.sh tests    the tests with the GPU as torch's default device, and tests/test_cuda.py
#   benchmarks/on_gpu.sh speed    every row of benchmarks/speed.py, eager and compiled
#   benchmarks/on_gpu.sh train    the reference example on all of Fashion-MNIST, over seeds
#   benchmarks/on_gpu.sh study TASK    a task of the study of accuracy, on a GPU and 12 processor cores
#
# Before: nothing is to be installed where torch, einops, pytest, hypothesis, pytest-xdist, pytest-timeout, rich, numpy and
# safetensors are. `train` reads examples/data/fashion-mnist: the four *-ubyte.gz files that Debian's package
# dataset-fashion-mnist has, 31 MB; git ignores them, so bring them along. `study` reads them too, and for MNIST-1D
# runs/study/cache/mnist1d.pt, which any run of the study on a machine with the package mnist1d leaves there.
# After: what is to be kept is in the folder $OUT (runs/gpu if that is not set). Copy speed-cuda.json and gpu-train.jsonl to
# benchmarks/results/; a step that ran out of time then goes on from there. `make gpu-page` writes them into docs/gpu.md.
# study.tar has all of benchmarks/results/study; `benchmarks/study/accuracy.py --page` writes docs/study.md from it.
#
# REHEARSE=1 runs all of it small, on a CPU; its numbers say nothing. (`study` then begins nothing, and needs mnist1d.)
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH=src PYTHONUNBUFFERED=1
python=${PYTHON:-python3} out=${OUT:-runs/gpu} rehearse=${REHEARSE:-}

tests() {
    local how=(--device cuda -n 8 --dist worksteal -o filterwarnings=default)  # its libraries warn as they like
    local others=(--ignore tests/test_cuda.py tests)
    [ -z "$rehearse" ] || how=(--device cpu) others=(tests/test_device.py)
    export TORCHINDUCTOR_COMPILE_THREADS=1  # a process has tests enough to do
    {
        timeout 240 "$python" -m pytest -q -rs -p no:cacheprovider "${how[@]}" tests/test_cuda.py || failed=1
        timeout 290 "$python" -m pytest -q -rs -p no:cacheprovider "${how[@]}" "${others[@]}" || failed=1
    } > >(tee "$out/tests.txt")
    return "${failed:-0}"
}

speed() {
    local how=(--device cuda --seconds 2 --resume --out "$out/speed-cuda.json")
    [ -z "$rehearse" ] || how=(--small 64 --seconds 0.02 --compile --backend eager --out "$out/speed.json")
    timeout 540 "$python" benchmarks/speed.py "${how[@]}"
}

train() {
    local how=(--minutes 8.5 --out "$out/gpu-train.jsonl")
    [ -z "$rehearse" ] || how=(--rehearse --seeds 2 --out "$out/gpu-train.jsonl")
    timeout 540 "$python" benchmarks/gpu_train.py "${how[@]}"
}

study() {
    local how=(--device cuda --jobs 12 --minutes 8.5)
    [ -z "$rehearse" ] || how=(--minutes 0 --results "$out/study")
    timeout 580 "$python" benchmarks/study/accuracy.py --task "$1" --data-dir examples/data/fashion-mnist "${how[@]}"
    tar cf "$out/study.tar" benchmarks/results/study
}

case "${1:-}" in
    tests | speed | train | study) mkdir -p "$out" && "$@" ;;
    *) sed -n '2,/^set/s/^# \{0,1\}//p' "$0" ;;
esac
