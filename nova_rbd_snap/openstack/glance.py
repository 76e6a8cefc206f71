# SPDX-License-Identifier: Apache-2.0
"""Glance's image API, as far as registering a location goes: one bounded request per call.

None is repeated unasked: the first one may have been applied although its answer was lost. What to do then is decided
in ``registration.py``, by re-reading the record.
"""

from __future__ import annotations

import itertools
import random
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Callable, Optional, TypeVar

import tenacity
from keystoneauth1 import exceptions as ksa
from keystoneauth1 import loading

from nova_rbd_snap import errors

T = TypeVar("T")

#: As Nova's own [glance] num_retries.
_ATTEMPTS = 4
_PATCH = {"Content-Type": "application/openstack-images-v2.1-json-patch"}

#: Statuses that a proxy gives while Glance itself may still be at work.
_NO_ANSWER = (408, 502, 504)


@dataclass(frozen=True)
class Record:
    """An image record.

    :ivar urls: its locations as far as Glance tells, None where it hides them.
    :ivar urls_complete: these are all; ``direct_url`` alone is the one of several that Glance likes best.
    :ivar importing: a task of Glance is at work on it.
    :ivar server: uuid of the server that it is a snapshot of, where Nova has said so.
    """

    status: str
    urls: Optional[tuple[str, ...]]
    urls_complete: bool
    importing: bool
    server: Optional[str] = None

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Record:
        urls = [location["url"] for location in data["locations"]] if "locations" in data else None
        if "direct_url" in data:
            urls = [*(urls or []), data["direct_url"]]
        return cls(
            status=data["status"],
            urls=None if urls is None else tuple(urls),
            urls_complete="locations" in data,
            importing=data["status"] == "importing" or bool(data.get("os_glance_import_task")),
            server=data.get("instance_uuid"),
        )


