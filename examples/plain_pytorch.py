"""Plain PyTorch: handwritten digits with this project's loader, which decodes images at each epoch's size."""

import torch
from torch.nn import functional as F

import algos
from algos.sam import frozen_statistics
from brisk.data import Normalizer, build_loader  # pyright: ignore[reportMissingImports]
from brisk.models.resnet import resnet_digits  # pyright: ignore[reportMissingImports]

STAGES = [algos.Stage(epochs=4, image_size=12), algos.Stage(epochs=6, image_size=16)]
EPOCHS, PEAK_LEARNING_RATE, SAM_INTERVAL = 10, 0.2, 4


def loader(split: str, **settings):
    return build_loader(source="digits", split=split, image_size=16, num_workers=0, **settings)


def main() -> None:
    torch.manual_seed(0)
    chance = torch.Generator().manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    train = loader("train", per_device_batch_size=64, crop_scale=(0.6, 1.0), flip_probability=0.0)
    held_out = loader("eval", per_device_batch_size=360, eval_crop_ratio=1.0)
    normalize = Normalizer(train.mean, train.std)
    model = algos.apply_channels_last(algos.apply_blurpool(resnet_digits(num_classes=10))).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=PEAK_LEARNING_RATE, momentum=0.9, weight_decay=5e-4)

    for epoch in range(EPOCHS):
        train.set_image_size(algos.stage_at(epoch, STAGES).image_size)
        for step, (images, labels) in enumerate(train):
            images, labels = normalize((images.to(device), labels.to(device)))
            lam, permutation = algos.draw_mixup(len(images), alpha=0.2, generator=chance)
            images, targets = algos.mixup_batch(images, labels, lam=lam, permutation=permutation, num_classes=10)
            targets = algos.smooth_labels(targets, smoothing=0.1)
            share = algos.warmup_decay(epoch + step / len(train), total_epochs=EPOCHS, warmup_epochs=1)
            optimizer.param_groups[0]["lr"] = PEAK_LEARNING_RATE * share

            def backward(images=images, targets=targets) -> None:
                F.cross_entropy(model(images), targets).backward()

            backward()
            if step % SAM_INTERVAL == 0:
                with frozen_statistics(model):  # so that batch norm does not count this batch twice
                    algos.sam_gradients(model.parameters(), backward, rho=0.1)
            optimizer.step()
            optimizer.zero_grad()

    model.eval()
    with torch.no_grad():
        batches = (normalize((images.to(device), labels.to(device))) for images, labels in held_out)
        right = sum(int((model(images).argmax(1) == labels).sum()) for images, labels in batches)
    print(f"top-1: {right / held_out.num_samples:.2%}")


if __name__ == "__main__":
    main()
