#!/usr/bin/env bash
# Everything from a fresh machine with Python 3.11: ./launch.sh demo, ./launch.sh test
set -euo pipefail
cd "$(dirname "$0")"

usage() {
    cat <<'TEXT'
usage: ./launch.sh COMMAND [ARGUMENTS]

  setup    make the environment in .venv (every command below does so when it is missing or stale)
  demo     compare solvers, distil a table, tune one on a reward, compare three families: minutes; writes demo/report.html
  test     run the test suite (arguments go to pytest)
  sample   python sample.py ARGUMENTS
  distill  learn a table from a teacher: ./launch.sh distill NAME, one of training/distill/cfgs
           a model of your own: ./launch.sh distill ANY_NAME --model FOLDER --steps 8
  train    tune a table on a reward (RDPO): ./launch.sh train NAME, one of training/ppo/cfgs
  eval     which solver is better at the same cost, sampled, scored and compared: ./launch.sh eval NAME [--metrics hps,clip],
           NAME one of sd15, sd3-512, sd3-1024, flux, digits, digits-sd3, digits-flux; PROMPT_FILE, SEEDS, OUTDIR, MODEL_ID or
           FLUX_MODEL_PATH, and PREDICTOR, RUN_DIR or RUN_NAME in the environment change what; writes samples/eval/NAME/report.html
  show     print a predictor: ./launch.sh show exps/digits
  docs     render the documentation into build/site
  floors   install the lowest versions of all dependencies in .venv-floors and try everything with them (gigabytes, minutes)
  build    train the digits backbone, its judge and its reward again (minutes)

PROCESSES=N lets distill, train and eval use N devices.
PYTHON names the interpreter to make the environment with (default: python3.11, else python3).
TEXT
}

interpreter() {
    local name
    for name in "${PYTHON:-}" python3.11 python3.12 python3.13 python3; do
        if [ -n "$name" ] && "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$name"
            return
        fi
    done
    echo "error: Python 3.11 or newer is needed; install it, or name it: PYTHON=/path/to/python ./launch.sh setup" >&2
    exit 2
}

setup() {
    local stamp=.venv/.complete python
    if command -v flock >/dev/null; then # a second command waits for the first one's set-up
        exec 9>.setup.lock
        flock 9
    fi
    if [ -x .venv/bin/python ] && (pwd && cat pyproject.toml) | cmp -s - "$stamp"; then
        exec 9>&-
        return
    fi
    python=$(interpreter)
    echo "setting up .venv with $("$python" --version) (once; a minute or two)" >&2
    rm -f "$stamp"
    [ -x .venv/bin/python ] || "$python" -m venv .venv
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
    (pwd && cat pyproject.toml) > "$stamp"
    exec 9>&-
}

run_module() { # MODULE ARGUMENTS, in PROCESSES processes
    local launcher=()
    if ! [[ "${PROCESSES:-1}" =~ ^[1-9][0-9]*$ ]]; then
        echo "error: PROCESSES='$PROCESSES': expected the number of devices to use, such as 4" >&2
        exit 2
    fi
    setup
    [ "${PROCESSES:-1}" = 1 ] || launcher=(-m torch.distributed.run --standalone --nproc_per_node="$PROCESSES")
    exec .venv/bin/python "${launcher[@]}" -m "$@"
}

own_model() { # NAME ARGUMENTS: a table for a model of one's own
    if [[ "$1" == -* ]]; then
        echo "error: the run's name comes first: ./launch.sh distill NAME $*" >&2
        exit 2
    fi
    run_module training.distill.own_model "$@"
}

configured() { # training/STAGE NAME ARGUMENTS: the shipped configuration of that name
    local stage=$1 name=${2:-}
    if [ "$name" = --help ] || [ "$name" = -h ]; then
        run_module "${stage/\//.}.launch" --help
    fi
    if [ "$stage" = training/distill ] && [[ " ${*:2} " == *" --model"[\ =]* ]]; then
        own_model "${@:2}"
    fi
    if [ ! -f "$stage/cfgs/$name.yaml" ]; then
        echo "error: '$name' is no configuration of $stage; expected one of $(cd "$stage/cfgs" && find . -name '*.yaml' | sort | sed 's,^\./,,; s/\.yaml//' | tr '\n' ' ')" >&2
        exit 2
    fi
    shift 2
    if [[ " $* " == *" --resume"[\ =]* ]]; then # a run that goes on has its configuration
        run_module "${stage/\//.}.launch" "$@"
    fi
    run_module "${stage/\//.}.launch" --config "$stage/cfgs/$name.yaml" --run-name "${name//\//_}" "$@"
}

command=${1:---help}
shift || true
case "$command" in
    setup) setup ;;
    demo) setup && exec .venv/bin/python -m benchmarks.demo "$@" ;;
    test) setup && exec .venv/bin/python -m pytest "$@" ;;
    sample) setup && exec .venv/bin/python sample.py "$@" ;;
    distill) configured training/distill "$@" ;;
    train) configured training/ppo "$@" ;;
    eval) setup && exec .venv/bin/python -m evaluation.suite "$@" ;;
    show) setup && exec .venv/bin/python -m solvers.predictor show "$@" ;;
    docs) setup && .venv/bin/python -m pip install --quiet --disable-pip-version-check -e '.[docs]' && exec .venv/bin/mkdocs build --strict "$@" ;;
    floors) python=$(interpreter) && exec "$python" tests/floors.py ;;
    build) setup && exec .venv/bin/python -m digits.build "$@" ;;
    -h | --help | help) usage ;;
    *)
        echo "error: unknown command '$command'; ./launch.sh --help lists them" >&2
        exit 2
        ;;
esac
