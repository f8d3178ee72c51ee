"""Two models, two optimizers, one run: a GAN that learns a bent line in the plane: python examples/gan.py

Both optimizers step once for each batch; the two steps count as one.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, softplus

from layerwatch import Run, watch

BATCH = 128


def real_points() -> Tensor:
    x = torch.rand(BATCH, 1) * 2 - 1
    return torch.cat([x, x**2], dim=1) + 0.02 * torch.randn(BATCH, 2)


torch.manual_seed(0)
generator = nn.Sequential(nn.Linear(4, 64), nn.LeakyReLU(0.2), nn.Linear(64, 2))
critic = nn.Sequential(nn.Linear(2, 64), nn.LeakyReLU(0.2), nn.Linear(64, 1))
generator_optimizer = torch.optim.Adam(generator.parameters(), lr=1e-3, betas=(0.5, 0.9))
critic_optimizer = torch.optim.Adam(critic.parameters(), lr=1e-3, betas=(0.5, 0.9))

with watch([generator, critic], [generator_optimizer, critic_optimizer], run="runs/gan", every=10) as watcher:
    for _ in range(300):
        fake = generator(torch.randn(BATCH, 4))

        critic_optimizer.zero_grad()
        critic_loss = softplus(-critic(real_points())).mean() + softplus(critic(fake.detach())).mean()
        critic_loss.backward()
        critic_optimizer.step()

        generator_optimizer.zero_grad()
        generator_loss = binary_cross_entropy_with_logits(critic(fake), torch.ones(BATCH, 1))
        generator_loss.backward()
        generator_optimizer.step()

        watcher.log(generator_loss=generator_loss, critic_loss=critic_loss)

run = Run("runs/gan")
print(f"steps 0 to {run.last_step}, losses {', '.join(sorted(run.scalar_names()))}")
gradients = run.stats("gradient").groupby("tensor", sort=False)["norm"].last()
print(gradients.to_frame("last gradient norm").to_string())
