"""What watches a running pipeline: Grafana dashboards and Prometheus alerts as data, and the files made from them.

Every query is built from the catalogue's instruments (`cluster.deploy.promql`), so none can name what does not exist.
``python -m cluster.deploy`` writes the files; a test holds that they are up to date.
"""
