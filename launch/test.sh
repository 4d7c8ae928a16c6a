#!/usr/bin/env bash
# Makes or reuses .venv and runs every test, three files at a time: many tests wait more than they compute.
#   bash launch/test.sh [PYTEST-OPTIONS]              e.g. bash launch/test.sh -k resume
#   bash launch/test.sh --oldest [PYTEST-OPTIONS]     some quick tests, with the oldest dependencies that pyproject.toml allows
set -euo pipefail
cd "$(dirname "$0")/.."
if [[ ${1:-} == --oldest ]]; then
  shift
  bash launch/setup.sh --oldest test
  venv=.venv-oldest
  tests=( # use every dependency, and train every family
    tests/test_structure.py::test_every_module_is_imported_without_a_word
    tests/test_config.py
    tests/test_configs.py
    tests/test_order.py
    tests/test_shards.py
    tests/test_loader.py
    tests/test_remote.py::test_object_stores
    tests/test_families.py::test_every_parameter_is_trained
    tests/test_families.py::test_compiled_the_gradients_are_the_same
    tests/test_player.py
    tests/test_engines.py::test_gradients_of_every_penalty
    tests/test_checkpoint.py
    tests/test_promises.py::test_resume_is_exact
    tests/test_evaluation.py::test_frechet_agrees_with_others
    tests/test_evaluation.py::test_frechet_agrees_with_torchmetrics
    tests/test_evaluation.py::test_evaluation_does_not_depend_on_the_ranks
    tests/test_features.py::test_dinov2
    tests/test_tracking.py::test_wandb_has_all_there_is
    tests/test_report.py::test_many_and_large_pictures_are_thinned_out
    tests/test_use.py::test_what_is_exported_computes_the_same_elsewhere
  )
else
  bash launch/setup.sh test
  venv=.venv tests=()
fi
# Otherwise each process that a test starts compiles every module it imports.
unset PYTHONDONTWRITEBYTECODE
OMP_NUM_THREADS=1 exec "$venv/bin/python" -m pytest -n 3 --dist loadfile --no-loadscope-reorder "${tests[@]}" "$@"
