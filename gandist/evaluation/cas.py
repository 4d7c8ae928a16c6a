"""Whether a classifier can learn from generated images what real ones are."""

from collections.abc import Iterable, Iterator

import torch

from gandist.config import Config
from gandist.data.order import permutation
from gandist.distributed import World
from gandist.evaluation.judge import BATCH_SIZE, EPOCHS, Judge, accuracy, train_judge


def classification_accuracy_score(
    generated: Iterable[tuple[torch.Tensor, torch.Tensor]], held_out: Iterable[tuple], config: Config, world: World
) -> float:
    """The accuracy on real held-out images of a judge that is trained on generated images alone (Ravuri & Vinyals 2019,
    1905.10887).

    generated: batches of uint8 images [B, C, H, W] and labels [B], all of which are held in memory
    """
    data = config.data
    images, labels = (torch.cat(each) for each in zip(*generated, strict=True))
    torch.manual_seed(config.seed)
    judge = Judge(max(data.size), data.channels, data.num_classes).to(world.device, memory_format=torch.channels_last)
    with torch.enable_grad():
        train_judge(judge, _shuffled(images, labels, config.seed), len(images), epochs=EPOCHS)
    return accuracy(judge, held_out, world)


def _shuffled(images: torch.Tensor, labels: torch.Tensor, seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Batches without end; each epoch has every image once, but for the last few."""
    epoch = 0
    while True:
        order = torch.from_numpy(permutation(len(images), seed + epoch)).to(images.device)
        for start in range(0, max(len(order) - BATCH_SIZE, 0) + 1, BATCH_SIZE):
            chosen = order[start : start + BATCH_SIZE]
            yield images[chosen], labels[chosen]
        epoch += 1
