"""DistributedDataParallel, with momentum and moments split over the processes (ZeRO).

Run it with ``torchrun --nproc-per-node 2 examples/zero.py`` (plain ``python`` is one process). Without ZeRO it is
``FusedAdamW(model.parameters(), ...)`` as in one process: after DDP's backward pass every process has the same
gradients.
"""

from functools import partial

import torch.distributed as dist
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer

from lrkernels import FusedAdamW, schedules
from lrkernels.tasks import digits

STEPS = 120

alone = {} if dist.is_torchelastic_launched() else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
dist.init_process_group("gloo", **alone)
rank, world = dist.get_rank(), dist.get_world_size()

task = digits(batch_size=64)  # a small convolutional network and scikit-learn's handwritten digits
model = nn.parallel.DistributedDataParallel(network := task.model())
optimizer = ZeroRedundancyOptimizer(
    model.parameters(),
    optimizer_class=partial(
        FusedAdamW,
        process_group=dist.group.WORLD,  # the clip and the rate are those of all parameters
        schedule=schedules.cosine(STEPS, warmup_steps=10),
        max_grad_norm=1.0,
    ),
    lr=3e-3,
)

for inputs, targets in task.batches(STEPS):
    task.loss(model, (inputs.chunk(world)[rank], targets.chunk(world)[rank])).backward()
    optimizer.step()
    optimizer.zero_grad()

fused = optimizer.optim  # this process's own, with statistics of the whole model
kept = sum(state["exp_avg"].numel() for state in fused.state.values())
print(f"rank {rank} keeps moments of {kept} elements; the last gradient's norm is {fused.stats['grad_norm']:.6f}")
optimizer.consolidate_state_dict(to=0)  # before state_dict(), in all processes
if rank == 0:
    print(f"{len(optimizer.state_dict()['state'])} states, {task.metric}: {task.form.format(task.evaluate(network))}")
dist.barrier()  # nobody leaves before the last of them is done
dist.destroy_process_group()
