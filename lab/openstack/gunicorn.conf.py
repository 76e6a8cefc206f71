# SPDX-License-Identifier: Apache-2.0
"""Gunicorn's settings, found in its working directory.

They come from the environment, because some of the applications take its arguments for theirs.
"""

import os

wsgi_app = os.environ['WSGI_APP']
bind = '127.0.0.1:' + os.environ['PORT']
worker_class = 'gthread'
threads = 8
# An image upload is one request.
timeout = 3600
# Longer than a client thinks between two requests, or it meets a closing connection.
keepalive = 300
