# SPDX-License-Identifier: Apache-2.0
"""A network service without networks: Nova asks even for servers that have none."""

import json


def application(environ, start_response):
    """Answer every GET of a collection with an empty one."""
    collection = environ['PATH_INFO'].rstrip('/').rsplit('/', 1)[-1].removesuffix('.json')
    body = json.dumps({collection.replace('-', '_'): []}).encode()
    found = environ['REQUEST_METHOD'] == 'GET'
    start_response('200 OK' if found else '404 Not Found',
                   [('Content-Type', 'application/json'), ('Content-Length', str(len(body)))])
    return [body]
