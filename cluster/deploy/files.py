"""Every file that is made from the catalogue, as text."""

from __future__ import annotations

import json
from typing import Final

from cluster.deploy.alerts import RUNBOOKS, rules_yaml
from cluster.deploy.dashboards import DASHBOARDS

RUNBOOKS_URL: Final = f"cluster/deploy/{RUNBOOKS}"
"""The place in the repository, for who has no better."""


def files(runbooks_url: str = RUNBOOKS_URL) -> dict[str, str]:
    """Path below ``cluster/deploy`` → text."""
    made = {f"grafana/{name}.json": json.dumps(board, indent=1) + "\n" for name, board in DASHBOARDS.items()}
    return {**made, "prometheus/alerts.yml": rules_yaml(runbooks_url)}
