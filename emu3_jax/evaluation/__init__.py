"""Metrics, and pictures whose content can be read back exactly."""
