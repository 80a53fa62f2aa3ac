"""Sources of captioned pictures: folders, tar shards, Parquet files, hub data sets, lists of conversations."""
