"""Hugging Face Trainer under watch, with one more callback: python examples/transformers_trainer.py

A tiny Llama, built from its config class, learns to count. The log goes to runs/trainer.
"""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from layerwatch import Run
from layerwatch.hooks.transformers import LayerwatchCallback

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=32, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
    max_position_embeddings=16, pad_token_id=None, bos_token_id=None, eos_token_id=None,
)  # fmt: skip
rows = (torch.arange(16) + torch.randint(0, 32, (256, 1))) % 32
data = [{"input_ids": row, "labels": row} for row in rows]

trainer = Trainer(
    model=LlamaForCausalLM(config),
    args=TrainingArguments(
        "out", max_steps=60, per_device_train_batch_size=16, gradient_accumulation_steps=2,
        learning_rate=1e-2, logging_steps=5, eval_strategy="steps", eval_steps=20, save_strategy="no",
        report_to="none", use_cpu=True, disable_tqdm=True, log_level="error",
    ),
    train_dataset=data[:192],  # type: ignore[arg-type]
    eval_dataset=data[192:],  # type: ignore[arg-type]
    callbacks=[LayerwatchCallback(run="runs/trainer", every=5)],
)  # fmt: skip
trainer.train()

run = Run("runs/trainer")
for name in ("train_loss", "val_loss"):
    losses = run.scalars(name)
    print(f"{name}: {losses['value'].iloc[0]:.2f} to {losses['value'].iloc[-1]:.2f}")
print(f"learning rate {run.info['config']['learning_rate']}, steps 0 to {run.last_step}")
gradients = run.stats("gradient").groupby("tensor", sort=False)["norm"].last()
print(gradients.to_frame("last gradient norm").to_string())
