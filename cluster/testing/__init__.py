"""For tests of the pipeline and of gateways: what to believe, and why."""
