"""Reads and writes pictures and clips as arrays, and computes their sizes. Needs Pillow; videos also need PyAV."""
