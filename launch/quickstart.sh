#!/usr/bin/env bash
# From nothing to a trained and evaluated GAN: makes .venv, trains the built-in digits on every visible GPU, or on two
# CPU processes, and says where the results are.
#   bash launch/quickstart.sh [key=value ...]      e.g. bash launch/quickstart.sh train.kimg=20
set -euo pipefail
cd "$(dirname "$0")/.."
bash launch/setup.sh

gpus=$(.venv/bin/python -c 'import torch; print(torch.cuda.device_count())')
processes=$((gpus > 0 ? gpus : 2))
while ((64 % processes)); do ((processes--)); done # the default batch is 64
((gpus > 0)) || export OMP_NUM_THREADS=1
export PATH="$PWD/.venv/bin:$PATH"
torchrun --nproc_per_node="$processes" -m gandist.train "$@"

cat <<END

Next, after '. .venv/bin/activate':
  torchrun --nproc_per_node=$processes -m gandist.train train.kimg=200
      goes on from the checkpoint to 200 kimg
  torchrun --nproc_per_node=$processes -m gandist.train model.conditioning=auxiliary run_dir=runs/acgan
      trains another discriminator, an AC-GAN, beside it
  python -m gandist.evaluate runs/digits evaluation.num_images=5000
      measures the newest checkpoint again, on more generated images
END
