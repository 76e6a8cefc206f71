# SPDX-License-Identifier: Apache-2.0
"""The ways to a snapshot as sagas: ``saga.py`` runs and undoes steps, ``steps.py`` is the steps themselves."""
