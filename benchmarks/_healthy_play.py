"""Healthy trainings whose losses need not fall: a GAN and two agents that play CartPole."""

from __future__ import annotations

import collections
import random
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from _healthy_nets import Attach, digits, healthy, mlp
from torch import Tensor, nn


@healthy("gan-digits", "Fréchet distance of 8 components over that of noise", 0.3, lower=True)
def gan(attach: Attach, seed: int) -> float:
    x = torch.tanh(digits()[0].flatten(1))
    g, d = mlp(16, 96, 96, 64, norm=True), mlp(64, 96, 96, 1, act=nn.LeakyReLU, drop=0.3)
    g.append(nn.Tanh())
    of_g, of_d = (torch.optim.Adam(m.parameters(), lr, (0.5, 0.99)) for m, lr in ((g, 1e-3), (d, 1e-3)))
    with torch.no_grad():
        before = frechet(x, g(torch.randn(1000, 16)))
    watcher = attach([g, d], [of_g, of_d])
    for _ in range(600):
        real, fake = x[torch.randperm(len(x))[:64]], g(torch.randn(64, 16))
        of_d.zero_grad()
        loss_d = F.softplus(-d(real)).mean() + F.softplus(d(fake.detach())).mean()
        loss_d.backward()
        of_d.step()
        of_g.zero_grad()
        loss_g = F.softplus(-d(fake)).mean()
        loss_g.backward()
        of_g.step()
        watcher.log(train_loss=loss_g, loss_d=loss_d)
    watcher.close()
    with torch.no_grad():
        return frechet(x, g(torch.randn(1000, 16))) / before


def frechet(real: Tensor, fake: Tensor) -> float:
    """Between Gaussians fitted to both in the first eight principal components of the real data."""
    middle = real.mean(0)
    axes = torch.linalg.svd(real - middle, full_matrices=False).Vh[:8].T
    a, b = (real - middle) @ axes, (fake - middle) @ axes
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)
    root = torch.linalg.eigvals(cov_a @ cov_b).real.clamp(min=0).sqrt().sum()
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + cov_a.trace() + cov_b.trace() - 2 * root)


def played(policy: Any, seed: int, episodes: int = 10) -> float:
    """Mean return of the greedy policy."""
    import gymnasium

    env, total = gymnasium.make("CartPole-v1"), 0.0
    for episode in range(episodes):
        state, _ = env.reset(seed=1000 * seed + episode)
        over = False
        while not over:
            with torch.no_grad():
                action = int(policy(torch.from_numpy(state)[None]).argmax())
            state, reward, terminated, truncated, _ = env.step(action)
            total, over = total + float(reward), terminated or truncated
    env.close()
    return total / episodes


@healthy("ppo-cartpole", "mean return", 150)
def ppo(attach: Attach, seed: int) -> float:
    """Proximal policy optimisation: eight environments, 64 steps each, four epochs of four minibatches."""
    import gymnasium

    envs = gymnasium.make_vec("CartPole-v1", 8, vectorization_mode="sync")
    model = nn.ModuleDict({"actor": mlp(4, 64, 64, 2, act=nn.Tanh), "critic": mlp(4, 64, 64, 1, act=nn.Tanh)})
    for net in model.values():  # the usual orthogonal start, a small last layer for the actor
        for layer in net.children():
            if isinstance(layer, nn.Linear):
                nn.init.orthogonal_(layer.weight, 2**0.5)
                nn.init.zeros_(layer.bias)
    nn.init.orthogonal_(model["actor"][-1].weight, 0.01)
    nn.init.orthogonal_(model["critic"][-1].weight, 1.0)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, eps=1e-5)
    watcher = attach(model, optimizer)
    state = torch.from_numpy(envs.reset(seed=seed)[0])
    lengths: collections.deque[float] = collections.deque(maxlen=20)
    length = np.zeros(8)
    for _ in range(25):
        seen: list[tuple[Tensor, ...]] = []
        for _ in range(64):
            with torch.no_grad():
                chosen = torch.distributions.Categorical(logits=model["actor"](state))
                action, value = chosen.sample(), model["critic"](state)[:, 0]
            following, reward, ended, cut, _ = envs.step(action.numpy())
            over = torch.from_numpy(ended | cut)
            seen.append(
                (state, action, chosen.log_prob(action), value, torch.from_numpy(reward).float(), over)
            )
            state, length = torch.from_numpy(following), length + 1
            lengths.extend(length[over.numpy()])
            length[over.numpy()] = 0
        _improve(model, optimizer, watcher, seen, state, lengths)
    watcher.close()
    envs.close()
    return played(model["actor"], seed)


