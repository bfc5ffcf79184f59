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
end=$((SECONDS + ${SECONDS_IN_ALL:-570}))
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
    part 60 "$python" -m pip install -q --no-index --no-deps --no-compile --target "$site" "$WHEELS"/*.whl
    export PYTHONPATH="$PYTHONPATH:$site"
  fi
  part 60 "$python" -c 'import jax, flax, optax; print(jax.__version__, flax.__version__, optax.__version__, jax.devices())'
  if [ -n "${TINY:-}" ]; then
    part 200 "$python" -m pytest -q -m gpu tests/test_accelerator.py -k "bp or noise"
    part 100 "$python" benchmarks/learner_steps.py --widths 10 --batches 1 --seeds 1 2 --rounds 1 --work 1e5 --size 128
    part 100 "$python" benchmarks/tasks_and_lanes.py --width 5 --examples 20 --tasks 12 --lanes 1 2
    part 100 "$python" benchmarks/tasks_and_lanes.py --width 8 --examples 20 --tasks 2 --lanes 2
    part 280 "$python" benchmarks/ppo_overhead.py --seeds 1 --optimizers optax.adam --updates 1 --rounds 1
  else
    part 120 "$python" -m pytest -q -m gpu tests/test_accelerator.py
    # a. Thirty seeds at width 100 should take at most twice the time of one.
    part 90 "$python" benchmarks/learner_steps.py --widths 100 --batches 1 --seeds 1 30 128 --rounds 3 --work 1e8
    part 100 "$python" benchmarks/learner_steps.py --widths 1000 2000 --batches 1 32 --seeds 1 30 --rounds 3 --work 3e9 \
      --learners sgd cbp upgd
    # c. Times should be constant over 1,000 tasks. A tenth of a task of the paper's Permuted MNIST with thirty seeds.
    part 60 "$python" benchmarks/tasks_and_lanes.py --tasks 1000 --lanes 30 --examples 20
    part 60 "$python" benchmarks/tasks_and_lanes.py --tasks 10 --lanes 1 8 128 --examples 200
    part 90 "$python" benchmarks/tasks_and_lanes.py --width 2000 --lanes 30 --examples 6000 --tasks 2
    # d. 64 seeds of the ant.
    part 160 "$python" benchmarks/ppo_overhead.py --seeds 1 64 --optimizers optax.adam cbp --updates 1 --rounds 2
  fi
  echo
  echo "took $SECONDS s in total"
  return $failed
}

run > >(tee "$file") 2>&1
status=$?
wait
exit $status
