"""Messages between the processes of a run beside gradients: when to end, and what the main process has found."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import distributed

from modeling_udon.training.signals import StopSignals

Answer = TypeVar("Answer")


class Agreement:
    """Lets all processes of a run end at the same place, whichever of them was asked to.

    A signal may reach one process while another waits for it inside a collective, which no signal breaks off. So where
    there are several, none is broken off by itself: they ask each other, after each step and after each batch of an
    evaluation. That goes over TCP whatever the gradients take: a GPU is not held up for it, and a process that has died
    is noticed here.

    Args:
        signals: What this process has been sent.
        num_processes: Number of processes.
        timeout: How long a process may be silent.
    """

    def __init__(self, signals: StopSignals, num_processes: int, timeout: timedelta) -> None:
        self._signals = signals
        self._group = distributed.new_group(backend="gloo", timeout=timeout) if num_processes > 1 else None
        self._under_way: tuple[torch.Tensor, distributed.Work] | None = None

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Lets a signal break off what can be done again and calls `check` on its way, on all processes alike.

        Raises:
            Stopped: If one of them was asked to end before.
        """
        if self._group is None:
            with self._signals.interruptible():
                yield
        else:
            self.check()
            yield

    def check(self) -> None:
        """Waits for the answers of all processes, which have to call it equally often.

        Raises:
            Stopped: If one of them was asked to end. A process that is alone has been told already.
        """
        if self._group is not None:
            wish = torch.tensor(int(self._signals.requested))
            distributed.all_reduce(wish, distributed.ReduceOp.MAX, group=self._group)
            if wish.item():
                self._signals.raise_now()

    def stop_after_step(self, last: bool) -> None:
        """Ends the run after a step, without waiting: a step's message is read at the next one.

        Args:
            last: Whether no step follows.

        Raises:
            Stopped: If a process was asked to end, in all of them after the same step.
        """
        if self._reached(last):
            self._signals.raise_now()

    def _reached(self, last: bool) -> bool:
        if self._group is None:
            return self._signals.requested
        answer = False
        if self._under_way is not None:
            number, work = self._under_way
            work.wait()
            answer = bool(number.item())
        number = torch.tensor(int(self._signals.requested))
        work = distributed.all_reduce(number, distributed.ReduceOp.MAX, group=self._group, async_op=True)
        assert work is not None, "an asynchronous message can be waited for"
        self._under_way = number, work
        if answer or last:
            # A message that nobody waits for would hold up the end of the process for seconds.
            work.wait()
        return answer or (last and bool(number.item()))


def make_host_gather(num_processes: int, timeout: timedelta) -> Callable[[torch.Tensor], torch.Tensor]:
    """Returns a function that concatenates tensors on the host of all processes, over TCP and past any GPU.

    Args:
        num_processes: Number of processes; all of them have to call this, and then the function.
        timeout: How long a process may be silent.
    """
    group = distributed.new_group(backend="gloo", timeout=timeout)

    def gather(local: torch.Tensor) -> torch.Tensor:
        parts = [torch.empty_like(local) for _ in range(num_processes)]
        distributed.all_gather(parts, local.contiguous(), group=group)
        return torch.cat(parts)

    return gather


def on_main(accelerator: Accelerator, work: Callable[[], Answer], *errors: type[Exception]) -> Answer:
    """Has the main process do something, and gives the answer to all.

    Args:
        accelerator: The processes.
        work: What the main one does; its answer is sent to the others.
        errors: What is raised on all processes if `work` raises it; anything else ends the main one alone.
    """
    answer: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            answer[0] = work()
        except errors as error:
            answer[1] = error
    found, fault = broadcast_object_list(answer)
    if fault is not None:
        raise fault
    return found
