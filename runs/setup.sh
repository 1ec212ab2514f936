# Sourced by the other scripts: a virtual environment in .venv with requirements.txt. It needs Python 3.11, pip and
# 4 GB of disk; no root. A second call finds everything in place.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if ! cmp -s requirements.txt .venv/requirements.txt; then
    "${PYTHON:-python3}" -m venv .venv
    .venv/bin/pip install --quiet --disable-pip-version-check -r requirements.txt
    cp requirements.txt .venv/requirements.txt
fi
source .venv/bin/activate
export TRANSFORMERS_VERBOSITY=error TOKENIZERS_PARALLELISM=false
export OMP_WAIT_POLICY=passive         # threads that wait sleep: costs nothing alone, and steps are five times quicker beside other jobs
