# SPDX-License-Identifier: Apache-2.0
"""The one connection to the cluster that all requests of an engine share."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from typing import Callable, Optional, TypeVar

from nova_rbd_snap import errors
from nova_rbd_snap.ceph.interface import Cluster

T = TypeVar("T")


class Connection:
    """Made when first needed, and again once its client was cut off. Thread-safe."""

    def __init__(self, connect: Callable[[], Cluster]) -> None:
        self._connect = connect
        self._connecting = threading.Lock()
        self._cluster: Optional[Cluster] = None
        #: When the last attempt to connect failed, and how.
        self._failed: tuple[float, Optional[errors.SnapError]] = (0.0, None)

    @contextlib.contextmanager
    def use(self) -> Iterator[Cluster]:
        """:raises errors.SnapError: there is none, and none can be made."""
        cluster = self.cluster()
        try:
            yield cluster
        except errors.Blocklisted:
            self.drop(cluster)
            raise

    def cluster(self) -> Cluster:
        """As it is now. :raises errors.SnapError: there is none, and none can be made."""
        asked = time.monotonic()
        with self._connecting:
            if self._cluster is None:
                self._cluster = self._made(asked)
            return self._cluster

    def _made(self, asked: float) -> Cluster:
        """A new one; whoever has waited for an attempt that failed makes none of their own."""
        failed_at, failure = self._failed
        if failure is not None and failed_at > asked:
            raise type(failure)(str(failure)) from failure
        try:
            return self._connect()
        except errors.SnapError as error:
            self._failed = time.monotonic(), error
            raise

    def drop(self, lost: Cluster) -> None:
        """Use the connection *lost* no more; somebody else may have replaced it already."""
        with self._connecting:
            if self._cluster is lost:
                self._cluster = None

    def ask(self, question: Callable[[Cluster], T]) -> T:
        """The answer to a mere question; asked anew where this client was cut off since it was last used."""
        try:
            with self.use() as cluster:
                return question(cluster)
        except errors.Blocklisted:
            with self.use() as cluster:
                return question(cluster)
