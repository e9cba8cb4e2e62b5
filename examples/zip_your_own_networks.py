"""Train two small networks, zip them into one, and use the result. Takes some seconds on one core.

Run it from the project's folder: `python examples/zip_your_own_networks.py`

Both networks look at the same kind of picture: one shape, somewhere in a noisy square. The first says which of four
shapes it is. The second starts from the first and learns to say whether it is a bar. So they have much in common.
"""

from __future__ import annotations

import tempfile

import torch
from torch import Tensor, nn

import mtz_core as mtz

SIZE = 16
SHAPES = torch.zeros(4, 6, 6)
SHAPES[0, 2:4, :] = 1  # a bar that lies
SHAPES[1, :, 2:4] = 1  # a bar that stands
SHAPES[2] = (torch.eye(6) + torch.eye(6).flip(0)).clamp(max=1)  # a cross
SHAPES[3] = 1
SHAPES[3, 1:5, 1:5] = 0  # a frame


def draw(count: int, seed: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Return pictures, and for each task their labels."""
    generator = torch.Generator().manual_seed(seed)
    shape = torch.randint(4, (count,), generator=generator)
    places = torch.randint(SIZE - 6, (count, 2), generator=generator)
    pictures = 0.3 * torch.randn(count, SIZE, SIZE, generator=generator)
    for picture, which, (top, left) in zip(pictures, shape, places.tolist(), strict=True):
        picture[top : top + 6, left : left + 6] += SHAPES[which]
    return pictures, {"shape": shape, "bar": (shape < 2).long()}


def build(classes: int) -> nn.Sequential:
    """Return a network that is not trained yet."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(SIZE**2, 96), nn.ReLU(), nn.Linear(96, 48), nn.ReLU(), nn.Linear(48, classes)
    )


def train(network: nn.Module, pictures: Tensor, labels: Tensor, epochs: int) -> None:
    """Train a network in place."""
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
    for _ in range(epochs):
        for batch in torch.randperm(len(pictures)).split(128):
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(pictures[batch]), labels[batch]).backward()
            optimizer.step()


def main() -> None:
    """Train, zip, compare, save, load, take one task out."""
    torch.manual_seed(0)
    torch.set_num_threads(1)  # more would only get in each other's way
    pictures, labels = draw(8000, seed=0)
    shape, bar = build(classes=4), build(classes=2)
    train(shape, pictures, labels["shape"], epochs=8)
    bar[:4].load_state_dict(shape[:4].state_dict())  # all but the last layer
    train(bar, pictures, labels["bar"], epochs=4)
    networks: dict[str, nn.Module] = {"shape": shape, "bar": bar}

    # Zipping reads pictures without labels. It changes neither network.
    zipped = mtz.zip_networks(
        networks,
        calibration=dict.fromkeys(networks, pictures[:2000]),
        config=mtz.ZipConfig(budget=mtz.Budget(size=0.2)),
        on_progress=print,
    )
    print(f"\n{zipped.report}")

    unseen, truth = draw(4000, seed=1)
    print("\nErrors on new pictures, in percent:")
    test = {task: (unseen, labels) for task, labels in truth.items()}
    for task, found in mtz.evaluate(zipped, test, originals=networks).items():
        print(f"  {task:<6} its own network {found.original_error:.2f}, the zipped network {found.error:.2f}")

    with tempfile.TemporaryDirectory() as folder:
        zipped.save(folder)
        loaded = mtz.load(folder)
    same = torch.equal(loaded(unseen, task="shape"), zipped(unseen, task="shape"))
    print(f"\nSaved and loaded again: {'the same outputs' if same else 'other outputs'}.")

    alone = zipped.network("shape")
    print("\nOne task as a plain torch module:")
    for name, layer in alone.named_children():
        print(f"  ({name}): {layer}")


if __name__ == "__main__":
    main()
