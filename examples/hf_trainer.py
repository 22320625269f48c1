"""transformers.Trainer: the optimizer handed in, its clip in place of Trainer's, resumed from Trainer's checkpoint."""

import tempfile

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments
from transformers.utils import logging

from lrkernels import FusedAdamW, schedules

STEPS = 60

logging.set_verbosity_error()
logging.disable_progress_bar()
starts = torch.arange(256)[:, None]
tokens = 2 + (starts + (1 + starts % 3) * torch.arange(16)) % 30  # counting by ones, twos or threes
rows = [{"input_ids": row, "labels": row} for row in tokens]


def trainer(folder: str) -> tuple[Trainer, FusedAdamW]:
    """Everything that a run consists of."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=32, n_positions=16, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=1)
    model = GPT2LMHeadModel(config)
    schedule = schedules.cosine(STEPS, warmup_steps=5)
    optimizer = FusedAdamW(model.parameters(), lr=1e-2, schedule=schedule, max_grad_norm=1.0)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)  # or Trainer makes one of its own beside ours
    arguments = TrainingArguments(
        folder,
        max_steps=STEPS,
        save_steps=STEPS // 2,
        per_device_train_batch_size=16,
        max_grad_norm=0.0,  # ours clips
        use_cpu=True,
        report_to=[],
        logging_strategy="no",
        disable_tqdm=True,
    )
    return Trainer(model, arguments, train_dataset=rows, optimizers=(optimizer, scheduler)), optimizer


with tempfile.TemporaryDirectory() as folder:
    whole, optimizer = trainer(folder)
    whole.train()
    resumed, _ = trainer(folder)
    resumed.train(resume_from_checkpoint=f"{folder}/checkpoint-{STEPS // 2}")

same = all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True))
norms = optimizer.history()["grad_norm"]
print(f"{STEPS} steps, gradient norm from {norms[0]:.2f} to {norms[-1]:.2f}")
print(f"resumed in the middle: {'same bits' if same else 'DIFFERENT'}")
