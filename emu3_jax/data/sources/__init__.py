"""Captioned pictures as people keep them: folders, tar shards, Parquet, hub data sets, lists of conversations."""
