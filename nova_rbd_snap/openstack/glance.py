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
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Callable, Optional, TypeVar

import tenacity
from keystoneauth1 import adapter, loading
from keystoneauth1 import exceptions as ksa

from nova_rbd_snap import errors

T = TypeVar("T")

#: As Nova's own [glance] num_retries.
_ATTEMPTS = 4
_PATCH = {"Content-Type": "application/openstack-images-v2.1-json-patch"}

#: The status of an upload that is done.
_UPLOADED = 204
#: Statuses that a proxy gives while Glance itself may still be at work.
_NO_ANSWER = (408, 502, 504)


@dataclass(frozen=True)
class Record:
    """An image record.

    :ivar urls: its locations as far as Glance tells, None where it hides them.
    :ivar urls_complete: these are all; ``direct_url`` alone is the one of several that Glance likes best.
    :ivar importing: a task of Glance is at work on it.
    :ivar server: uuid of the server that it is a snapshot of, where Nova has said so.
    :ivar size: bytes of its data, once there is some.
    :ivar digest: hash of its data, and the algorithm's name before it, where Glance has made one.
    """

    status: str
    urls: Optional[tuple[str, ...]]
    urls_complete: bool
    importing: bool
    server: Optional[str] = None
    size: Optional[int] = None
    digest: Optional[tuple[str, str]] = None

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
            size=data.get("size"),
            digest=(data["os_hash_algo"], data["os_hash_value"]) if data.get("os_hash_value") else None,
        )


class Glance:
    """Glance as one user.

    Every method raises :class:`~nova_rbd_snap.errors.RecordGone` where there is no such image for this user,
    ``NotAuthorized``, ``NotRegistered`` where Glance refuses, and ``GlanceSilent``.
    """

    def __init__(self, keystone_adapter: Any, endpoints: Sequence[str]) -> None:
        """
        :param keystone_adapter: a keystoneauth adapter for the image service, its session with a time-out.
        :param endpoints: URLs of the service; one that does not answer makes way for the next.
        """
        self._adapter = keystone_adapter
        self._all_endpoints = list(endpoints)
        self._endpoints = itertools.cycle(endpoints)
        self._adapter.endpoint_override = next(self._endpoints)

    @classmethod
    def connect(cls, conf: Any, auth: Any, timeout_seconds: int, **headers: Any) -> Glance:
        """Glance as *auth*, found and trusted as the ``[glance]`` options of *conf* say.

        :raises errors.GlanceSilent: its address cannot be found out.
        """
        session = loading.load_session_from_conf_options(conf, "glance", timeout=timeout_seconds)
        made = loading.load_adapter_from_conf_options(conf, "glance", session=session, auth=auth, **headers)
        # Only ``repeat`` repeats a request.
        made.connect_retries = made.status_code_retries = 0
        endpoints = list(conf.glance.api_servers or ())
        random.shuffle(endpoints)
        try:
            endpoints = endpoints or [made.get_endpoint()]
        except ksa.ClientException as error:
            raise errors.GlanceSilent(f"cannot find Glance: {error}") from error
        if not endpoints[0]:
            raise errors.GlanceSilent("the service catalogue has no image service; see the [glance] options")
        # The catalogue may or may not name the version; the paths below do.
        return cls(made, [re.sub(r"/v\d+(\.\d+)?/?$", "", endpoint.rstrip("/")) for endpoint in endpoints])

    @classmethod
    def with_access(cls, conf: Any, access: Mapping[str, Any], timeout_seconds: int) -> Glance:
        """Glance as who gave *access*, which :meth:`access` made in another process; trusted as *conf* says."""
        session = loading.load_session_from_conf_options(conf, "glance", timeout=timeout_seconds)
        headers = dict(access["headers"])
        return cls(
            adapter.Adapter(session, additional_headers=headers, connect_retries=0, status_code_retries=0),
            access["endpoints"],
        )

    def access(self) -> dict[str, Any]:
        """What another process needs to be this user, as plain data: it has the user's token.

        :raises errors.NotAuthorized: there is none to be had.
        """
        try:
            headers = self._adapter.session.get_auth_headers(self._adapter.auth) or {}
        except ksa.ClientException as error:
            raise errors.NotAuthorized(f"no token for Glance: {error}") from error
        return {"endpoints": self._all_endpoints, "headers": dict(headers)}

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

    def upload(self, image_id: str, body: Iterable[bytes]) -> None:
        """Send the image's data, of known length; returns once Glance has all of it.

        What *body* raises is passed on, and the request broken off.
        """
        answer = self._call(
            "PUT",
            f"/v2/images/{image_id}/file",
            headers={"Content-Type": "application/octet-stream"},
            data=body,
            redirect=False,
            log=False,
        )
        if answer.status_code != _UPLOADED:
            raise errors.NotRegistered(f"the upload to image {image_id}: Glance answered {answer.status_code}")

    def store_type(self) -> Optional[str]:
        """What kind of store images go to that name none, where Glance tells this user; it tells administrators."""
        try:
            stores = self._call("GET", "/v2/info/stores/detail").json()["stores"]
        except (errors.NotRegistered, errors.RecordGone):
            return None
        return next((s.get("type") for s in stores if s.get("default")), None)

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
