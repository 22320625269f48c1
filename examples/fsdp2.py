"""FSDP2: the clip and the rate of the whole model, and a checkpoint for any number of processes.

Run it with ``torchrun --nproc-per-node 2 examples/fsdp2.py``, then with another number: it goes on where it stopped.
Plain ``python`` is one process.
"""

import os
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from sklearn.datasets import load_digits
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from lrkernels import FusedSGD, schedules

STEPS, BATCH = 60, 96
FOLDER = Path(os.environ.get("CHECKPOINT", Path(tempfile.gettempdir()) / "lrkernels-fsdp2"))

alone = {} if dist.is_torchelastic_launched() else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
dist.init_process_group("gloo", **alone)
rank, world = dist.get_rank(), dist.get_world_size()
source = load_digits()
images, labels = torch.tensor(source.images, dtype=torch.float32) / 8 - 1, torch.tensor(source.target)

torch.manual_seed(0)
model = nn.Sequential(nn.Flatten(), nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))
mesh = init_device_mesh("cpu", (world,))
for part in (model[1], model[3], model):
    fully_shard(part, mesh=mesh)
optimizer = FusedSGD(
    model.parameters(), lr=1e-3, momentum=0.9, schedule=schedules.alignment(kappa=0.1), max_grad_norm=1.0
)

if saved := sorted(FOLDER.glob("*")):
    of_model, of_optimizer = get_state_dict(model, optimizer)
    dcp.load({"model": of_model, "optimizer": of_optimizer}, checkpoint_id=saved[-1])
    set_state_dict(model, optimizer, model_state_dict=of_model, optim_state_dict=of_optimizer)

for _ in range(STEPS):
    chosen = torch.randint(len(labels), (BATCH,)).chunk(world)[rank]  # every process draws the same numbers
    loss = nn.functional.cross_entropy(model(images[chosen]), labels[chosen])
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()

of_model, of_optimizer = get_state_dict(model, optimizer)
folder = FOLDER / f"{int(optimizer.stats['step']):06d}"
dcp.save({"model": of_model, "optimizer": of_optimizer}, checkpoint_id=folder)
loss = loss.detach()
dist.all_reduce(loss)
if rank == 0:
    stats = {name: f"{float(value):.4g}" for name, value in optimizer.stats.items()}
    print(f"{world} processes, loss {float(loss) / world:.3f}, {stats}, saved in {folder}")
dist.barrier()  # nobody leaves before the last of them is done
dist.destroy_process_group()
