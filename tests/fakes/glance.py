# SPDX-License-Identifier: Apache-2.0
"""An image service in memory, behind the adapter interface of keystoneauth that ``openstack/glance.py`` uses.

It keeps Glance's rules on locations (both interfaces, the asynchronous task, hidden locations), and can fail a request
before or after it took effect.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from typing import Any, Callable, Optional, Protocol

from keystoneauth1 import exceptions as ksa


@dataclass
class Answer:
    """What an HTTP library returns."""

    status_code: int
    data: Any = None
    reason: str = ""

    @property
    def text(self) -> str:
        return json.dumps(self.data)

    def json(self) -> Any:
        return self.data


@dataclass
class Fault:
    """How a request of *kind* goes wrong: an HTTP status, or None for no answer; before or after it took effect."""

    kind: str
    status: Optional[int]
    applied: bool = False


class Store(Protocol):
    """Where the images' data are."""

    def holds(self, url: str) -> bool: ...
    def write(self, image_id: str, data: Any) -> str: ...
    def remove(self, url: str) -> None: ...


def kind_of(path: str, method: str, body: Any) -> str:
    """What a request is about, in one word."""
    if method == "PATCH":
        return "patch" if body[0]["path"] == "/locations/-" else "properties"
    return next((kind for kind in ("stores", "schemas") if f"/{kind}/" in path), method.lower())


@dataclass
class FakeImageService:
    """The service and its records.

    :ivar records: image id to the record as Glance's JSON.
    :ivar polls_until_active: how often a record is read before the task of a POST is through; -1: never;
        ``task_fails``: it gives up then.
    :ivar store: where it looks for the data at a location; without one all are believed.
    """

    offers_post: bool = True
    offers_patch: bool = True
    shows_locations: bool = True
    polls_until_active: int = 0
    task_fails: bool = False
    records: dict[str, dict[str, Any]] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    on_request: Callable[[str], None] = lambda kind: None
    endpoint_override: str = ""
    store: Optional[Store] = None
    #: After how many bytes of an upload the connection is lost, for each of the first ones.
    cuts: list[int] = field(default_factory=list)
    algorithm: str = "sha512"
    #: Whether what is stored differs from what was sent.
    damages: bool = False
    _were_active: set[str] = field(default_factory=set)

    def add(self, image_id: str, **changes: Any) -> dict[str, Any]:
        """A record as Nova's API makes it for a snapshot."""
        self.records[image_id] = {"status": "queued", "locations": [], "name": "s", **changes}
        return self.records[image_id]

    def request(self, path: str, method: str, raise_exc: bool = True, **body: Any) -> Answer:
        assert raise_exc is False
        kind = kind_of(path, method, body.get("json"))
        self.on_request(kind)
        fault = next((fault for fault in self.faults if fault.kind == kind), None)
        if fault is not None and not fault.applied:
            return self._fail(fault)
        answer = self._do(kind, path.split("/")[3], body.get("json") or body.get("data"))
        return self._fail(fault) if fault is not None else answer

    @staticmethod
    def _fail(fault: Fault) -> Answer:
        if fault.status is None:
            raise ksa.ConnectFailure("connection reset")
        return Answer(fault.status, reason="injected")

    def _do(self, kind: str, image_id: str, body: Any) -> Answer:
        if kind == "stores":
            return Answer(403)
        if kind == "schemas":
            return Answer(200, {"name": image_id})
        record = self.records.get(image_id)
        if record is None:
            return Answer(404)
        return getattr(self, f"_{kind}")(image_id, record, body)

    def _get(self, image_id: str, record: dict[str, Any], body: Any) -> Answer:
        if "os_glance_import_task" in record:
            record["polls"] = record.get("polls", 0) + 1
            if record["polls"] > self.polls_until_active >= 0:
                del record["os_glance_import_task"]
                if not self.task_fails and self._has(record["asked"]):
                    record.update(status="active", locations=[{"url": record["asked"]}])
        hidden = () if self.shows_locations else ("locations",)
        return Answer(200, {key: value for key, value in record.items() if key not in hidden})

    def _properties(self, image_id: str, record: dict[str, Any], body: Any) -> Answer:
        if record["status"] != "queued" and any(change["path"] == "/disk_format" for change in body):
            return Answer(403)
        record.update((change["path"][1:], change["value"]) for change in body)
        return Answer(200)

    def _post(self, image_id: str, record: dict[str, Any], body: Any) -> Answer:
        if not self.offers_post:
            return Answer(404)
        if record["status"] != "queued":
            return Answer(409)
        record.update(os_glance_import_task="task", asked=body["url"])
        return Answer(202)

    def _patch(self, image_id: str, record: dict[str, Any], body: Any) -> Answer:
        if not self.offers_patch:
            return Answer(403)
        if record["status"] not in ("queued", "active"):
            return Answer(409)
        if not self._has(body[0]["value"]["url"]):
            return Answer(400)
        record["locations"].append({"url": body[0]["value"]["url"]})
        record["status"] = "active"
        return Answer(200)

    def _received(self, body: Any) -> Any:
        """All of an upload; None where the connection is lost amid it."""
        if isinstance(body, (str, bytes, dict)):
            return body
        cut, data = self.cuts.pop(0) if self.cuts else None, b""
        for chunk in body:
            data += chunk
            if cut is not None and len(data) >= cut:
                return None
        return data[:-1] if self.damages else data

    def _hash(self, data: bytes) -> str:
        return hashlib.new(self.algorithm, data).hexdigest()

    def _put(self, image_id: str, record: dict[str, Any], body: Any) -> Answer:
        if record["status"] != "queued" or "os_glance_import_task" in record or self.store is None:
            return Answer(409)
        record["status"] = "saving"
        try:
            data = self._received(body)
        finally:  # what is broken off waits for data again
            record["status"] = "queued"
        if data is None:
            raise ksa.ConnectFailure("connection reset")
        record.update(status="active", locations=[{"url": self.store.write(image_id, data)}])
        if isinstance(data, bytes):
            record.update(size=len(data), os_hash_algo=self.algorithm, os_hash_value=self._hash(data))
        return Answer(204)

    def _delete(self, image_id: str, record: dict[str, Any], body: Any) -> Answer:
        if self.store is not None:
            for location in record["locations"]:
                self.store.remove(location["url"])
        del self.records[image_id]
        if record["status"] == "active":
            self._were_active.add(image_id)
        return Answer(204)

    def was_active(self, image_id: str) -> bool:
        """Whether it was when it was deleted."""
        return image_id in self._were_active

    def _has(self, url: str) -> bool:
        return self.store is None or self.store.holds(url)
