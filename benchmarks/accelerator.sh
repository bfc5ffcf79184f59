#!/usr/bin/env bash
# Tests and benchmarks on an accelerator, in at most ten minutes, into one file.
#
#     bash benchmarks/accelerator.sh                    # writes accelerator.txt
#     OUT=folder bash benchmarks/accelerator.sh         # writes folder/accelerator.txt
#     TINY=1 JAX_PLATFORMS=cpu bash benchmarks/accelerator.sh      # a rehearsal at tiny sizes, on any machine
#
# For a machine without network, on which jax, flax, optax, chex and pytest are installed:
#
#     bash benchmarks/accelerator.sh download wheels    # where there is a network, for the same Python and platform
#     WHEELS=wheels bash benchmarks/accelerator.sh      # there; installs these wheels first, for this run alone
#
# PYTHON names the interpreter. The most important parts come first. If one fails or exceeds its time limit, the file says
# so, and the others still run.
set -u
python=${PYTHON:-python3}
here=$(cd "$(dirname "$0")/.." && pwd)
if [ "${1:-}" = download ]; then
  # What Brax and the tests import beyond the above. Without `--no-deps` pip would add a jax for CPUs.
  "$python" -m pip download -q --no-deps -c "$here/constraints.txt" -d "${2:?folder for the wheels}" \
    brax jaxopt ml_collections mujoco mujoco-core mujoco-mjx tensorboardX trimesh etils absl-py pillow hypothesis sortedcontainers
  exit
fi
out=$(mkdir -p "${OUT:-.}" && cd "${OUT:-.}" && pwd) || exit
wheels=${WHEELS:+$(cd "$WHEELS" && pwd)} || exit
file="$out/accelerator.txt"
cd "$here" || exit
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
in_all=570
[ -z "${TINY:-}" ] || in_all=3000 # a rehearsal compiles on a CPU
end=$((SECONDS + ${SECONDS_IN_ALL:-$in_all}))
failed=0

# part SECONDS COMMAND...
part() {
  local limit=$1 left=$((end - SECONDS)) start=$SECONDS
  shift
  if ((left < limit)); then limit=$left; fi
  echo
  echo "$ $*"
  if ((limit < 1)); then
    echo "left out: no time is left"
    failed=1
    return
  fi
  timeout "$limit" "$@" 2>&1
  local status=$?
  if ((status)); then
    failed=1
    echo "ended with status $status$( ((status == 124)) && echo ", because it took longer than $limit s")"
  fi
  echo "took $((SECONDS - start)) s"
  return $status
}

versions='
import sys, jax, flax, optax
print("jax", jax.__version__, "flax", flax.__version__, "optax", optax.__version__, jax.devices())
sys.exit(jax.default_backend() == "cpu" and not sys.argv[1:] and "no accelerator; TINY=1 rehearses on a CPU")
'

run() {
  echo "$(date -u +%Y-%m-%d), commit $(git rev-parse --short HEAD 2>/dev/null || echo unknown)${TINY:+, tiny sizes}"
  nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader 2>/dev/null
  if [ -n "$wheels" ]; then
    site=$(mktemp -d)
    part 30 "$python" -m pip install -q --no-index --no-deps --no-compile --target "$site" "$wheels"/*.whl
    export PYTHONPATH="$PYTHONPATH:$site"
  fi
  part 40 "$python" -c "$versions" ${TINY:+tiny} || return
  if [ -n "${TINY:-}" ]; then
    part 400 "$python" -m pytest -q -m gpu tests/test_accelerator.py -k "bp or noise"
    part 400 "$python" benchmarks/learner_steps.py --mode vmap --widths 10 --batches 1 --seeds 1 2 --rounds 1 \
      --work 1e5 --size 128
    part 200 "$python" benchmarks/paper_task.py --mode vmap --width 8 --lanes 2 --examples 60 --parts 3
    part 600 "$python" benchmarks/ppo_overhead.py --seeds 2 --optimizers cbp --updates 1 --rounds 1
    part 200 "$python" benchmarks/tasks_and_lanes.py --mode vmap --width 5 --examples 20 --tasks 12 --lanes 1 2
    part 800 "$python" benchmarks/ppo_and_brax.py --steps 48 --points 3 --evaluated 2 --num-envs 4 --rollout-length 4 \
      --epochs 1 --minibatches 2 --hidden 8 --episode-length 20
  else
    part 100 "$python" -m pytest -q -m gpu tests/test_accelerator.py
    # Thirty seeds at width 100 should take at most twice the time of one.
    part 60 "$python" benchmarks/learner_steps.py --widths 100 --batches 1 --seeds 1 30 128 --rounds 3 --work 1e8
    # A task of the paper's Permuted MNIST with thirty seeds, hence hours for the whole.
    part 80 "$python" benchmarks/paper_task.py --seconds 70
    # 64 seeds of the ant.
    part 65 "$python" benchmarks/ppo_overhead.py --seeds 1 64 --optimizers optax.adam cbp --updates 1 --rounds 2
    # Times should be constant over 1,000 tasks.
    part 25 "$python" benchmarks/tasks_and_lanes.py --tasks 1000 --lanes 30 --examples 20
    part 40 "$python" benchmarks/learner_steps.py --widths 1000 --batches 1 32 --seeds 30 1 --rounds 3 --work 3e9
    # Brax's PPO with as many environments as it is made for.
    part 80 "$python" benchmarks/ppo_and_brax.py --num-envs 2048 --rollout-length 16 --minibatches 32 --epochs 4 \
      --steps 2000000 --points 2 --evaluated 128
    for width in 2000 4000; do
      part 40 "$python" benchmarks/learner_steps.py --widths $width --batches 1 32 --seeds 30 1 --rounds 3 --work 3e9
    done
    part 30 "$python" benchmarks/tasks_and_lanes.py --tasks 10 --lanes 1 8 128 --examples 200
  fi
  echo
  echo "took $SECONDS s in total"
}

run > >(tee "$file") 2>&1 || failed=1
wait
exit $failed
