"""The networks of the demo. The fifth, MiniLM, comes with its package."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn


class ConvNet(nn.Module):
    """A small convolutional classifier with batch norm: (n, 1, 8, 8) -> (n, 10) logits."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, width, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 2 * width, 3, padding=1, bias=False)
        self.norm3 = nn.BatchNorm2d(2 * width)
        self.relu1, self.relu2, self.relu3 = nn.ReLU(), nn.ReLU(), nn.ReLU()
        self.pool = nn.MaxPool2d(2)
        self.dropout = nn.Dropout(0.1)
        self.classifier = nn.Linear(2 * width * 4, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu1(self.norm1(self.conv1(x)))
        x = self.pool(self.relu2(self.norm2(self.conv2(x))))
        x = self.pool(self.relu3(self.norm3(self.conv3(x))))
        return self.classifier(self.dropout(x.flatten(1)))


def mlp(sizes: list[int], activation: type[nn.Module]) -> nn.Sequential:
    """Fully connected layers with an activation between them; images are flattened first."""
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), activation()]
    return nn.Sequential(*layers[:-1])


class Autoencoder(nn.Module):
    """Squeezes an image to 16 numbers and draws it again: (n, 1, 8, 8) -> (n, 1, 8, 8)."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = mlp([64, 128, 64, 16], nn.LeakyReLU)
        self.decoder = mlp([16, 64, 128, 64], nn.LeakyReLU)

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.encoder(x)).view_as(x)
