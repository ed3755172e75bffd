"""Prototypes in shards of classes: each process holds its share of the classes of every domain.

Model parallelism of "ArcFace" (arXiv 1801.07698) and "Partial FC" (arXiv 2203.15565): each process compares the
embeddings of the whole batch with its own classes, and the processes exchange sums, not prototypes. A shard is a
`DTensor` of torch, so that checkpoints hold whole tensors and a run can go on with another number of processes.
"""

from dataclasses import dataclass

import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor


@dataclass(frozen=True)
class ClassShard:
    """A process's share of the classes of a domain, and what it asks of the others, who have to call the same.

    Attributes:
        start: Its first class.
        num_classes: Classes of all processes.
        rank: Number of this process.
        num_processes: Number of processes.
    """

    start: int
    num_classes: int
    rank: int
    num_processes: int

    @classmethod
    def of(cls, prototypes: DTensor) -> "ClassShard":
        """The share that a process has of prototypes in shards."""
        mesh, num_classes = prototypes.device_mesh, len(prototypes)
        size = -(-num_classes // mesh.size())
        return cls(min(mesh.get_rank() * size, num_classes), num_classes, mesh.get_rank(), mesh.size())

    def gather(self, local: torch.Tensor) -> torch.Tensor:
        """All processes' tensors one after the other; no gradient goes through."""
        parts = [torch.empty_like(local) for _ in range(self.num_processes)]
        distributed.all_gather(parts, local.contiguous())
        return torch.cat(parts)

    def own(self, whole: torch.Tensor) -> torch.Tensor:
        """This process's part of what was gathered."""
        return whole.chunk(self.num_processes)[self.rank]

    def add(self, local: torch.Tensor) -> torch.Tensor:
        """The sum over processes, in place."""
        distributed.all_reduce(local)
        return local

    def log_add(self, local: torch.Tensor) -> torch.Tensor:
        """The logarithm of the sum of exponentials over processes, of shape `(batch_size,)` as given."""
        return self.gather(local[None]).logsumexp(0)


def shard_prototypes(prototypes: nn.ParameterDict, device_type: str, num_processes: int) -> None:
    """Cuts the prototypes of every domain over all processes and moves each to its device.

    In place; an optimiser has to be made after it.
    """
    mesh = init_device_mesh(device_type, (num_processes,))
    for name, whole in prototypes.items():
        prototypes[name] = nn.Parameter(distribute_tensor(whole.data, mesh, [Shard(0)]))