def _improve(
    model: nn.ModuleDict, optimizer: Any, watcher: Any, seen: list, last: Tensor, lengths: collections.deque
) -> None:
    states, actions, log_probs, values, rewards, over = (
        torch.stack(part) for part in zip(*seen, strict=True)
    )
    with torch.no_grad():
        following = model["critic"](last)[:, 0]
    gain, gains = torch.zeros(8), torch.zeros_like(values)
    for t in reversed(range(len(rewards))):
        alive = 1 - over[t].float()
        gain = rewards[t] + 0.99 * following * alive - values[t] + 0.95 * 0.99 * alive * gain
        gains[t], following = gain, values[t]
    goals = (gains + values).flatten()
    flat = [part.flatten(0, 1) for part in (states, actions, log_probs, gains)]
    for _ in range(4):
        for i in torch.randperm(len(goals)).split(128):
            state, action, old, gained = (part[i] for part in flat)
            gained = (gained - gained.mean()) / (gained.std() + 1e-8)
            chosen = torch.distributions.Categorical(logits=model["actor"](state))
            ratio = (chosen.log_prob(action) - old).exp()
            policy = -torch.min(ratio * gained, ratio.clamp(0.8, 1.2) * gained).mean()
            value = F.mse_loss(model["critic"](state)[:, 0], goals[i])
            loss = policy + 0.5 * value - 0.01 * chosen.entropy().mean()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            watcher.log(train_loss=loss)
    if lengths:
        watcher.log(episode_return=float(np.mean(lengths)))


@healthy("dqn-cartpole", "mean return", 100)
def dqn(attach: Attach, seed: int) -> float:
    """Double deep Q-learning with a replay memory and a target network that is copied every 100 updates."""
    import gymnasium

    env = gymnasium.make("CartPole-v1")
    online, target = mlp(4, 96, 96, 2), mlp(4, 96, 96, 2)
    target.load_state_dict(online.state_dict())
    optimizer = torch.optim.Adam(online.parameters(), lr=1e-3)
    watcher = attach(online, optimizer)
    memory: list[tuple] = []
    state, _ = env.reset(seed=seed)
    total, updates = 0.0, 0
    rng = random.Random(seed)
    for step in range(6000):
        if rng.random() < max(0.04, 1 - step / 2500):
            action = rng.randrange(2)
        else:
            with torch.no_grad():
                action = int(online(torch.from_numpy(state)[None]).argmax())
        following, reward, ended, cut, _ = env.step(action)
        memory.append((state, action, float(reward), following, float(ended)))
        state, total = following, total + float(reward)
        if ended or cut:
            watcher.log(episode_return=total)
            state, total = env.reset()[0], 0.0
        if step < 500 or step % 4:
            continue
        drawn = zip(*rng.sample(memory, 128), strict=True)
        s, a, r, n, e = (torch.from_numpy(np.array(part)) for part in drawn)
        with torch.no_grad():
            best = target(n).gather(1, online(n).argmax(1, keepdim=True))[:, 0]
            goal = r.float() + 0.99 * (1 - e.float()) * best
        loss = F.smooth_l1_loss(online(s).gather(1, a[:, None])[:, 0], goal)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(online.parameters(), 10.0)
        optimizer.step()
        updates += 1
        if updates % 100 == 0:
            target.load_state_dict(online.state_dict())
        watcher.log(train_loss=loss)
    watcher.close()
    env.close()
    return played(online, seed)
