# Sourced by the other scripts: makes a virtual environment in .venv with requirements.txt. It needs Python
# 3.11, pip and 4 GB of disk, but no root. If everything is in place, it only activates it.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if ! cmp -s requirements.txt .venv/requirements.txt; then
    "${PYTHON:-python3}" -m venv .venv
    .venv/bin/pip install --quiet --disable-pip-version-check -r requirements.txt
    cp requirements.txt .venv/requirements.txt
fi
source .venv/bin/activate
export TRANSFORMERS_VERBOSITY=error TOKENIZERS_PARALLELISM=false
# Waiting threads sleep instead of spinning: no cost on a free machine, steps five times faster on a busy one.
export OMP_WAIT_POLICY=passive
