"""Weights of a mixture, by RegMix (arXiv 2407.01492): small trainings on drawn mixtures, and a fit of their losses.

SOURCES.yaml ─ search.py: mixtures from a Dirichlet prior ─ proxies.py: the recipe, once for each ─► proxies/*.json
proxies/*.json ─ fitting.py: held-out loss of each domain by weights, bootstrap ─► mixture.yaml, report.html
"""
