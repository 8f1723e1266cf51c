#!/usr/bin/env bash
# RDPO on FLUX.1-dev from start table to exported predictor: ./train_flux.sh
set -euo pipefail
cd "$(dirname "$0")"

usage() {
    cat <<'TEXT'
usage: [NAME=value ...] ./train_flux.sh [--resume RUN_DIR|latest]

  FLUX_SNAPSHOT_PATH      table to start from (exps/flux/flux-start.pkl)
  FLUX_CONFIG             configuration (training/ppo/cfgs/flux_dev.yaml)
  FLUX_RUN_NAME           end of the run folder's name (flux_dev)
  FLUX_PROMPT_CSV         text or CSV file of training prompts (the configuration's data.prompt_csv)
  FLUX_MAX_STEPS          stop after this step, with a checkpoint
  FLUX_NPROC_PER_NODE     devices (1)
  FLUX_MASTER_PORT        torchrun's port (11111)
  FLUX_EXPORT_AFTER       1 to export at the end (1)
  FLUX_EXPORT_CHECKPOINT  checkpoint to export (the best by held-out reward)
  FLUX_MODEL_PATH         folder of the model; FLUX_ALLOW_REMOTE=1 lets it be fetched
  PYTHON                  interpreter (.venv/bin/python where there is one, else python3)
TEXT
}

case "${1:-}" in
    -h | --help) usage && exit 0 ;;
esac
table=${FLUX_SNAPSHOT_PATH:-exps/flux/flux-start.pkl}
config=${FLUX_CONFIG:-training/ppo/cfgs/flux_dev.yaml}
name=${FLUX_RUN_NAME:-flux_dev}
python=${PYTHON:-python3}
[ -n "${PYTHON:-}" ] || [ ! -x .venv/bin/python ] || python=.venv/bin/python

if [ "${1:-}" = --resume ]; then # the run knows its table, its configuration and its prompts
    arguments=()
else
    "$python" -m solvers.predictor show "$table"
    arguments=(--config "$config" --override "data.predictor_snapshot=$table" --run-name "$name")
    [ -z "${FLUX_PROMPT_CSV:-}" ] || arguments+=(--override "data.prompt_csv=$FLUX_PROMPT_CSV")
fi
"$python" sample_flux.py --check
[ -z "${FLUX_MAX_STEPS:-}" ] || arguments+=(--max-steps "$FLUX_MAX_STEPS")

launcher=()
processes=${FLUX_NPROC_PER_NODE:-1}
[ "$processes" = 1 ] || launcher=(-m torch.distributed.run --nproc_per_node="$processes" --master_port="${FLUX_MASTER_PORT:-11111}")
run=$("$python" "${launcher[@]}" -m training.ppo.launch "${arguments[@]}" "$@" | tee /dev/stderr | sed -n 's/^run folder: //p')

if [ "${FLUX_EXPORT_AFTER:-1}" = 1 ]; then
    "$python" -m training.ppo.export_epd_predictor "$run" ${FLUX_EXPORT_CHECKPOINT:+--checkpoint "$FLUX_EXPORT_CHECKPOINT"}
fi
