"""Lightning: the optimizer from configure_optimizers, its clip in place of Lightning's, its history in TensorBoard."""

import logging
import tempfile
import warnings

import lightning
import torch
from lightning.pytorch.loggers import TensorBoardLogger

from lrkernels import FusedAdamW, log_history, schedules
from lrkernels.tasks import digits

STEPS = 200

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", module="lightning")
task = digits()  # a small convolutional network and scikit-learn's handwritten digits


class Digits(lightning.LightningModule):
    """As any other module: only configure_optimizers knows of the optimizer."""

    def __init__(self) -> None:
        super().__init__()
        self.network = task.model()

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], index: int) -> torch.Tensor:
        """Return the loss."""
        return task.loss(self.network, batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Make the optimizer; its max_grad_norm stands for Trainer(gradient_clip_val=...), or both would clip."""
        schedule = schedules.linear(STEPS, warmup_steps=10)
        return FusedAdamW(self.parameters(), lr=3e-3, schedule=schedule, max_grad_norm=1.0)

    def on_train_end(self) -> None:
        """Write what there is to see."""
        written = log_history(self.logger.experiment, self.optimizers().optimizer)
        print(f"{written} steps written for TensorBoard")


with tempfile.TemporaryDirectory() as folder:  # for a run of yours: a folder that stays
    trainer = lightning.Trainer(
        max_steps=STEPS,
        accelerator="cpu",
        precision="bf16-mixed",
        logger=TensorBoardLogger(folder),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    model = Digits()
    trainer.fit(model, torch.utils.data.DataLoader(list(task.batches(STEPS)), batch_size=None))

print(f"{task.metric}: {task.form.format(task.evaluate(model.network))}")