class Glance:
    """Glance as one user.

    Every method raises :class:`~nova_rbd_snap.errors.RecordGone` where there is no such image for this user,
    ``NotAuthorized``, ``NotRegistered`` where Glance refuses, and ``GlanceSilent``.
    """

    def __init__(self, adapter: Any, endpoints: Sequence[str]) -> None:
        """
        :param adapter: a keystoneauth adapter for the image service, its session with a time-out.
        :param endpoints: URLs of the service; one that does not answer makes way for the next.
        """
        self._adapter = adapter
        self._endpoints = itertools.cycle(endpoints)
        self._adapter.endpoint_override = next(self._endpoints)

    @classmethod
    def connect(cls, conf: Any, auth: Any, timeout_seconds: int, **headers: Any) -> Glance:
        """Glance as *auth*, found and trusted as the ``[glance]`` options of *conf* say.

        :raises errors.GlanceSilent: its address cannot be found out.
        """
        session = loading.load_session_from_conf_options(conf, "glance", timeout=timeout_seconds)
        adapter = loading.load_adapter_from_conf_options(conf, "glance", session=session, auth=auth, **headers)
        # Only ``repeat`` repeats a request.
        adapter.connect_retries = adapter.status_code_retries = 0
        endpoints = list(conf.glance.api_servers or ())
        random.shuffle(endpoints)
        try:
            endpoints = endpoints or [adapter.get_endpoint()]
        except ksa.ClientException as error:
            raise errors.GlanceSilent(f"cannot find Glance: {error}") from error
        if not endpoints[0]:
            raise errors.GlanceSilent("the service catalogue has no image service; see the [glance] options")
        # The catalogue may or may not name the version; the paths below do.
        return cls(adapter, [re.sub(r"/v\d+(\.\d+)?/?$", "", endpoint.rstrip("/")) for endpoint in endpoints])

    def record(self, image_id: str) -> Record:
        """The image record as it is now."""
        answer = self._call("GET", f"/v2/images/{image_id}")
        try:
            return Record.from_json(answer.json())
        except (ValueError, KeyError, TypeError) as error:
            raise errors.GlanceSilent(f"what answers for Glance sent no image record: {error!r}") from error

    def answers(self) -> bool:
        """Whether it is Glance that answers, and not something before it that says "not found" to everything."""
        try:
            return bool(self._call("GET", "/v2/schemas/image").json()["name"] == "image")
        except (errors.GlanceError, ValueError, KeyError, TypeError):
            return False

    def create(self, image_id: str, name: str) -> None:
        """Make a record that waits for data, and that lists of images do not show."""
        self._call("POST", "/v2/images", json={"id": image_id, "name": name, "os_hidden": True})

    def data(self, image_id: str) -> bytes:
        """All the image's data."""
        return bytes(self._call("GET", f"/v2/images/{image_id}/file").content)

    def set_properties(self, image_id: str, properties: Mapping[str, Optional[str]]) -> None:
        """Add or replace properties; the others stay. Repeatable."""
        changes = [{"op": "add", "path": f"/{name}", "value": value} for name, value in properties.items()]
        self._call("PATCH", f"/v2/images/{image_id}", headers=_PATCH, json=changes)

    def post_location(self, image_id: str, url: str) -> None:
        """Ask for the location; Glance 2024.2 and later, which then work on it in a task of theirs."""
        self._call("POST", f"/v2/images/{image_id}/locations", json={"url": url, "validation_data": {}})

    def patch_location(self, image_id: str, url: str) -> None:
        """Add the location; needs show_multiple_locations. The image is active when this returns."""
        change = {"op": "add", "path": "/locations/-", "value": {"url": url, "metadata": {}}}
        self._call("PATCH", f"/v2/images/{image_id}", headers=_PATCH, json=[change])

    def delete(self, image_id: str) -> None:
        """Delete the record, and what its locations hold."""
        self._call("DELETE", f"/v2/images/{image_id}")

    def pool_of_store(self, store: str) -> Optional[str]:
        """The pool of the rbd store *store*, where Glance tells this user; it tells administrators."""
        try:
            stores = self._call("GET", "/v2/info/stores/detail").json()["stores"]
        except (errors.NotRegistered, errors.RecordGone):
            return None
        return next((s.get("properties", {}).get("pool") for s in stores if s["id"] == store), None)

    def _call(self, method: str, path: str, **arguments: Any) -> Any:
        try:
            answer = self._adapter.request(path, method, raise_exc=False, **arguments)
        except ksa.Unauthorized as error:
            raise errors.NotAuthorized(f"{method} {path}: {error}") from error
        except ksa.ClientException as error:
            self._adapter.endpoint_override = next(self._endpoints)
            raise errors.GlanceSilent(f"{method} {path}: {error}") from error
        status = answer.status_code
        if status < 400:
            return answer
        text = f"{method} {path}: Glance answered {status} {answer.reason}: {_detail(answer)}"
        if status == 401:
            raise errors.NotAuthorized(text)
        if status in (404, 410):
            raise errors.RecordGone(text)
        if status in _NO_ANSWER:
            raise errors.GlanceSilent(text)
        refused = errors.NotRegistered(text)
        refused.status = status
        raise refused


def _detail(answer: Any) -> str:
    """The sentence in Glance's HTML error page."""
    words = re.sub(r"<title>.*?</title>|<[^>]*>", " ", answer.text or "", flags=re.DOTALL).split()
    return " ".join(words)[:300]


def repeat(
    request: Callable[..., T], *arguments: Any, timeout_seconds: float, sleep: Callable[[float], None] = time.sleep
) -> T:
    """Make a request that may be made twice, again where there was no answer: the next time of the next endpoint.

    :raises errors.GlanceSilent: the last one got none either.
    """
    patiently = tenacity.Retrying(
        retry=tenacity.retry_if_exception_type(errors.GlanceSilent),
        stop=tenacity.stop_after_attempt(_ATTEMPTS) | tenacity.stop_after_delay(timeout_seconds),
        wait=tenacity.wait_fixed(1),
        sleep=sleep,
        reraise=True,
    )
    return patiently(request, *arguments)
