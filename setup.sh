# Sourced by demo.sh, demo_a2d.sh and test.sh: makes .venv with the packages of requirements.txt, once, and switches to it.
cd "$(dirname "${BASH_SOURCE[0]}")"
if [ ! -e .venv/requirements.txt ]; then
  for python in python3 python3.13 python3.12 python3.11; do  # transformers 5.23 needs 3.11
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && break
    python=
  done
  [ -n "$python" ] || { echo "error: Python 3.11 or newer is needed; install it, then start again." >&2; exit 1; }
  "$python" -m venv .venv || { echo "error: python3 -m venv failed; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
fi
install() {  # the packages of a file, unless they are installed; further arguments go to pip
  cmp -s "$1" ".venv/$1" && return
  echo "installing the packages of $1 into .venv (minutes, once) ..."
  .venv/bin/python -m pip install --quiet --disable-pip-version-check -r "$@"
  cp "$1" ".venv/$1"
}
install requirements.txt
source .venv/bin/activate
GPUS=$(python -c 'import torch; print(torch.cuda.device_count())')
if [ "$GPUS" = 0 ]; then export DS_ACCELERATOR=cpu; fi
