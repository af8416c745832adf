"""Lightning Fabric: handwritten digits in an ordinary DataLoader, resized on the device; any number of devices."""

import torch
from lightning_fabric import Fabric
from sklearn.datasets import load_digits
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset, random_split

import algos
from algos.progressive_resizing import resize_images
from algos.sam import frozen_statistics
from brisk.models.resnet import resnet_digits  # pyright: ignore[reportMissingImports]

STAGES = [algos.Stage(epochs=4, image_size=12), algos.Stage(epochs=8, image_size=16)]
EPOCHS, PEAK_LEARNING_RATE, SAM_INTERVAL = 12, 0.2, 4


def main() -> None:
    fabric = Fabric()
    fabric.launch()
    fabric.seed_everything(0, verbose=False)
    chance = torch.Generator().manual_seed(fabric.global_rank)  # every rank makes its own draws
    pixels, labels = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
    images = ((pixels.float() - 4.9) / 6.0).view(-1, 1, 8, 8).expand(-1, 3, -1, -1)
    parts = random_split(TensorDataset(images, labels), (0.8, 0.2), generator=torch.Generator().manual_seed(0))
    train = fabric.setup_dataloaders(DataLoader(parts[0], 64 // fabric.world_size, shuffle=True, drop_last=True))
    held_out = fabric.setup_dataloaders(DataLoader(parts[1], len(parts[1])), use_distributed_sampler=False)
    model = algos.apply_channels_last(algos.apply_blurpool(resnet_digits(num_classes=10)))
    optimizer = torch.optim.SGD(model.parameters(), lr=PEAK_LEARNING_RATE, momentum=0.9, weight_decay=5e-4)
    model, optimizer = fabric.setup(model, optimizer)

    for epoch in range(EPOCHS):
        image_size = algos.stage_at(epoch, STAGES).image_size
        for step, (images, labels) in enumerate(train):
            lam, permutation = algos.draw_mixup(len(images), alpha=0.2, generator=chance)
            images, targets = algos.mixup_batch(images, labels, lam=lam, permutation=permutation, num_classes=10)
            images, targets = resize_images(images, image_size=image_size), algos.smooth_labels(targets, smoothing=0.1)
            share = algos.warmup_decay(epoch + step / len(train), total_epochs=EPOCHS, warmup_epochs=1)
            optimizer.param_groups[0]["lr"] = PEAK_LEARNING_RATE * share

            def backward(images=images, targets=targets) -> None:
                fabric.backward(F.cross_entropy(model(images), targets))

            backward()
            if step % SAM_INTERVAL == 0:
                with frozen_statistics(model):  # so that batch norm does not count this batch twice
                    algos.sam_gradients(model.parameters(), backward, rho=0.1)
            optimizer.step()
            optimizer.zero_grad()

    model.eval()
    images, labels = next(iter(held_out))  # all of them in one batch, on every rank
    with torch.no_grad():
        right = model(resize_images(images, image_size=16)).argmax(1) == labels
    fabric.print(f"top-1: {right.float().mean().item():.2%}")


if __name__ == "__main__":
    main()
