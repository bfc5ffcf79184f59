#!/usr/bin/env bash
# Tests and benchmarks on an accelerator, in at most ten minutes, into one file.
#
#     bash benchmarks/accelerator.sh                    # writes accelerator.txt
#     OUT=folder bash benchmarks/accelerator.sh         # writes folder/accelerator.txt
#     WHEELS=folder bash benchmarks/accelerator.sh      # installs these wheels first, from no other place
#     TINY=1 JAX_PLATFORMS=cpu bash benchmarks/accelerator.sh      # a rehearsal at tiny sizes
#
# PYTHON names the interpreter. If a part fails or exceeds its time limit, the file says so, and the others still run.
set -u
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
out=${OUT:-.}
mkdir -p "$out"
file="$out/accelerator.txt"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
# The limits of all parts together are less than this, so that a slow part takes no time from others.
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
}

run() {
  echo "$(date -u +%Y-%m-%d), commit $(git rev-parse --short HEAD 2>/dev/null || echo unknown)${TINY:+, tiny sizes}"
  nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader 2>/dev/null
  if [ -n "${WHEELS:-}" ]; then
    site=$(mktemp -d)
    part 30 "$python" -m pip install -q --no-index --no-deps --no-compile --target "$site" "$WHEELS"/*.whl
    export PYTHONPATH="$PYTHONPATH:$site"
  fi
  part 25 "$python" -c 'import jax, flax, optax; print(jax.__version__, flax.__version__, optax.__version__, jax.devices())'
  if [ -n "${TINY:-}" ]; then
    part 400 "$python" -m pytest -q -m gpu tests/test_accelerator.py -k "bp or noise"
    part 400 "$python" benchmarks/learner_steps.py --widths 10 --batches 1 --seeds 1 2 --rounds 1 --work 1e5 --size 128
    part 200 "$python" benchmarks/tasks_and_lanes.py --width 5 --examples 20 --tasks 12 --lanes 1 2
    part 200 "$python" benchmarks/paper_task.py --width 8 --lanes 2 --examples 60 --parts 3
    part 400 "$python" benchmarks/ppo_overhead.py --seeds 1 --optimizers optax.adam --updates 1 --rounds 1
    part 800 "$python" benchmarks/ppo_and_brax.py --steps 48 --points 3 --evaluated 2 --num-envs 4 --rollout-length 4 \
      --epochs 1 --minibatches 2 --hidden 8 --episode-length 20
  else
    part 85 "$python" -m pytest -q -m gpu tests/test_accelerator.py
    # a. Thirty seeds at width 100 should take at most twice the time of one.
    part 60 "$python" benchmarks/learner_steps.py --widths 100 --batches 1 --seeds 1 30 128 --rounds 3 --work 1e8
    for width in 1000 2000 4000; do
      part 40 "$python" benchmarks/learner_steps.py --widths $width --batches 1 32 --seeds 30 1 --rounds 3 --work 3e9
    done
    # c. Times should be constant over 1,000 tasks. A task of the paper's Permuted MNIST, hence hours for the whole.
    part 25 "$python" benchmarks/tasks_and_lanes.py --tasks 1000 --lanes 30 --examples 20
    part 30 "$python" benchmarks/tasks_and_lanes.py --tasks 10 --lanes 1 8 128 --examples 200
    part 80 "$python" benchmarks/paper_task.py --seconds 70
    # d. 64 seeds of the ant, and Brax's PPO with as many environments as it is made for.
    part 65 "$python" benchmarks/ppo_overhead.py --seeds 1 64 --optimizers optax.adam cbp --updates 1 --rounds 2
    part 80 "$python" benchmarks/ppo_and_brax.py --num-envs 2048 --rollout-length 16 --minibatches 32 --epochs 4 \
      --steps 2000000 --points 2 --evaluated 128
  fi
  echo
  echo "took $SECONDS s in total"
  return $failed
}

run > >(tee "$file") 2>&1
status=$?
wait
exit $status
