"""Evaluation of models: metrics, the judge, procedural pictures, and the page of results."""
