"""What the processes that decode images have in common."""

import os
import signal
import sys
import threading

from modeling_udon.data.transforms import use_one_thread


def start_worker(worker_id: int) -> None:
    """Keeps a worker to one thread and leaves signals to its parent: the `worker_init_fn` of every DataLoader.

    Ctrl-C reaches a whole group of processes, and so do the signals of a cluster. The parent still needs its workers
    for the step that it finishes; it ends them when it is done, and they end by themselves if it is gone.
    """
    use_one_thread()
    if sys.platform == "linux":
        signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
        threading.Thread(target=_obey_parent, args=(os.getppid(),), daemon=True).start()
    else:
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def _obey_parent(parent: int) -> None:
    while True:
        received = signal.sigwaitinfo((signal.SIGINT, signal.SIGTERM))
        if received.si_signo == signal.SIGTERM and received.si_pid == parent:
            os._exit(0)
