"""Tensor parallel: matrices split over the processes, one norm and one rate of the whole model.

Run it with ``torchrun --nproc-per-node 2 examples/tensor_parallel.py``; plain ``python``, one process, gives the same
figures.
"""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from lrkernels import FusedSGD, schedules
from lrkernels.tasks import digits

STEPS = 120

alone = {} if dist.is_torchelastic_launched() else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
dist.init_process_group("gloo", **alone)
mesh = init_device_mesh("cpu", (dist.get_world_size(),))

task = digits()  # scikit-learn's handwritten digits
torch.manual_seed(0)
model = nn.Sequential(nn.Flatten(), nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))
parallelize_module(model, mesh, {"1": ColwiseParallel(), "3": RowwiseParallel()})
optimizer = FusedSGD(  # no process group: the parameters' mesh says who holds what
    model.parameters(), lr=1e-3, momentum=0.9, schedule=schedules.alignment(kappa=0.1), max_grad_norm=1.0
)

for batch in task.batches(STEPS):  # the same batch in all processes
    task.loss(model, batch).backward()
    optimizer.step()
    optimizer.zero_grad()

accuracy = task.evaluate(model)  # all processes take part
if dist.get_rank() == 0:
    stats = {name: f"{float(value):.4g}" for name, value in optimizer.stats.items()}
    part = tuple(model[1].weight.to_local().shape)
    print(f"{part} of (256, 64) in this process, {stats}, {task.metric}: {task.form.format(accuracy)}")
dist.barrier()  # nobody leaves before the last of them is done
dist.destroy_process_group()
