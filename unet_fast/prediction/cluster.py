"""Work spread over the processes of a Dask cluster. Needs dask (extra [dask])."""

import importlib
import logging
import os
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import CancelledError
from contextlib import contextmanager
from typing import Any, TypeVar

from .._files import reason_of

Item = TypeVar("Item", bound=Hashable)


@contextmanager
def cluster(workers: int, scheduler: str | None) -> Iterator[Any]:
    """Yields a `distributed.Client`, or None if neither workers nor a scheduler is given.

    Args:
        workers: Processes to start on this machine, which share its cores; 0: none.
        scheduler: Address of a scheduler to connect to instead.

    Raises:
        ValueError: If both are given, dask is not installed, or there is no such scheduler.
    """
    if workers < 0:
        raise ValueError(f"workers must be >= 0, got {workers}")
    if scheduler is None and workers == 0:
        yield None
        return
    if scheduler is not None and workers:
        raise ValueError(f"workers must be 0 with a scheduler, got {workers}")
    try:
        distributed = importlib.import_module("distributed")
    except ImportError:
        raise ValueError("workers need the package dask: pip install 'unet_fast[dask]'") from None
    if scheduler is not None:
        try:
            client = distributed.Client(scheduler, timeout=10)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"scheduler must answer, got {scheduler}: {reason_of(error)}"
            ) from None
        logger = logging.getLogger("distributed.client")  # its reports of a lost scheduler are long
        logger.disabled = True
        try:
            with client:
                yield client
        finally:
            logger.disabled = False
        return
    threads = str(max(1, (os.cpu_count() or 1) // workers))
    # Tasks are pickles: who may send one may run anything. Other users of this machine reach the
    # ports, but have not the certificate, which is made for this run and kept in memory.
    try:
        security = distributed.Security.temporary()
    except ImportError:
        raise ValueError(
            "workers need the package cryptography: pip install 'unet_fast[dask]'"
        ) from None
    routes = "distributed.scheduler.http.routes", "distributed.worker.http.routes"
    with (
        importlib.import_module("dask").config.set({name: [] for name in routes}),
        distributed.LocalCluster(
            security=security,
            n_workers=workers,
            threads_per_worker=1,  # a block at a time; torch has threads of its own
            env={"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads},
            dashboard_address="127.0.0.1:0",  # of no pages, on any free port
            silence_logs=logging.CRITICAL,
        ) as local,
        distributed.Client(local) as client,
    ):
        yield client


def distribute(
    client: Any,
    function: Callable[[Item], None],
    items: Sequence[Item],
    done: Callable[[Item], None],
) -> None:
    """Calls a function on every item, one task each; tasks of a worker that dies are repeated.

    Args:
        client: A `distributed.Client`.
        function: Function to call in the workers.
        items: Items to call it on.
        done: Called in this process with each item that is done.

    Raises:
        ValueError: If workers keep dying of an item. Errors of `function` are raised as they are.
    """
    distributed = importlib.import_module("distributed")
    futures = {client.submit(function, item, pure=False): item for item in items}
    try:
        for future in distributed.as_completed(futures):
            future.result()
            done(futures[future])
    except distributed.KilledWorker as error:
        raise ValueError(f"workers died of their work: {reason_of(error)}") from None
    except (CancelledError, ImportError, distributed.comm.CommClosedError) as error:
        raise ValueError(f"workers were lost, or cannot do it: {reason_of(error)}") from None
    finally:
        client.cancel(list(futures))
