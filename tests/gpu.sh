#!/usr/bin/env bash
# What only a GPU can show, on one, in TOTAL seconds: tests/test_cuda.py, the step of remix_m, memory against dry_run's
# figure, and a full-size model's artifact scored and proven. Needs neither network nor data.
#
#   tests/gpu.sh
#   UPSTREAM=train_gpt_M.py tests/gpu.sh   # beside that script of github.com/flukeskywalker/modded-nanogpt-remixed
#   PARTS="slowrun" tests/gpu.sh           # some of the parts
#   TESTS="out_of_memory" tests/gpu.sh     # those of the tests that pytest's -k finds
#   BENCH="--profiled 0" tests/gpu.sh      # more flags of tests/bench_gpu.py
#
# In OUT lie: all.txt, the ends of all parts; parts.txt, all that they said; tests.txt, all that the tests said, those
# that fail last; figures.jsonl, a line a bench; machine.txt; remix_m.json.gz, the trace of a step. A part that fails, or
# takes longer than it may, stops no other. Without a GPU the parts run as far as they go, on_cpu: to see that the script
# works.
set -u
cd "$(dirname "$0")/.."
OUT=$(realpath -m "${OUT:-logs/gpu}") TOTAL=${TOTAL:-600} UPSTREAM=${UPSTREAM:-} TESTS=${TESTS:-} BENCH=${BENCH:-}
PARTS=${PARTS:-tests score prepare remix_m golf centering slowrun}
PY=${PY:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
WORK=$(mktemp -d)
mkdir -p "$OUT" "$WORK/tests"
trap 'rm -rf "$WORK"' EXIT
export OUT PY WORK PARTS TESTS BENCH TOKENIZERS_PARALLELISM=false PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
export TORCHINDUCTOR_CACHE_DIR=$WORK/compiled
export PYTHONUNBUFFERED=1  # what is killed has said what it knew
export NCCL_SOCKET_IFNAME=lo NCCL_IB_DISABLE=1  # one process: it speaks to nobody
LAYER=() STEPS=25 BATCH=(--batch_tokens 65536 --micro_tokens 16384)
if ! $PY -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then LAYER=(on_cpu) STEPS=3 BATCH=(); fi

wanted() { [[ " $PARTS " = *" $1 "* ]]; }

part() {  # part NAME SECONDS COMMAND...: run it, for no longer than is left
  local name=$1 limit=$2 left=$((TOTAL - SECONDS - 5)) began=$SECONDS code; shift 2
  wanted "$name" || return
  limit=$((limit < left ? limit : left))
  if [ "$limit" -lt 5 ]; then echo "== $name: no time left"; return; fi
  timeout -s KILL "$limit" "$@" > "$WORK/$name.txt" 2>&1
  code=$?
  cat "$WORK/$name.txt" >> "$OUT/parts.txt"
  { echo "== $name: exit code $code after $((SECONDS - began)) s of $limit (at $SECONDS s)"
    grep -v "Warning\|warnings.warn" "$WORK/$name.txt" | tail -n "${LINES_OF:-25}" | cut -c 1-300; } | tee -a "$OUT/all.txt"
}

bench() {  # bench PRESET SHARE MORE...
  local preset=$1 share=$2; shift 2
  $PY tests/bench_gpu.py "$preset" "${LAYER[@]}" --share "$share" --steps "$STEPS" --json "$OUT/figures.jsonl" "$@" $BENCH
}

# One of eight processes of upstream's run, alone: the same tokens a step, no collective with others, no evaluation (our
# steps have none, either), times with fractions of a millisecond, the device waited for every 20 steps.
THEIRS=()
if [ -n "$UPSTREAM" ]; then
  THEIRS=(--against "$UPSTREAM"
    --replace 'assert world_size == 8=>assert world_size == 1'
    --replace 'num_iterations = 2500=>num_iterations = 81'
    --replace 'val_loss_every = 125=>val_loss_every = 0'
    --replace 'if last_step or (args=>if (args'
    --replace 'last_step = (step == train_steps)=>last_step = step == train_steps; step % 20 or torch.cuda.synchronize()'
    --replace 'train_time:{approx_training_time_ms:.0f}=>train_time:{approx_training_time_ms:.3f}'
    --replace 'print0(nvidia_smi())=>pass')
fi
remix_m() { bench remix_m 8 "${THEIRS[@]}" "$@"; }
golf() { bench golf_progressive 8 --at 1 "$@"; }
centering() { bench centering_221m 4 --at 1 "$@"; }
slowrun() { bench slowrun_1h 8 --at 1 --steps 3 --settle 1 --profiled 0 --flags="--compile 1 --meta_groups 1"; }
chunked="--loss_chunk 16384" gram="--polar_gram 3"

tests() {  # each in a process of its own, several at once: what they say depends on no time
  export OMP_NUM_THREADS=2 TORCHINDUCTOR_COMPILE_THREADS=4
  one() {
    $PY -m pytest -v -s --tb=short --durations=2 -p no:cacheprovider --basetemp "$WORK/tests-$$" "$@" \
      > "$WORK/tests/$$.txt" 2>&1
  }
  many() { xargs -r -d '\n' -P "$1" -n "$2" bash -c "$(declare -f one)"'; one "$@"' bash; }
  $PY -m pytest --collect-only -q -k "$TESTS" tests/test_cuda.py | grep :: > "$WORK/ids"
  grep artifact_decodes "$WORK/ids" | many 2 1 &
  grep rows_of_65536 "$WORK/ids" | many 1 4 &
  grep -v "artifact_decodes\|rows_of_65536" "$WORK/ids" | many 6 2 &
  wait
}

said_by_tests() {  # the end of each that failed or was killed, then one line of each process
  cd "$WORK/tests" || return
  local ended="[0-9]+ (passed|failed|skipped)" text
  grep -lE "[0-9]+ (passed|skipped)" *.txt | xargs -r grep -LE "[0-9]+ (failed|error)" > "$WORK/good"
  ls | grep -vxFf "$WORK/good" > "$WORK/bad"
  (xargs -r cat < "$WORK/good"; xargs -r cat < "$WORK/bad") > "$OUT/tests.txt"
  for text in $(cat "$WORK/bad"); do
    grep -qE "$ended" "$text" || echo "== killed:"
    tail -n 60 "$text" | cut -c 1-1000
  done
  cat *.txt | grep -E "^(FAILED|ERROR)|$ended" | cut -c 1-300
}

score() {  # the whole model, hardly trained: is its artifact written, scored and decoded?
  $PY data/get.py sample &&
    $PY train_gpt.py --config golf_progressive "${LAYER[@]}" --run golf --log_dir "$WORK" --data data/sample \
      --tokenizer data/sample/tokenizer.model --compile 0 --steps "$STEPS" --max_seconds 0 "${BATCH[@]}" &&
    $PY logs/score.py "$WORK/golf" --modes sliding --prove_bytes 2000
}

prepare() {  # what the parts that are timed compile: they find it in the compiler's cache
  wanted golf && golf --prepare &
  wanted remix_m && bench remix_m 8 --flags="$chunked" --prepare && bench remix_m 8 --flags="$gram" --prepare &
  for name in remix_m centering; do wanted $name && $name --prepare; done
  wait
}

export -f wanted bench remix_m golf centering slowrun tests score prepare
call() {  # call NAME SECONDS FUNCTION: a part that is one of the functions above
  part "$1" "$2" bash -c "$(declare -p LAYER STEPS BATCH THEIRS chunked gram); $3"
}

rm -f "$OUT"/*.txt "$OUT/figures.jsonl"
nvidia-smi 2>/dev/null | tee "$OUT/machine.txt" | head -n 15
call tests 240 tests & call score 150 score & call prepare 240 prepare &
wait
if wanted tests; then (said_by_tests) | tee -a "$OUT/all.txt"; fi
find "$WORK/compiled" -name '*.best_config' -delete 2>/dev/null  # were chosen on a busy card

LINES_OF=60 call remix_m 180 "remix_m --variant '$chunked' --variant '$gram' --trace $OUT/remix_m.json.gz"
call golf 70 golf
call centering 70 centering
if [ ${#LAYER[@]} = 0 ]; then call slowrun 150 slowrun; fi
echo "done in $SECONDS s; all of it is in $OUT"
